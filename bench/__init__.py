"""Harness, models and studies around the engine; uses only what a user could import."""
