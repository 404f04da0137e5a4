"""The training run behind `offload train`: a byte-level GPT in an engine, on real text."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from offload import AdamW, OffloadConfig, OffloadEngine, StepInfo, deferred_init
from offload.scheduler.chrome import read_trace

from . import text, timeline
from .generate import generate
from .memory import peak_rss_nbytes, rss_nbytes
from .models.gpt import GPT, GPTConfig

LANES = ("compute", "h2d", "d2h", "read", "write", "cpu")
SAMPLE_PROMPT = b"def "
TRACED_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """One run. Batches and steps are counts; `lr` is the peak of the schedule; `config` places the bytes.

    `timeline` is the file (.html or .png) into which the last step is drawn; the trace of the last few lies beside it.

    Checkpoints go to `save` after every `save_every` steps and after the last, of which `keep` stay; `start` is one to
    go on from.

    Raises: ValueError if a count is below its minimum, `lr` is not positive, or a setting of checkpoints has no `save`.
    """

    model: GPTConfig
    config: OffloadConfig
    text: str | None = None
    steps: int = 50
    batch: int = 8
    seq: int = 256
    lr: float = 1e-3
    weight_decay: float = 0.1
    seed: int = 0
    eval_batches: int = 4
    sample_bytes: int = 128
    sample_limit_s: float = 30.0
    timeline: Path | None = None
    save: Path | None = None
    save_every: int | None = None
    keep: int | None = None
    start: Path | None = None

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch", 1), ("seq", 1), ("eval_batches", 1), ("sample_bytes", 0)):
            if getattr(self, name) < least:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} is {getattr(self, name)}, expected at least {least}. Pass a larger count.")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"--lr is {self.lr}, expected a positive number such as 1e-3.")
        if self.save is None and (self.save_every is not None or self.keep is not None):
            raise ValueError("--save-every and --keep say how to save, but there is no --save. Name a folder with it.")
        if self.timeline is not None:
            timeline.check(self.timeline)

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.seq * self.config.micro_batches


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One finished step, for whoever shows it. Memory is bytes in use now; budgets are 0 where there is none."""

    info: StepInfo
    loss: float
    tokens_per_s: float
    host_used_nbytes: int
    host_budget_nbytes: int
    device_used_nbytes: int
    device_budget_nbytes: int


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What a run did. Losses in nats per byte, `*_nbytes` in bytes, seconds summed over all steps.

    Outside the budget lie the boundaries between units, what autograd saves inside one unit, and the logits.
    `bound_ratio` is the median step over its lower bound, where the configuration names a rig.
    """

    num_parameters: int
    steps: int
    skipped_steps: int
    tokens: int
    first_loss: float
    last_loss: float
    held_out_before: float
    held_out_after: float
    seconds: float
    tokens_per_s: float
    nbytes: dict[str, int]
    busy_s: dict[str, float]
    exposed_s: dict[str, float]
    baseline_rss_nbytes: int
    peak_rss_nbytes: int
    host_budget_nbytes: int
    host_peak_nbytes: int
    device_budget_nbytes: int
    device_peak_nbytes: int
    boundaries_nbytes: int
    temporaries_nbytes: int
    logits_nbytes: int
    units: str
    corpus: dict[str, object]
    sample: str
    bound_ratio: float | None = None
    history: list[dict[str, object]] = field(default_factory=list)


def _middle(ratios: list[float | None]) -> float | None:
    known = [ratio for ratio in ratios if ratio is not None]
    return statistics.median(known) if known else None


def cosine_with_warm_up(steps: int) -> Callable[[int], float]:
    """Factor on the learning rate by step index: linear over the first tenth, then half a cosine down to a tenth.

    Source: Loshchilov and Hutter 2017, arXiv:1608.03983, equation 5, one period.
    """
    warm = max(1, min(100, steps // 10))

    def factor(index: int) -> float:
        if index < warm:
            return (index + 1) / warm
        progress = min(1.0, (index - warm) / max(1, steps - warm))
        return 0.1 + 0.45 * (1.0 + math.cos(math.pi * progress))

    return factor


def train(options: TrainOptions, on_step: Callable[[Progress], None], on_phase: Callable[[str], None]) -> TrainReport:
    """Train, evaluate before and after, and sample; everything that a user can cause raises ValueError or OSError.

    `on_step` is called after every step and `on_phase` with a sentence whenever something else begins.
    """
    baseline_nbytes = rss_nbytes()
    corpus = text.read(options.text)
    corpus.windows(torch.Generator(), batch=1, seq=options.seq)  # too little text is an error before the model exists
    corpus.held_out_windows(0, batch=1, seq=options.seq, num_batches=1)
    torch.manual_seed(options.seed)
    on_phase(f"building {options.model.num_parameters / 1e6:.1f}M parameters")
    with deferred_init():
        model = GPT(options.model)
    with OffloadEngine(model, AdamW(lr=options.lr, weight_decay=options.weight_decay), options.config) as engine:
        del model
        run = _Run(options, engine, corpus, baseline_nbytes)
        on_phase("held-out loss before training")
        before = run.evaluate()
        on_phase(f"training {options.steps} steps on {corpus.num_files} files of {corpus.source}")
        history = run.steps(on_step)
        on_phase("held-out loss after training")
        after = run.evaluate()
        if options.sample_bytes:
            on_phase("sampling text")
        return run.report(before, after, run.sample(), history)


class Draws:
    """The generator that picks windows of text, in a form that a commit can keep."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def state_dict(self) -> dict[str, Tensor]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.generator.set_state(state["generator"])


class _Run:
    """One engine and the text it learns from."""

    def __init__(self, options: TrainOptions, engine: OffloadEngine, corpus: text.Corpus, baseline_nbytes: int) -> None:
        self.options = options
        self.engine = engine
        self.corpus = corpus
        self.baseline_nbytes = baseline_nbytes
        self.device = next(engine.module.parameters()).device
        self.draws = Draws(options.seed)
        factor = cosine_with_warm_up(options.steps)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(engine.optimizer, factor)
        engine.track(self.schedule, self.draws)
        self.first_step = engine.steps_done if options.start is None else engine.resume(options.start).step
        if self.first_step >= options.steps:
            raise ValueError(f"--steps is {options.steps}, but {self.first_step} steps are done already. Pass more.")

    def _batch(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        windows = windows.to(self.device)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def evaluate(self) -> float:
        """Mean held-out loss in nats per byte, over the same windows every time."""
        options = self.options
        self.engine.eval()
        losses = []
        with torch.no_grad():
            for index in range(options.eval_batches):
                windows = self.corpus.held_out_windows(
                    index, batch=options.batch, seq=options.seq, num_batches=options.eval_batches
                )
                losses.append(float(self.engine(*self._batch(windows))))
        self.engine.train()
        return sum(losses) / len(losses)

    def steps(self, on_step: Callable[[Progress], None]) -> list[tuple[StepInfo, float]]:
        history = []
        for index in range(self.first_step, self.options.steps):
            if self.options.timeline is not None and index == max(self.first_step, self.options.steps - TRACED_STEPS):
                self.engine.trace(timeline.trace_beside(self.options.timeline))
            began = time.perf_counter()
            info, loss = self._step()
            seconds = time.perf_counter() - began
            history.append((info, loss))
            self._save(index + 1)
            on_step(self._progress(info, loss, seconds))
        self._draw()
        return history

    def _save(self, step: int) -> None:
        options = self.options
        last = step == options.steps
        if options.save is not None and (last or (options.save_every is not None and step % options.save_every == 0)):
            self.engine.save(options.save, keep=options.keep, background=not last)

    def _draw(self) -> None:
        """Draw the last step, if that was asked for."""
        path = self.options.timeline
        if path is not None:
            self.engine.trace(None)
            steps = read_trace(timeline.trace_beside(path))
            timeline.write(timeline.draw(steps, timeline.choose(steps, None)), path)

    def _step(self) -> tuple[StepInfo, float]:
        options = self.options
        micro_batches = options.config.micro_batches
        losses = []
        for _ in range(micro_batches):
            windows = self.corpus.windows(self.draws.generator, batch=options.batch, seq=options.seq)
            loss = self.engine(*self._batch(windows)) / micro_batches
            self.engine.backward(loss)
            losses.append(loss.detach())
        info = self.engine.step()
        self.schedule.step()
        return info, float(torch.stack(losses).sum())

    def _progress(self, info: StepInfo, loss: float, seconds: float) -> Progress:
        memory = self.engine.memory
        return Progress(
            info=info,
            loss=loss,
            tokens_per_s=self.options.tokens_per_step / seconds,
            host_used_nbytes=memory.host_used_nbytes,
            host_budget_nbytes=memory.host_budget_nbytes,
            device_used_nbytes=memory.device_used_nbytes,
            device_budget_nbytes=memory.device_budget_nbytes,
        )

    def sample(self) -> str:
        options = self.options
        if not options.sample_bytes:
            return ""
        self.engine.eval()
        new = generate(
            self.engine,
            SAMPLE_PROMPT,
            num_bytes=options.sample_bytes,
            context=options.seq,
            seed=options.seed,
            device=self.device,
            limit_s=options.sample_limit_s,
        )
        return (SAMPLE_PROMPT + new).decode("utf-8", errors="replace")

    def report(self, before: float, after: float, sample: str, history: list[tuple[StepInfo, float]]) -> TrainReport:
        options, memory = self.options, self.engine.memory
        seconds = sum(info.seconds for info, _ in history)
        tokens = options.tokens_per_step * len(history)
        return TrainReport(
            num_parameters=options.model.num_parameters,
            steps=len(history),
            skipped_steps=sum(info.skipped for info, _ in history),
            tokens=tokens,
            first_loss=history[0][1],
            last_loss=history[-1][1],
            held_out_before=before,
            held_out_after=after,
            seconds=seconds,
            tokens_per_s=tokens / seconds,
            nbytes={lane: sum(info.nbytes.get(lane, 0) for info, _ in history) for lane in LANES},
            busy_s={lane: sum(info.busy_s.get(lane, 0.0) for info, _ in history) for lane in LANES},
            exposed_s={lane: sum(info.exposed_s.get(lane, 0.0) for info, _ in history) for lane in LANES},
            baseline_rss_nbytes=self.baseline_nbytes,
            peak_rss_nbytes=peak_rss_nbytes(),
            host_budget_nbytes=memory.host_budget_nbytes,
            host_peak_nbytes=memory.host_peak_nbytes,
            device_budget_nbytes=memory.device_budget_nbytes,
            device_peak_nbytes=memory.device_peak_nbytes,
            boundaries_nbytes=memory.boundaries_peak_nbytes,
            temporaries_nbytes=memory.temporaries_nbytes,
            logits_nbytes=options.model.logits_nbytes(
                batch=options.batch, seq=options.seq, itemsize=options.config.dtype.itemsize
            ),
            units=str(self.engine),
            corpus={
                "source": self.corpus.source,
                "num_files": self.corpus.num_files,
                "num_files_left_out": self.corpus.num_files_left_out,
                "train_nbytes": len(self.corpus.train),
                "held_out_nbytes": len(self.corpus.held_out),
            },
            sample=sample,
            bound_ratio=_middle([info.bound_ratio for info, _ in history]),
            history=[
                {
                    "step": info.step,
                    "loss": loss,
                    "grad_norm": info.grad_norm,
                    "lr": info.lr,
                    "skipped": info.skipped,
                    "seconds": info.seconds,
                    "nbytes": dict(info.nbytes),
                    "busy_s": dict(info.busy_s),
                    "exposed_s": dict(info.exposed_s),
                }
                for info, loss in history
            ],
        )
