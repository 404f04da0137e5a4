"""`offload simulate`: a step on a machine that is only described, by the engine's own schedule in virtual time."""

import argparse
from typing import TYPE_CHECKING

from ..arguments import add_json, check_writable, count, durability, memory_size, norm_limit, write_json

if TYPE_CHECKING:
    from offload.simulation import SimulatedStep, Simulation

HELP = "simulate a step on a machine described by a rig file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rig", required=True, metavar="RIG", help="a TOML file, or the name of a rig that comes along"
    )
    parser.add_argument("--model", default="base", help="as in offload train (default base)")
    parser.add_argument("--batch", type=count(1), default=8, help="sequences per micro-batch (default 8)")
    parser.add_argument("--seq", type=count(1), default=1024, help="bytes per sequence (default 1024)")
    parser.add_argument("--micro-batches", type=count(1), default=1, help="backwards per step (default 1)")
    parser.add_argument("--host-memory", type=memory_size, metavar="SIZE", help="default: all of the rig's")
    parser.add_argument("--device-memory", type=memory_size, metavar="SIZE", help="default: all of the rig's")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--update", default="auto", help="when units are updated, as in OffloadConfig (default auto)")
    parser.add_argument(
        "--durability", type=durability, default="step", help='what survives a crash: "step" (default), N, or "none"'
    )
    parser.add_argument("--clip", type=norm_limit, default=1.0, metavar="NORM", help="default 1.0; 0: no clipping")
    parser.add_argument("--steps", type=count(1), default=4, help="simulated steps, the last one shown (default 4)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    import time

    import torch

    from offload import AdamW
    from offload.simulation import Simulation, simulated_config

    from ...models.gpt import preset
    from ...rigs import find
    from ...simulate import gpt_on_meta, gpt_seconds

    check_writable(arguments.json)
    rig, model = find(arguments.rig), preset(arguments.model, context=arguments.seq)
    sizes = {name: getattr(arguments, name) for name in ("host_memory", "device_memory")}
    config = simulated_config(
        rig,
        dtype=getattr(torch, arguments.dtype),
        micro_batches=arguments.micro_batches,
        clip_grad_norm=arguments.clip,
        durability=arguments.durability,
        update=arguments.update,
        **{name: size for name, size in sizes.items() if size is not None},
    )
    seconds = gpt_seconds(model, batch=arguments.batch, seq=arguments.seq, flop_s=rig.compute.flop_s)
    began_s = time.perf_counter()
    with Simulation(gpt_on_meta(model), AdamW(), rig, config, seconds) as simulation:
        step = simulation.run(arguments.steps)
    took_s = time.perf_counter() - began_s
    tokens = arguments.batch * arguments.seq * arguments.micro_batches
    print(f"# {rig.name}; {arguments.model}, {model.num_parameters / 1e6:.0f}M parameters, {tokens} tokens a step")
    print(f"# step {arguments.steps} of {arguments.steps} in virtual time; simulated in {took_s:.2f} s")
    for line in lines(simulation, step, tokens):
        print(line)
    write_json(arguments.json, as_dict(simulation, step))
    return 0


def lines(simulation: "Simulation", step: "SimulatedStep", tokens: int) -> list[str]:
    """The step as text: where everything rests, seconds beside the bound, lanes and waits."""
    from ...memory import format_nbytes

    bound = simulation.bound()
    busy_s = {**bound.busy_s, "compute": step.compute_s}
    rows = [
        f"rests in host memory  {rest_of(simulation)}",
        f"step                  {step.seconds:.4g} s, {tokens / step.seconds:.4g} tokens/s",
        f"bound                 {bound.bound_s:.4g} s ({bound.lane}), ratio {step.seconds / bound.bound_s:.3f}; "
        f"slowest lane of the whole step {bound.global_s:.4g} s",
        "",
        "| lane | bytes | busy s | least busy s | waited for s |",
        "|---|---|---|---|---|",
    ]
    for lane, nbytes in step.nbytes.items():
        if step.busy_s[lane] or step.exposed_s[lane]:
            rows.append(
                f"| {lane} | {format_nbytes(nbytes) if lane != 'compute' else ''} | {step.busy_s[lane]:.4g} "
                f"| {busy_s[lane]:.4g} | {step.exposed_s[lane]:.4g} |"
            )
    waits = sorted(step.waited_s.items(), key=lambda item: -item[1])
    if waits:
        most = ", ".join(f"{unit} {seconds:.3g} s" for unit, seconds in waits[:5])
        rows += ["", f"waits {sum(step.waited_s.values()):.4g} s in all: {most}" + (", ..." if waits[5:] else "")]
    return rows


def rest_of(simulation: "Simulation") -> str:
    """What share of each kind's bytes the plan keeps in host memory."""
    shares = []
    for kind in ("param", "grad", "states"):
        sizes = [
            (layout.nbytes(kind), home[kind])
            for layout, home in zip(simulation.layouts, simulation.plan.homes, strict=True)
        ]
        total = sum(nbytes for nbytes, _ in sizes)
        kept = sum(nbytes for nbytes, tier in sizes if tier == "host")
        shares.append(f"{kind} {kept / total:.0%}")
    return ", ".join(shares)


def as_dict(simulation: "Simulation", step: "SimulatedStep") -> "dict[str, object]":
    """The figures for --json."""
    bound = simulation.bound()
    return {
        "rig": simulation.rig.name,
        "seconds": step.seconds,
        "bound_s": bound.bound_s,
        "bound_ratio": step.seconds / bound.bound_s,
        "global_s": bound.global_s,
        "lane": bound.lane,
        "nbytes": step.nbytes,
        "busy_s": step.busy_s,
        "exposed_s": step.exposed_s,
        "waited_s": step.waited_s,
        "host_memory": {name: pool.capacity_nbytes for name, pool in simulation.pools().items()},
    }
