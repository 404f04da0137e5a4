"""Which parameters travel together: the units of a module, and the call sites at which they are needed."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, eq=False)
class ParameterInfo:
    """One parameter, once, however many names lead to it.

    `dtype` is the dtype in which it computes; `names` are all its names in the wrapped module (tied weights have
    several), the first of them is its name everywhere else.
    """

    parameter: nn.Parameter
    names: tuple[str, ...]
    dtype: torch.dtype
    shape: torch.Size
    trainable: bool

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def numel(self) -> int:
        return self.shape.numel()


@dataclass(frozen=True, eq=False)
class Unit:
    """Parameters that travel together."""

    index: int
    name: str
    parameters: tuple[ParameterInfo, ...]

    @property
    def numel(self) -> int:
        return sum(info.numel for info in self.parameters)


@dataclass(frozen=True, eq=False)
class CallSite:
    """A module whose call needs `units` on the device, whole, from its first to its last operation."""

    name: str
    module: nn.Module
    units: tuple[Unit, ...]


@dataclass(frozen=True)
class Partition:
    """Units in order of registration, and the call sites that use them.

    Parameters of a unit without a call site of its own (held by a module that only routes, such as the root) are
    read one by one as the module's code touches them.
    """

    units: tuple[Unit, ...]
    call_sites: tuple[CallSite, ...]


def collect_parameters(
    module: nn.Module, dtype: torch.dtype, keep_fp32: Sequence[str], reserve: Sequence[str] = ()
) -> list[ParameterInfo]:
    """All parameters of `module`, each once, with the dtype it will compute in.

    Args:
        reserve: patterns of names of parameters that count as trainable, also where they are frozen now.

    Raises: ValueError for a pattern in `reserve` that matches nothing, parameters on the meta device, complex or 8-bit
        float trainable ones, and distinct parameters that share memory.
    """
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    patterns = [*keep_fp32, *(f"*{word}*" for word in _hf_keep_fp32(module))]
    infos = []
    owners: dict[int, str] = {}
    for pattern in reserve:
        if not any(fnmatch.fnmatchcase(name, pattern) for its_names in names.values() for name in its_names):
            example = next(iter(names.values()), ["(none)"])[0]
            raise ValueError(f"trainable has {pattern!r}, which matches no parameter; names look like {example!r}")
    for parameter, its_names in names.items():
        trainable = parameter.requires_grad or any(
            fnmatch.fnmatchcase(name, pattern) for name in its_names for pattern in reserve
        )
        _check_parameter(its_names[0], parameter, trainable, owners)
        infos.append(
            ParameterInfo(
                parameter=parameter,
                names=tuple(its_names),
                dtype=_compute_dtype(parameter, its_names, dtype, patterns),
                shape=parameter.shape,
                trainable=trainable,
            )
        )
    return infos


def _hf_keep_fp32(module: nn.Module) -> Iterable[str]:
    """Parts of names that a Hugging Face model class declares as fp32-only."""
    for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        yield from getattr(module, attribute, None) or ()


def _compute_dtype(
    parameter: nn.Parameter, names: Sequence[str], dtype: torch.dtype, keep_fp32: Sequence[str]
) -> torch.dtype:
    if not parameter.dtype.is_floating_point or parameter.dtype.itemsize == 1:
        return parameter.dtype  # quantised weights keep their format
    if any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in keep_fp32):
        return torch.float32
    return dtype


def _check_parameter(name: str, parameter: nn.Parameter, trainable: bool, owners: dict[int, str]) -> None:
    if parameter.device.type == "meta":
        raise ValueError(
            f"parameter {name!r} is on the meta device and has no values; build the model inside `with "
            "offload.deferred_init():`, or give it to OffloadEngine.from_meta or from_pretrained(..., module=model)"
        )
    if trainable and (not parameter.dtype.is_floating_point or parameter.dtype.itemsize == 1):
        raise ValueError(
            f"trainable parameter {name!r} has dtype {parameter.dtype}; trainable parameters are float16, bfloat16, "
            "float32 or float64: convert it, or set requires_grad=False"
        )
    if parameter.numel() == 0:
        return
    address = parameter.untyped_storage().data_ptr()
    other = owners.setdefault(address, name)
    if other != name:
        raise ValueError(
            f"parameters {other!r} and {name!r} are different objects over the same memory; tie them by assigning "
            "the same nn.Parameter to both modules, or clone one of them"
        )


def partition(
    module: nn.Module,
    parameters: Sequence[ParameterInfo],
    max_unit_numel: int | None = None,
    chosen: Sequence[str | type[nn.Module]] = (),
) -> Partition:
    """Cut `module` into units: each element of a module list, each embedding, head and other direct child.

    A module is a unit if it is called as a whole; a module that holds a list of blocks (a trunk), the root, and
    containers are descended into, and what parameters such a module holds itself make one unit read on touch.
    A block of more than `max_unit_numel` elements is descended into like a trunk.

    Args:
        chosen: classes and patterns of names (`fnmatch`) of modules that are units, the outermost where they lie inside
            each other. They are never cut, and what holds them is descended into.

    Raises: ValueError for an entry of `chosen` that no module fits, or only lists, which nobody calls.
    """
    chosen_modules = _choose(module, chosen)
    owner: dict[nn.Parameter, ParameterInfo] = {info.parameter: info for info in parameters}
    units: list[Unit] = []
    unit_of: dict[nn.Parameter, Unit] = {}
    sites: list[tuple[str, nn.Module]] = []

    def add_unit(name: str, members: Iterable[nn.Parameter]) -> None:
        fresh = [owner[p] for p in dict.fromkeys(members) if p not in unit_of]
        if fresh:
            unit = Unit(len(units), name, tuple(fresh))
            units.append(unit)
            unit_of.update({info.parameter: unit for info in fresh})

    def visit(name: str, child: nn.Module, is_block: bool) -> None:
        if next(child.parameters(), None) is None:
            return
        too_big = max_unit_numel is not None and sum(p.numel() for p in child.parameters()) > max_unit_numel
        has_children = next(child.children(), None) is not None
        whole = child is not module and not isinstance(child, _LISTS)
        is_road = too_big or _holds(child, chosen_modules) or (not is_block and _is_trunk(child))
        if id(child) in chosen_modules or (whole and (not has_children or not is_road)):
            add_unit(name, child.parameters())
            sites.append((name, child))
            return
        add_unit(name or "(root)", child.parameters(recurse=False))
        in_list = isinstance(child, (nn.ModuleList, nn.Sequential))
        for child_name, grandchild in child.named_children():
            visit(f"{name}.{child_name}" if name else child_name, grandchild, in_list)

    if next(module.children(), None) is None:
        add_unit("(root)", module.parameters())
        sites.append(("", module))
    else:
        visit("", module, False)
    return Partition(
        tuple(units),
        tuple(CallSite(name, site, _units_below(site, unit_of)) for name, site in _unique(sites)),
    )


_LISTS = (nn.ModuleList, nn.ModuleDict)


def _choose(module: nn.Module, chosen: Sequence[str | type[nn.Module]]) -> set[int]:
    """Identities of the modules below `module` that an entry fits."""
    found: set[int] = set()
    for entry in chosen:
        fits = [(name, part) for name, part in module.named_modules() if name and _fits(name, part, entry)]
        called = [id(part) for _, part in fits if not isinstance(part, _LISTS)]
        if not called:
            what = f"pattern {entry!r}" if isinstance(entry, str) else f"class {entry.__name__}"
            example, part = next(((n, p) for n, p in module.named_modules() if n), ("", module))
            mend = f"names look like {example!r}, classes like {type(part).__name__}"
            if fits:
                mend = f"{fits[0][0]!r} is a list, which nobody calls: give {fits[0][0] + '.*'!r}"
            raise ValueError(f"OffloadConfig(units=...): the {what} fits no module that can be a unit; {mend}")
        found.update(called)
    return found


def _fits(name: str, part: nn.Module, entry: str | type[nn.Module]) -> bool:
    return fnmatch.fnmatchcase(name, entry) if isinstance(entry, str) else isinstance(part, entry)


def _holds(module: nn.Module, chosen_modules: set[int]) -> bool:
    return any(id(part) in chosen_modules for part in module.modules() if part is not module)


def _is_trunk(module: nn.Module) -> bool:
    """Whether `module` holds a list of blocks, so that it is a road rather than a stop."""
    return any(
        isinstance(part, (nn.ModuleList, nn.Sequential)) and _has_composite_children(part) for part in module.modules()
    )


def _has_composite_children(container: nn.Module) -> bool:
    children = [child for child in container.children() if next(child.parameters(), None) is not None]
    return len(children) > 1 and any(next(child.children(), None) is not None for child in children)


def _units_below(module: nn.Module, unit_of: dict[nn.Parameter, Unit]) -> tuple[Unit, ...]:
    found = dict.fromkeys(unit_of[parameter] for parameter in module.parameters())
    return tuple(sorted(found, key=lambda unit: unit.index))


def _unique(sites: Sequence[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Module]]:
    """Each module once, under its first name: a shared module is one call site."""
    seen: set[int] = set()
    for name, module in sites:
        if id(module) not in seen:
            seen.add(id(module))
            yield name, module
