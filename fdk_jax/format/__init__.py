"""The format: packed codes, scales and codebooks, and how weights become them. Knows no backend."""
