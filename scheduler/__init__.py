"""Moves bytes: lanes, leases, devices, positional I/O, traces. Knows no model and no optimizer."""
