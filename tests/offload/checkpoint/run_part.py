"""A part of one run of 20 steps: `whole FOLDER`, `until_killed FOLDER` or `rest FOLDER`.

The last line printed is a JSON list: the losses of the last steps and a digest of everything at the end."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from conftest import build, placements, seed_all, snapshot, train  # type: ignore[import-not-found]


def report(losses: list[float | None], found: dict[str, torch.Tensor]) -> None:
    digest = hashlib.sha256()
    for name in sorted(found):
        digest.update(name.encode() + found[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    print(json.dumps([losses, digest.hexdigest()]))


def main() -> None:
    what, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    if what == "whole":
        with build(**placements(folder)["memory"]) as engine:
            seed_all(4)
            losses = train(engine, 20)
            report(losses, snapshot(engine))
    elif what == "until_killed":
        with build(**placements(folder)["nvme"]) as engine:
            seed_all(4)
            train(engine, 10)
            engine.save(folder / "run", keep=1)
            train(engine, 2)
            print("saving step 12", flush=True)
            for step in range(12, 1000):
                engine.save(folder / "run", keep=1, background=True)
                if step < 19:  # from there on the checkpoint of step 19 is replaced, again and again
                    train(engine, 1)
    else:
        with build(seed=9, **placements(folder / "rest")["fake"]) as engine:
            resumed = engine.resume(folder / "run")
            report(train(engine, 20 - resumed.step), snapshot(engine))


if __name__ == "__main__":
    main()
