"""Measuring quality and cost: hidden facts, timings, memory."""
