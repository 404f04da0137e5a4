"""Other people's training loops, driven over an engine. Nothing here is imported by `import offload`."""
