"""What tasks of one kind share."""
