"""Trials that train on several workers each."""
