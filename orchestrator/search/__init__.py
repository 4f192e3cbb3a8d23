"""Search: trials of one recipe with other values, on Ray Tune."""
