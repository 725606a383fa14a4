"""Adapters in block types: what accuracy, outputs and weight changes lose, and what size and speed gain."""
