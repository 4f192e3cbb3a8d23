"""The file formats that examples are read from, one module a format."""
