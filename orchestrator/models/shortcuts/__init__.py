"""Faster ways to the same numbers. Each is tried on the model before it is used."""
