"""`offload train`: a byte-level GPT on real text, with the states wherever the budgets put them."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ..arguments import (
    add_json,
    check_writable,
    count,
    durability,
    memory_size,
    norm_limit,
    positive,
    update_on,
    write_json,
)

if TYPE_CHECKING:
    from offload import OffloadConfig

HELP = "train a byte-level GPT on real text, within memory budgets"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="tiny", help="tiny (2M, the default), small, base, medium, large, xl or 7b")
    parser.add_argument("--text", metavar="DIR_OR_FILE", help="what to learn (default: Python's standard library)")
    parser.add_argument("--steps", type=count(1), default=50)
    parser.add_argument("--batch", type=count(1), default=8, help="sequences per micro-batch (default 8)")
    parser.add_argument("--seq", type=count(1), default=256, help="bytes per sequence (default 256)")
    parser.add_argument("--micro-batches", type=count(1), default=1, help="backwards per step (default 1)")
    parser.add_argument("--host-memory", type=memory_size, default="auto", metavar="SIZE", help="such as 8GiB")
    parser.add_argument("--device-memory", type=memory_size, default="auto", metavar="SIZE", help="such as 8GiB")
    parser.add_argument(
        "--nvme", action="append", metavar="DIR", help="folder on a drive; repeat for more drives; none: no NVMe tier"
    )
    parser.add_argument(
        "--durability", type=durability, default="step", help='what survives a crash: "step" (default), N, or "none"'
    )
    parser.add_argument(
        "--activation-memory", type=memory_size, default="auto", metavar="SIZE", help="0: compute everything again"
    )
    parser.add_argument("--update", default="auto", help="when units are updated, as in OffloadConfig (default auto)")
    parser.add_argument(
        "--update-on",
        type=update_on,
        default="host",
        metavar="WHERE",
        help='where, beside an accelerator: "host" (default), "device", or the device\'s share between 0 and 1',
    )
    parser.add_argument("--rig", metavar="RIG", help="show each step's lower bound on this rig (offload probe --rig)")
    parser.add_argument("--resume", action="store_true", help="go on from the last committed step in --nvme")
    parser.add_argument("--overwrite", action="store_true", help="discard a run in --nvme that could be resumed")
    parser.add_argument("--save", type=Path, metavar="DIR", help="folder for checkpoints, each in step-NNNNNN")
    parser.add_argument("--save-every", type=count(1), metavar="N", help="steps between them (default: at the end)")
    parser.add_argument("--keep", type=count(1), metavar="K", help="how many stay in --save (default: all)")
    parser.add_argument("--from", type=Path, dest="start", metavar="DIR", help="go on from a checkpoint, or the newest")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... or fake")
    parser.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float32"),
        default="auto",
        help="compute dtype; auto is bfloat16 where the hardware multiplies it, else float32",
    )
    parser.add_argument("--lr", type=positive, default=1e-3, help="peak learning rate (default 1e-3)")
    parser.add_argument("--clip", type=norm_limit, default=1.0, metavar="NORM", help="default 1.0; 0: no clipping")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-batches", type=count(1), default=4, help="held-out batches per evaluation (default 4)")
    parser.add_argument("--sample-bytes", type=count(0), default=128, help="bytes of text to generate (default 128)")
    parser.add_argument("--timeline", type=Path, metavar="FILE", help="draw the last step (.html or .png)")
    parser.add_argument("--quiet", action="store_true", help="no progress, only the table at the end")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    from ...machine import describe
    from ...models.gpt import preset
    from ...train import TrainOptions, train
    from ..train_progress import progress
    from ..train_table import print_report

    check_writable(arguments.json)
    options = TrainOptions(
        model=preset(arguments.model, context=arguments.seq, dropout=arguments.dropout),
        config=_config(arguments),
        text=arguments.text,
        steps=arguments.steps,
        batch=arguments.batch,
        seq=arguments.seq,
        lr=arguments.lr,
        seed=arguments.seed,
        eval_batches=arguments.eval_batches,
        sample_bytes=arguments.sample_bytes,
        timeline=arguments.timeline,
        save=arguments.save,
        save_every=arguments.save_every,
        keep=arguments.keep,
        start=arguments.start,
    )
    with progress(steps=options.steps, quiet=arguments.quiet) as shown:
        report = train(options, shown.on_step, shown.on_phase)
    machine = describe(Path(arguments.nvme[0]) if arguments.nvme else None)
    print_report(report, options, machine)
    if options.timeline is not None:
        print(f"the last step as a picture: {options.timeline}")
    write_json(
        arguments.json,
        {
            "machine": machine.as_dict(),
            "options": {key: str(value) for key, value in vars(arguments).items() if key != "run"},
            "dtype": str(options.config.dtype),
            "report": asdict(report),
        },
    )
    return 0


def _config(arguments: argparse.Namespace) -> "OffloadConfig":
    import torch

    from offload import OffloadConfig

    from ...machine import native_bfloat16
    from ...rigs import find

    name = arguments.dtype
    if name == "auto":
        accelerated = arguments.device == "auto" and torch.accelerator.is_available()
        device = str(torch.accelerator.current_accelerator()) if accelerated else arguments.device
        on_cores = device in ("auto", "cpu", "fake")
        name = "bfloat16" if native_bfloat16("cpu" if on_cores else device) else "float32"
    return OffloadConfig(
        device=arguments.device,
        nvme=arguments.nvme,
        host_memory=arguments.host_memory,
        device_memory=arguments.device_memory,
        dtype=getattr(torch, name),
        micro_batches=arguments.micro_batches,
        clip_grad_norm=arguments.clip,
        activation_memory=arguments.activation_memory,
        update=arguments.update,
        update_on=arguments.update_on,
        rig=None if arguments.rig is None else find(arguments.rig),
        durability=arguments.durability,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
    )
