"""Calibration: finds the layer and the heads of a model that pick passages with answers, and makes a preset of them.

Each document passes once through the candidate layers, and the score of each passage by each head is recorded. Weights
of the heads are then learned with optax on some documents and measured on others, beside the words that passage and
question share, as the filter will rank them.

Axes: N documents, L layers, H heads, P passages.
"""
