"""Runs trials with Ray Tune."""
