"""The pictures of a report, one file each: a function from what was read to a `Chart`, or None with nothing to show."""
