"""Five tasks one after another, and what is left of the first: NumPy reference and native, row by row."""
