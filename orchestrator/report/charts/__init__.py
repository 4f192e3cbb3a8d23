"""The charts of a report, one file each: a function that returns a `Chart`, or None if there is nothing to show."""
