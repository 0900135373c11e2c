"""Presets that `gemfilter calibrate` wrote for models that are known by their shape."""
