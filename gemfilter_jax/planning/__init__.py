"""Whether a model, a prompt and some devices fit together, from programs that are compiled and never run."""
