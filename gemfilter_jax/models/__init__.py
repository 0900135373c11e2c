"""Decoder-only language models as Flax NNX modules: one decoder, and the configs and weight names of each family."""
