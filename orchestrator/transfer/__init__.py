"""How knowledge moves from source to target: one file per way."""
