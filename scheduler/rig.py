"""Rigs: a machine as the speeds of its lanes and the sizes of its tiers, kept as TOML."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

LAWS = ("duplex", "additive", "mixed")
GB = 1e9

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")

S = TypeVar("S")


@dataclass(frozen=True, kw_only=True)
class DriveSpeed:
    """The NVMe tier as one drive (several drives of one tier: their sum).

    Attributes:
        read_gb_s, write_gb_s: bandwidth of reads alone and of writes alone, in 1e9 bytes per second.
        law: how long reads and writes take that are asked for together; see `service_s`.
        latency_s: seconds that every request takes beyond its bytes; requests in flight share it.
        depth: requests that are served at once.
        mixed_gb_s: bandwidth of reads and writes together, in 1e9 bytes per second; for the law "mixed" only.
    """

    read_gb_s: float
    write_gb_s: float
    law: str
    latency_s: float
    depth: int
    mixed_gb_s: float | None = None

    def __post_init__(self) -> None:
        _check(self, "drive", positive=("read_gb_s", "write_gb_s"), at_least_zero=("latency_s",), whole=("depth",))
        if self.law not in LAWS:
            raise ValueError(f"drive.law is {self.law!r}; expected one of {', '.join(LAWS)}")
        if (self.law == "mixed") != (self.mixed_gb_s is not None):
            raise ValueError(
                f"drive.mixed_gb_s is {self.mixed_gb_s!r} with the law {self.law!r}; "
                'give it with the law "mixed" and only there'
            )
        if self.mixed_gb_s is not None:
            _check(self, "drive", positive=("mixed_gb_s",))

    def service_s(self, read_nbytes: float, write_nbytes: float) -> float:
        """Least seconds in which the drive moves these bytes, asked for together and in requests that hide latency.

        duplex: both directions side by side, each at its full speed; additive: one after the other; mixed: all bytes at
        one speed.
        """
        read_s, write_s = read_nbytes / (self.read_gb_s * GB), write_nbytes / (self.write_gb_s * GB)
        if self.law == "duplex":
            return max(read_s, write_s)
        if self.law == "additive":
            return read_s + write_s
        assert self.mixed_gb_s is not None
        return (read_nbytes + write_nbytes) / (self.mixed_gb_s * GB)


@dataclass(frozen=True, kw_only=True)
class LinkSpeed:
    """The link between host and a device with memory of its own; its directions do not disturb each other.

    Attributes:
        h2d_gb_s, d2h_gb_s: to and from the device, from pinned memory, in 1e9 bytes per second.
    """

    h2d_gb_s: float
    d2h_gb_s: float

    def __post_init__(self) -> None:
        _check(self, "link", positive=("h2d_gb_s", "d2h_gb_s"))


@dataclass(frozen=True, kw_only=True)
class CoreSpeed:
    """The host's cores.

    Attributes:
        count: cores that this process may use.
        update_elements_s: parameters that one core updates per second (Adam with a split master).
        dram_gb_s: host memory traffic of all cores and transfers, read and written bytes, in 1e9 per second.
    """

    count: int
    update_elements_s: float
    dram_gb_s: float

    def __post_init__(self) -> None:
        _check(self, "cores", positive=("update_elements_s", "dram_gb_s"), whole=("count",))


@dataclass(frozen=True, kw_only=True)
class ComputeSpeed:
    """What computes the model: the device, or the cores where there is one memory.

    Attributes:
        flop_s: floating point operations per second that training attains, a multiply-add counted as two.
    """

    flop_s: float

    def __post_init__(self) -> None:
        _check(self, "compute", positive=("flop_s",))


@dataclass(frozen=True, kw_only=True)
class TierSizes:
    """Bytes of each tier that training may use; in a file also as text such as "24GiB" (2**30) or "900MB" (10**6).

    Attributes:
        host: host memory.
        device: memory of the device; 0 where device and host are one memory.
        nvme: space on the drives; 0 without any.
    """

    host: int
    device: int = 0
    nvme: int = 0

    def __post_init__(self) -> None:
        for name in ("host", "device", "nvme"):
            object.__setattr__(self, name, _parse_size(getattr(self, name), f"sizes.{name}"))
        if self.host == 0:
            raise ValueError("sizes.host is 0; expected the host memory that training may use")


@dataclass(frozen=True, kw_only=True)
class Rig:
    """One machine: what a simulation, a bound and a paced bench need to know of it.

    Attributes:
        name: how tables call it.
        cores: the host's cores.
        compute: what computes the model.
        sizes: bytes of each tier.
        drive: the NVMe tier; None without one.
        link: the link to the device; None where device and host are one memory.

    Raises: ValueError for a value out of range, naming it.
    """

    name: str
    cores: CoreSpeed
    compute: ComputeSpeed
    sizes: TierSizes
    drive: DriveSpeed | None = None
    link: LinkSpeed | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name is {self.name!r}; expected a text that is not empty")
        for section, size, what in (("link", self.sizes.device, "device"), ("drive", self.sizes.nvme, "nvme")):
            if (getattr(self, section) is None) != (size == 0):
                raise ValueError(
                    f"sizes.{what} is {size} and the section [{section}] is "
                    f"{'absent' if getattr(self, section) is None else 'present'}; give both or neither"
                )

    @property
    def one_memory(self) -> bool:
        """Whether device and host are the same memory."""
        return self.link is None

    def service_s(self, read_nbytes: float, write_nbytes: float) -> float:
        """Least seconds in which the drive moves these bytes together. Raises: ValueError if there is no drive."""
        if self.drive is None:
            if read_nbytes or write_nbytes:
                raise ValueError(f"rig {self.name!r} has no drive, and {read_nbytes + write_nbytes} bytes need one")
            return 0.0
        return self.drive.service_s(read_nbytes, write_nbytes)

    @classmethod
    def from_toml(cls, text: str, source: str = "rig") -> Rig:
        """The rig that `text` describes; `source` names the file in messages.

        Raises: ValueError for a missing, unknown or impossible field, naming file and key.
        """
        try:
            table = tomllib.loads(text)
            known = {"drive": DriveSpeed, "link": LinkSpeed, "cores": CoreSpeed}
            known |= {"compute": ComputeSpeed, "sizes": TierSizes}
            parts = {
                key: _section(known[key], value, f"{key}.") if key in known else value for key, value in table.items()
            }
            return _section(cls, parts, "")
        except (tomllib.TOMLDecodeError, ValueError) as problem:
            raise ValueError(f"{source}: {problem}") from None

    @classmethod
    def read(cls, path: str | Path) -> Rig:
        """The rig in the file at `path`. Raises: OSError; ValueError as `from_toml`."""
        return cls.from_toml(Path(path).read_text(encoding="utf-8"), str(path))

    def to_toml(self) -> str:
        """Text that `from_toml` makes this rig of."""
        lines = [f"name = {_toml(self.name)}"]
        for section, values in asdict(self).items():
            if isinstance(values, dict):
                lines += ["", f"[{section}]"]
                lines += [f"{key} = {_toml(value)}" for key, value in values.items() if value is not None]
        return "\n".join(lines) + "\n"

    def write(self, path: str | Path) -> None:
        """Write `to_toml()` to `path`."""
        Path(path).write_text(self.to_toml(), encoding="utf-8")


def _section(made_of: type[S], values: Any, prefix: str) -> S:
    """An object of the dataclass `made_of` out of one table. Raises: ValueError for missing and unknown keys."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{prefix.rstrip('.')} is {values!r}; expected a table")
    known = {field.name: field for field in fields(made_of)}  # type: ignore[arg-type]
    unknown = sorted(values.keys() - known.keys())
    if unknown:
        raise ValueError(f"{prefix}{unknown[0]} is not a field of a rig; known here are {', '.join(known)}")
    missing = [name for name, field in known.items() if field.default is MISSING and name not in values]
    if missing:
        raise ValueError(f"{prefix}{missing[0]} is missing; a rig needs it")
    return made_of(**values)


def _check(
    part: Any, section: str, positive: tuple[str, ...] = (), at_least_zero: tuple[str, ...] = (),
    whole: tuple[str, ...] = (),
) -> None:  # fmt: skip
    """Raises: ValueError unless each named field is a number of its kind. Infinite speeds are allowed."""
    for name in positive + at_least_zero:
        value = getattr(part, name)
        number = isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
        if not number or value < 0 or (value == 0 and name in positive):
            least = "above zero" if name in positive else "of at least zero"
            raise ValueError(f"{section}.{name} is {value!r}; expected a number {least}")
    for name in whole:
        value = getattr(part, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{section}.{name} is {value!r}; expected a whole number of at least 1")


def _parse_size(value: Any, name: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match and match[2].upper() in _UNITS:
        return int(float(match[1]) * _UNITS[match[2].upper()])
    raise ValueError(f'{name} is {value!r}; expected a number of bytes, or text such as "24GiB" (2**30) or "2TB"')


def _toml(value: str | int | float) -> str:
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in escaped) + '"'
    return repr(value)
