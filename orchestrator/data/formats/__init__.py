"""The file formats of examples, one module per format."""
