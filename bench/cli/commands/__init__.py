"""One module per command; a package is a group of commands."""
