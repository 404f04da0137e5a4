"""Blocking storage and what is known of drives: backends, whole transfers, queues, probes. Knows no model."""

from .backend import ALIGN_NBYTES, Backend, StorageFile
from .batch import ReadBatch, read_batch
from .drive import DriveTuning, file_system
from .errors import DriveStalled, NoSpace, OffloadIOError
from .faults import Fault, FaultyBackend
from .files import PosixBackend, PosixFile, address_of, ensure_descriptors, open_backend, prove, view_of
from .memory import MemoryBackend
from .paced import Pace, PacedBackend
from .power import OperationLog, RecordingBackend
from .probe import ProbeReport, measure_drive
from .queue import NEEDED_AT_COMMIT, NEEDED_LATER, NEEDED_NOW, NEEDED_SOON, DriveQueue, QueueStatistics
from .transfer import NUM_RETRIES, flush_fully, read_fully, write_fully

__all__ = [
    "ALIGN_NBYTES",
    "NEEDED_AT_COMMIT",
    "NEEDED_LATER",
    "NEEDED_NOW",
    "NEEDED_SOON",
    "NUM_RETRIES",
    "Backend",
    "DriveQueue",
    "DriveStalled",
    "DriveTuning",
    "Fault",
    "FaultyBackend",
    "MemoryBackend",
    "NoSpace",
    "OffloadIOError",
    "OperationLog",
    "Pace",
    "PacedBackend",
    "PosixBackend",
    "PosixFile",
    "ProbeReport",
    "QueueStatistics",
    "ReadBatch",
    "RecordingBackend",
    "StorageFile",
    "address_of",
    "ensure_descriptors",
    "file_system",
    "flush_fully",
    "measure_drive",
    "open_backend",
    "prove",
    "read_batch",
    "read_fully",
    "view_of",
    "write_fully",
]
