"""Models that the command line and the benches train."""
