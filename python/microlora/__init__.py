"""LoRA adapters that learn per request, in microseconds, inside a Python process."""
