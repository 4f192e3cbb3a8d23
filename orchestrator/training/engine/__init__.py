"""Engines: forward and backward passes, gradient reduction, the optimizer, and its state."""
