"""Texts and facts of the evaluation tasks."""
