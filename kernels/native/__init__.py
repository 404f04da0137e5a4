"""The CPU implementation in C: built by `build`, found by `library`, called by `calls`."""
