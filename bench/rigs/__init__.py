"""Rigs that come with the package, one TOML file each; a comment beside a figure says where it is from."""

from __future__ import annotations

from pathlib import Path

from offload.scheduler.rig import Rig

FOLDER = Path(__file__).resolve().parent


def names() -> list[str]:
    """Names of the rigs that come with the package, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def find(name: str) -> Rig:
    """The rig of that name, or the one in the file of that path.

    Raises: ValueError if there is neither, or a field is wrong.
    """
    if name in names():
        return Rig.read(FOLDER / f"{name}.toml")
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"rig {name!r} is neither a file nor one of {', '.join(names())}")
    return Rig.read(path)
