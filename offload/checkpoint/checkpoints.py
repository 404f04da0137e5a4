"""An engine's checkpoints: one save at a time, maybe behind training, and going on from one."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..access import ParameterAccess
from ..durable import RunState
from ..journey import Journeys
from ..residency import Residency
from ..scheduler.loop import LoopThread
from ..store.codec import encode
from ..updates import PendingUpdates
from .document import Document
from .errors import CheckpointError, CheckpointFailed
from .folder import RunFolder
from .loading import Loading, Resumed, RunFacts, saved_parameters
from .saving import FrozenFile, Saving
from .snapshot import Snapshot


class Checkpoints:
    """Saves and loads. Used by the training thread alone.

    Args:
        facts: the run's parameters, optimizer, groups and buffers, as they are at any time.
        journeys: makes an update wait for the copy of what it changes.
    """

    def __init__(
        self,
        facts: Callable[[], RunFacts],
        access: ParameterAccess,
        state: RunState,
        updates: PendingUpdates,
        residency: Residency,
        journeys: Journeys,
        loop: LoopThread,
    ) -> None:
        self._facts = facts
        self._access = access
        self._state = state
        self._updates = updates
        self._residency = residency
        self._journeys = journeys
        self._loop = loop
        self._saving: Saving | None = None
        self._frozen: dict[int, FrozenFile] = {}
        self._rewritten: set[int] = set()  # since the last save began

    # -- saving

    def save(self, directory: Path, step: int, *, data: Any, keep: int | None, background: bool, frozen: bool) -> Path:
        """See `OffloadEngine.save`. Step `step` is decided and no other has begun."""
        if keep is not None and keep < 1:
            raise CheckpointError(f"keep={keep}; give how many checkpoints stay, at least 1, or None for all of them")
        self.wait()
        facts = self._facts()
        captured = {**self._state.capture(step), **self._state.capture_tracked()}
        buffers = captured.pop("buffers")
        folder = RunFolder(directory)
        with contextlib.ExitStack() as held:
            held.enter_context(folder.saving())
            folder.check_model([info.name for info in facts.parameters])
            draft = Document(
                order=1 + max((one.document.order for one in folder.found()), default=0),
                step=step,
                saved_unix_s=time.time(),
                parameters=saved_parameters(facts.parameters),
                optimizer={key: facts.optimizer[key] for key in ("name", "states")},
                groups=facts.group_names(),
                files={},
                state=encode(captured, "state"),
                data=encode(data, "data"),
            )
            snapshot = Snapshot([self._updates.made(layout.unit.index) for layout in facts.layouts])
            saving = Saving(
                folder,
                draft,
                buffers,
                facts.layouts,
                self._access,
                snapshot,
                keep=keep,
                frozen=frozen,
                known_frozen=dict(self._frozen),
                bring_up_to_date=lambda unit: self._bring_up_to_date(facts, snapshot, unit),
                done=held.pop_all().close,
            )
        self._rewritten.clear()
        self._journeys.before_update = snapshot.wait_copied
        try:
            saving.start()
        except BaseException:
            saving.let_go()
            raise
        self._saving = saving
        if not background:
            self.settle()
            error = self._collect()
            if error is not None:
                raise error
        return saving.path

    def _bring_up_to_date(self, facts: RunFacts, snapshot: Snapshot, unit: int) -> None:
        made = snapshot.made[unit]
        if made is None or made.cancelled():
            return
        self._loop.run(self._residency.make_pending(facts.layouts[unit].unit, made))
        made.result()

    def _collect(self) -> BaseException | None:
        """Look at the save that has ended, once. Returns what it broke off with."""
        saving, self._saving = self._saving, None
        if saving is None:
            return None
        if saving.error is None:
            seen = saving.seen_frozen
            self._frozen.update({unit: file for unit, file in seen.items() if unit not in self._rewritten})
        return saving.error

    def raise_failure(self) -> None:
        """Raises: CheckpointFailed if a save in the background has broken off since anybody looked. Never blocks."""
        saving = self._saving
        if saving is not None and not saving.running:
            error = self._collect()
            if isinstance(error, CheckpointFailed):  # what was saved is there
                raise error
            if error is not None:
                raise CheckpointFailed(
                    f"saving {saving.path} in the background failed ({type(error).__name__}: {error}); nothing is left "
                    "of it, earlier checkpoints are whole and training can go on. Mend the cause and save again"
                ) from error

    def wait(self) -> None:
        """Block until no save is under way. Raises: as `raise_failure`."""
        self.settle()
        self.raise_failure()

    def settle(self) -> None:
        """Block until no save is under way, whatever came of it."""
        if self._saving is not None:
            self._saving.wait()

    # -- values that change between steps

    def before_write(self, unit: int) -> None:
        """Block until the unit's values may be replaced: until a save under way has copied them."""
        if self._saving is not None:
            self._saving.snapshot.want(unit).result()

    def values_written(self, unit: int) -> None:
        """The unit's values have been replaced, maybe frozen ones too."""
        self._rewritten.add(unit)
        self._frozen.pop(unit, None)

    # -- going on

    def open(self, directory: Path, least_step: int) -> Loading:
        """The checkpoint in `directory`, compared with its checksums and with this run. Nothing is changed.

        Raises: CheckpointMissing, CheckpointDamaged, CheckpointMismatch, CheckpointError; OSError.
        """
        self.wait()
        loading = Loading(directory)
        loading.refuse_other(self._facts(), self._access)
        if loading.document.step < least_step:
            raise CheckpointError(
                f"{loading.path} is of step {loading.document.step}, and the store has committed step {least_step}: a "
                "store only goes forward. Build the engine with OffloadConfig(overwrite=True), then resume"
            )
        lost = self._state.tracked_without(loading.run_state())
        if lost:
            raise CheckpointError(
                f"{loading.path} has no state of {', '.join(lost)}, which this run tracks: the run that saved it "
                "tracked fewer objects. Track the same ones in the same order, and new ones after resume()"
            )
        return loading

    def load(
        self, loading: Loading, before_write: Callable[[int], None], after_write: Callable[[int], None]
    ) -> Resumed:
        """Replace all values, states and counts, unit by unit. Blocks.

        Raises: what a lane raises; parameters are then of two runs, and the engine is of no more use.
        """
        try:
            for layout in self._facts().layouts:
                with loading.unit(layout) as values:
                    if values:
                        unit = layout.unit.index
                        before_write(unit)
                        try:
                            self._access.write(layout, values)
                        finally:
                            after_write(unit)
            self._state.restore(loading.run_state())
        except BaseException as error:
            self._updates.spoilt(error)
            raise
        return loading.result
