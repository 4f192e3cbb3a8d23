"""The command line: parse the arguments, call the package, print the results."""
