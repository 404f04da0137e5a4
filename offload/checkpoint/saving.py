"""Writes one checkpoint in a thread of its own, unit by unit, from wherever the bytes rest."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn
from xxhash import xxh3_64

from ..access import ParameterAccess
from ..layout import Member, UnitLayout
from ..weights.files import INDEX_NAME, TensorFileWriter, TensorSpec, bytes_of
from . import document
from .document import Document, SavedFile
from .errors import CheckpointFailed
from .folder import RunFolder
from .snapshot import Snapshot

BUFFERS_NAME = "buffers.safetensors"
METADATA = {"format": "pt"}


@dataclass(frozen=True)
class FrozenFile:
    """A unit's frozen parameters as they were last looked at: where they were written, if anywhere, and checksums."""

    path: Path | None
    saved: SavedFile


class Saving:
    """One save on its way.

    Args:
        draft: the document without what is only known when the bytes are written.
        buffers: their values of the step, by name.
        frozen: whether frozen parameters are written; else only their checksums are.
        known_frozen: by unit, what has not changed since it was last looked at; a file is then linked, not copied.
        bring_up_to_date: blocks until the unit's update of this step is stored.
        done: called in the thread at the end, whatever came of it.

    Attributes: error, what it broke off with; seen_frozen, as `known_frozen`, of the checkpoint that was written.
    """

    def __init__(
        self,
        folder: RunFolder,
        draft: Document,
        buffers: Mapping[str, Tensor],
        layouts: Sequence[UnitLayout],
        access: ParameterAccess,
        snapshot: Snapshot,
        *,
        keep: int | None,
        frozen: bool,
        known_frozen: Mapping[int, FrozenFile],
        bring_up_to_date: Callable[[int], None],
        done: Callable[[], None],
    ) -> None:
        self.error: BaseException | None = None
        self.seen_frozen: dict[int, FrozenFile] = {}
        self._folder = folder
        self._draft = draft
        self._buffers = buffers
        self._layouts = layouts
        self._access = access
        self.snapshot = snapshot
        self._keep = keep
        self._frozen = frozen
        self._known_frozen = known_frozen
        self._bring_up_to_date = bring_up_to_date
        self._done = done
        self._files: dict[str, SavedFile] = {}
        self._left_out: dict[str, str] = {}
        self._weights: dict[str, str] = {}
        self._thread = threading.Thread(target=self._run, name="offload-checkpoint", daemon=True)

    @property
    def path(self) -> Path:
        """Where the checkpoint will be."""
        return self._folder.target(self._draft.step)

    def start(self) -> None:
        """Raises: RuntimeError if there can be no more threads; `let_go` is the caller's then."""
        self._thread.start()

    def let_go(self) -> None:
        """Nothing is copied any more: nobody waits, and nothing is held."""
        self.snapshot.release()
        self._done()

    def wait(self) -> None:
        """Block until it has ended, whatever came of it."""
        self._thread.join()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._write(self._folder.begin(self._draft.step))
        except BaseException as error:
            self.error = error
        finally:
            self.let_go()

    def _write(self, folder: Path) -> None:
        try:
            while (unit := self.snapshot.next()) is not None:
                self._bring_up_to_date(unit)
                self._copy_unit(folder, unit)
            if self._buffers:
                self._write_buffers(folder)
            self._write_index(folder)
            document.write(
                folder,
                replace(self._draft, files=self._files, left_out=self._left_out, saved_unix_s=time.time()),
            )
            path = self._folder.publish(folder, self._draft.step)
        except BaseException as error:
            if isinstance(error, Exception) and not folder.exists() and self.path.exists():
                raise CheckpointFailed(
                    f"{self.path} is there and whole, but making its name durable, or removing the one that it "
                    f"replaced, failed ({type(error).__name__}: {error}). Training can go on; mend the cause and save "
                    "again"
                ) from error
            self._folder.discard(folder)
            raise
        if self._keep is not None:
            self._prune(self._keep, path)

    def _prune(self, keep: int, path: Path) -> None:
        try:
            self._folder.prune(keep, path)
        except Exception as error:
            raise CheckpointFailed(
                f"{path} is saved and whole; removing old ones (keep={keep}) failed ({type(error).__name__}: {error}). "
                "Training can go on; mend the cause, and the next save removes them"
            ) from error

    def _copy_unit(self, folder: Path, unit: int) -> None:
        """Copy all of a unit, then let its next update go on, then flush."""
        layout = self._layouts[unit]
        trainable = [member for member in layout.members if member.segment != "frozen"]
        frozen = [member for member in layout.members if member.segment == "frozen"]
        with contextlib.ExitStack() as open_files:
            writers = []
            if trainable:
                writers += self._copy_trainable(folder, layout, trainable, open_files)
            if frozen:
                writers += self._copy_frozen(folder, layout, frozen, open_files)
            self.snapshot.copied(unit)
            for writer in writers:
                self._note(writer)
        name = _frozen_name(unit)
        if name in self._files:
            self.seen_frozen[unit] = FrozenFile(self.path / name, self._files[name])

    def _copy_trainable(
        self, folder: Path, layout: UnitLayout, members: Sequence[Member], open_files: contextlib.ExitStack
    ) -> list[TensorFileWriter]:
        number = f"{layout.unit.index + 1:05d}"
        specs = {member.info.parameter: self._specs(layout, member) for member in members}
        values = {m.info.name: TensorSpec.of(blank) for m in members for blank in [specs[m.info.parameter][0]]}
        states = {
            f"{m.info.name}/{kind}": TensorSpec.of(blank)
            for m in members
            for kind, blank in specs[m.info.parameter][1].items()
        }
        specs.clear()
        model = open_files.enter_context(TensorFileWriter(folder / f"model-{number}.safetensors", values, METADATA))
        self._weights.update(dict.fromkeys(values, model.path.name))
        writers = [model]
        if states:
            writers.append(TensorFileWriter(folder / f"states-{number}.safetensors", states, METADATA))
            open_files.enter_context(writers[-1])
        for part in self._access.parts(layout, [m.info.parameter for m in members], states=True, settle=False):
            if part.state is None:
                model.write(part.info.name, part.values)
            else:
                writers[-1].write(f"{part.info.name}/{part.state}", part.values)
        return writers

    def _specs(self, layout: UnitLayout, member: Member) -> tuple[Tensor, dict[str, Tensor]]:
        blank = self._access.blank(layout, member.info.parameter)
        return blank.value, blank.states

    def _copy_frozen(
        self, folder: Path, layout: UnitLayout, members: Sequence[Member], open_files: contextlib.ExitStack
    ) -> list[TensorFileWriter]:
        unit = layout.unit.index
        known = self._known_frozen.get(unit)
        name = _frozen_name(unit)
        if not self._frozen:
            if known is None:
                known = FrozenFile(None, SavedFile(nbytes=0, header="", tensors=self._hash_frozen(layout, members)))
            self.seen_frozen[unit] = known
            self._left_out.update(known.saved.tensors)
            return []
        self._weights.update(dict.fromkeys((member.info.name for member in members), name))
        if known is not None and known.path is not None and _link(known, folder / name):
            self._files[name] = known.saved
            return []
        specs = {m.info.name: TensorSpec(m.info.dtype, tuple(m.info.shape)) for m in members}
        writer = open_files.enter_context(TensorFileWriter(folder / name, specs, METADATA))
        for part in self._access.parts(layout, [m.info.parameter for m in members], settle=False):
            writer.write(part.info.name, part.values)
        return [writer]

    def _hash_frozen(self, layout: UnitLayout, members: Sequence[Member]) -> dict[str, str]:
        return hash_frozen(self._access, layout, [member.info.parameter for member in members], settle=False)

    def _write_buffers(self, folder: Path) -> None:
        specs = {name: TensorSpec.of(buffer) for name, buffer in self._buffers.items()}
        with TensorFileWriter(folder / BUFFERS_NAME, specs, METADATA) as writer:
            for name, buffer in self._buffers.items():
                writer.write(name, buffer.reshape(-1))
            self._note(writer)
        self._weights.update(dict.fromkeys(self._buffers, BUFFERS_NAME))

    def _note(self, writer: TensorFileWriter) -> None:
        self._files[writer.path.name] = SavedFile(
            nbytes=writer.nbytes, header=writer.header_checksum, tensors=writer.finish()
        )

    def _write_index(self, folder: Path) -> None:
        """For programs that load weights; `resume` does without it."""
        total = sum(self._files[name].nbytes for name in set(self._weights.values()))
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(self._weights.items()))}
        with open(folder / INDEX_NAME, "x") as file:
            json.dump(index, file, indent=1)
            file.flush()
            os.fsync(file.fileno())


def hash_frozen(
    access: ParameterAccess, layout: UnitLayout, parameters: Sequence[nn.Parameter], *, settle: bool
) -> dict[str, str]:
    """XXH3 checksums of frozen parameters' bytes as they rest, by name."""
    found = {layout.by_parameter[p].info.name: xxh3_64() for p in parameters}
    for part in access.parts(layout, parameters, settle=settle):
        found[part.info.name].update(bytes_of(part.values))
    return {name: checksum.hexdigest() for name, checksum in found.items()}


def _frozen_name(unit: int) -> str:
    return f"frozen-{unit + 1:05d}.safetensors"


def _link(known: FrozenFile, target: Path) -> bool:
    """Give a file that never changes a second name. False where that cannot be done: it is written again then."""
    assert known.path is not None
    try:
        if known.path.stat().st_size != known.saved.nbytes:
            return False
        target.hardlink_to(known.path)
    except OSError:
        return False
    return True
