"""Runs trials that train on several workers each."""
