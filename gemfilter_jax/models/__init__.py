"""Decoder-only language models as Flax NNX modules: one decoder, and what each family adds to it."""
