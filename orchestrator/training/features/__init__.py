"""Stored features: the output of the frozen blocks, computed once."""
