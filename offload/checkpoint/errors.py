"""Why a checkpoint cannot be read, or was not written."""

from __future__ import annotations


class CheckpointError(ValueError):
    """Something about a checkpoint that the user can mend; the message says how."""


class CheckpointMissing(CheckpointError):
    """There is no checkpoint where one was expected."""


class CheckpointDamaged(CheckpointError):
    """What lies in the folder is not what was saved; the message names the file."""


class CheckpointMismatch(CheckpointError):
    """The checkpoint belongs to another model or optimizer; the message names every difference."""


class CheckpointFailed(RuntimeError):
    """A save broke off: in the background, with nothing left of it, or once its checkpoint was there, which is whole.

    The message says which. Training is not affected, earlier checkpoints are whole.
    """
