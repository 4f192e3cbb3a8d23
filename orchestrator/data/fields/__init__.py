"""The kinds of values that a data column holds: how they are read, checked and stored."""
