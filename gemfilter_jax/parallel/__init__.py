"""Meshes, collectives, sequence shards and processes."""
