"""What a power cut can leave of a drive: a log of every operation, and the states that the log permits."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .backend import Backend, StorageFile
from .wrapped import WrappedBackend, WrappedFile

SECTOR_NBYTES = 512


@dataclass(slots=True)
class Operation:
    """One call, from tick `start` to tick `end` (None while it has not returned).

    kind "write" and "flush" belong to the inode; "create", "rename" and "remove" to the directory `root`, as does
    "sync" (of the directory).
    """

    kind: str
    start: int
    root: Path
    inode: int = -1
    name: str = ""
    target: str = ""
    offset: int = 0
    data: bytes = b""
    end: int | None = None


class OperationLog:
    """Collects the operations of any number of `RecordingBackend`s in one order. Safe from any thread."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self._lock = threading.Lock()
        self._ticks = itertools.count()
        self._inodes: dict[tuple[Path, str], int] = {}

    @property
    def now(self) -> int:
        """A tick later than everything logged so far."""
        with self._lock:
            return next(self._ticks)

    def adopt(self, root: Path, files: Mapping[str, bytes]) -> None:
        """Start a directory with files that are durable already, e.g. what an earlier power cut left."""
        for name, data in files.items():
            create = self.begin("create", root, name=name)
            self.end(create)
            self.end(self.begin("write", root, inode=create.inode, data=data))
            self.end(self.begin("flush", root, inode=create.inode))
        self.end(self.begin("sync", root))

    def begin(self, kind: str, root: Path, **facts: object) -> Operation:
        with self._lock:
            operation = Operation(kind, next(self._ticks), root, **facts)  # type: ignore[arg-type]
            if kind == "create":
                operation.inode = operation.start
                self._inodes[root, operation.name] = operation.inode
            elif kind == "rename":
                operation.inode = self._inodes.pop((root, operation.name))
                self._inodes[root, operation.target] = operation.inode
            elif kind == "remove":
                self._inodes.pop((root, operation.name), None)
            self.operations.append(operation)
            return operation

    def end(self, operation: Operation) -> None:
        with self._lock:
            operation.end = next(self._ticks)

    def inode(self, root: Path, name: str) -> int:
        with self._lock:
            return self._inodes[root, name]

    def after_power_cut(self, tick: int, chance: random.Random) -> dict[Path, dict[str, bytes]]:
        """One state, drawn with `chance`, in which the drives may be found if the power fails at `tick`.

        Rules: what a write had stored when a later flush of its file began, and that flush returned, is there. Of
        every other write any set of sectors may be there, whatever the order of the writes. Directory operations
        before a directory flush that returned are there; of the later ones a beginning of their sequence is
        (file systems with a journal keep that order, and nothing else is assumed of them).
        """
        begun = [operation for operation in self.operations if operation.start < tick]
        contents = {
            operation.inode: _contents([other for other in begun if other.inode == operation.inode], tick, chance)
            for operation in begun
            if operation.kind == "create"
        }
        return {
            root: {name: contents[inode] for name, inode in _entries(begun, root, tick, chance).items()}
            for root in {operation.root for operation in begun}
        }


def _returned(operation: Operation, tick: int) -> bool:
    return operation.end is not None and operation.end < tick


def _entries(begun: list[Operation], root: Path, tick: int, chance: random.Random) -> dict[str, int]:
    """Names of a directory after the cut."""
    changes = [o for o in begun if o.root == root and o.kind in ("create", "rename", "remove")]
    synced = max((o.start for o in begun if o.root == root and o.kind == "sync" and _returned(o, tick)), default=-1)
    num_sure = sum(1 for change in changes if change.end is not None and change.end < synced)
    entries: dict[str, int] = {}
    for change in changes[: chance.randint(num_sure, len(changes))]:
        if change.kind == "create":
            entries[change.name] = change.inode
        elif change.kind == "rename":
            entries.pop(change.name, None)
            entries[change.target] = change.inode
        else:
            entries.pop(change.name, None)
    return entries


def _contents(operations: list[Operation], tick: int, chance: random.Random) -> bytes:
    """Bytes of one inode after the cut."""
    flushed = max((o.start for o in operations if o.kind == "flush" and _returned(o, tick)), default=-1)
    data = bytearray()
    writes = [o for o in operations if o.kind == "write"]
    sure = [o for o in writes if o.end is not None and o.end < flushed]
    for write in sure:
        _store(data, write.offset, write.data)
    unsure = [o for o in writes if not (o.end is not None and o.end < flushed)]
    chance.shuffle(unsure)
    for write in unsure:
        share = chance.choice((0.0, 0.5, 1.0))
        for start in range(0, len(write.data), SECTOR_NBYTES):
            if chance.random() < share:
                _store(data, write.offset + start, write.data[start : start + SECTOR_NBYTES])
    return bytes(data)


def _store(data: bytearray, offset: int, new: bytes) -> None:
    if len(data) < offset + len(new):
        data.extend(bytes(offset + len(new) - len(data)))
    data[offset : offset + len(new)] = new


class RecordingBackend(WrappedBackend):
    """`inner`, which must be empty at first or adopted by the log, with every change noted in `log`.

    `lies` lists operations that are noted as never having happened though the caller is told they have: with
    {"flush"} it is a drive whose flush does nothing, with {"sync"} one whose directory flush does nothing.
    """

    def __init__(self, inner: Backend, log: OperationLog, *, lies: frozenset[str] = frozenset()) -> None:
        super().__init__(inner)
        self.log = log
        self.lies = lies

    def open(self, name: str, *, create: bool = False) -> StorageFile:
        if create:
            operation = self.log.begin("create", self.root, name=name)
            file = self.inner.open(name, create=True)
            self.log.end(operation)
        else:
            file = self.inner.open(name)
        return _RecordingFile(file, self, self.log.inode(self.root, name))

    def reserve(self, name: str, nbytes: int) -> None:
        super().reserve(name, nbytes)
        create = self.log.begin("create", self.root, name=name)
        self.log.end(create)
        self.log.end(self.log.begin("write", self.root, inode=create.inode, data=bytes(nbytes)))

    def rename(self, source: str, target: str) -> None:
        operation = self.log.begin("rename", self.root, name=source, target=target)
        super().rename(source, target)
        self.log.end(operation)

    def remove(self, name: str) -> None:
        operation = self.log.begin("remove", self.root, name=name)
        super().remove(name)
        self.log.end(operation)

    def sync_directory(self) -> None:
        if "sync" in self.lies:
            return
        operation = self.log.begin("sync", self.root)
        super().sync_directory()
        self.log.end(operation)


class _RecordingFile(WrappedFile):
    def __init__(self, inner: StorageFile, backend: RecordingBackend, inode: int) -> None:
        super().__init__(inner)
        self._backend = backend
        self._inode = inode

    def write_from(self, buffer: memoryview, offset: int) -> int:
        log = self._backend.log
        operation = log.begin("write", self._backend.root, inode=self._inode, offset=offset, data=bytes(buffer))
        moved = super().write_from(buffer, offset)
        operation.data = operation.data[:moved]
        log.end(operation)
        return moved

    def flush(self) -> None:
        if "flush" in self._backend.lies:
            return
        operation = self._backend.log.begin("flush", self._backend.root, inode=self._inode)
        super().flush()
        self._backend.log.end(operation)
