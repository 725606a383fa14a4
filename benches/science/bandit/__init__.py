"""Contextual bandits from scalar feedback alone: native policies beside NumPy ones."""
