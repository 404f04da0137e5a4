"""The command line: `offload COMMAND`, also `python -m offload COMMAND`."""

from .main import main

__all__ = ["main"]
