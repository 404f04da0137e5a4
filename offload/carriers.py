"""Lists, dicts and objects through which a call takes and leaves tensors: key/value caches, lists to be filled.

Such a carrier is changed in place, by whoever has it. While a call computes, its carriers hold the call's own detached
inputs instead of the caller's tensors; afterwards they hold what autograd knows. For the recomputation in backward each
call keeps a copy of its carriers as it found them, with marks in the place of tensors: carriers of the caller are not
touched then, and nothing refers from the graph to a carrier that refers to the graph.
"""

from __future__ import annotations

import contextlib
import operator
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .ambient import collecting, collector
from .tree import refuse_hidden_gradient

_DICTS = (dict, OrderedDict, defaultdict)
_INTERNAL = frozenset(vars(nn.Module()))
_COLLECTOR = "collector"


@dataclass(frozen=True, slots=True)
class Mark:
    """Stands for the `index`-th of a list of tensors. Without a `__dict__`, it is no carrier itself."""

    index: int


def is_carrier(value: Any) -> bool:
    """Whether `value` is a list, a dict, or an object whose class leaves making and copying to `object`."""
    kind = type(value)
    if kind is list or kind in _DICTS:
        return True
    return (
        kind.__new__ is object.__new__
        and kind.__reduce_ex__ is object.__reduce_ex__
        and hasattr(value, "__dict__")
        and not isinstance(value, (Tensor, nn.Module, type))
    )


def substitute(value: Any, swap: Callable[[Any], Any]) -> Any:
    """`value` with `swap` applied to it or, where it is a tuple, to everything in it."""
    if not isinstance(value, tuple):
        return swap(value)
    items = [substitute(item, swap) for item in value]
    if all(new is old for new, old in zip(items, value, strict=True)):
        return value
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


class Carriers:
    """The carriers of one call, each reached from a root.

    Args:
        roots: carriers, and tuples of them, by where they were found: the number of an argument, a module's attribute,
            or the collector of outputs that surrounds the call.
    """

    def __init__(self, roots: Mapping[Hashable, Any]) -> None:
        self.roots = dict(roots)

    @classmethod
    def of_call(cls, leaves: Iterable[Any], module: nn.Module) -> Carriers:
        """What a call of `module` with these arguments can reach."""
        roots: dict[Hashable, Any] = {n: leaf for n, leaf in enumerate(leaves) if is_carrier(leaf)}
        roots.update(cls.of_attributes(module).roots)
        outputs = collector()
        if outputs:
            roots[_COLLECTOR] = outputs
        return cls(roots)

    @classmethod
    def of_attributes(cls, module: nn.Module) -> Carriers:
        """The lists and dicts that `module` and its parts have as attributes."""
        return cls(
            {
                (part, name): value
                for part in module.modules()
                for name, value in vars(part).items()
                if (type(value) is list or type(value) in _DICTS) and name not in _INTERNAL
            }
        )

    def walk(self) -> Iterator[Any]:
        """Every carrier that the roots reach, each once, in an order that depends on their structure only."""
        seen: set[int] = set()
        waiting = [self.roots.values()]
        while waiting:
            found: list[Any] = []
            for values in waiting:
                for value in values:
                    if isinstance(value, tuple):
                        found.append(value)
                    elif is_carrier(value) and id(value) not in seen:
                        seen.add(id(value))
                        yield value
                        found.append(_values(value))
            waiting = found

    def tensors(self, where: str) -> list[Tensor]:
        """The tensors in carriers, in the order of `walk`.

        Raises: TypeError for one that needs a gradient in something that is no carrier; `where` says whose it is.
        """
        found: list[Tensor] = []

        def note(value: Any) -> Any:
            if isinstance(value, Tensor):
                found.append(value)
            elif not is_carrier(value):
                refuse_hidden_gradient(value, where)
            return value

        for carrier in self.walk():
            for value in _values(carrier):
                substitute(value, note)
        return found

    def copy(self, swap: Callable[[Any], Any]) -> Carriers:
        """The same structure made of new carriers, with `swap` applied to what is none."""
        made: dict[int, Any] = {}

        def twin(value: Any) -> Any:
            if not is_carrier(value):
                return swap(value)
            if id(value) not in made:
                if isinstance(value, defaultdict):
                    copied: Any = defaultdict(value.default_factory)
                elif isinstance(value, (list, dict)):
                    copied = type(value)()
                else:
                    copied = object.__new__(type(value))
                made[id(value)] = copied
                _fill(copied, _contents(value, lambda item: substitute(item, twin)))
            return made[id(value)]

        return Carriers({key: substitute(root, twin) for key, root in self.roots.items()})

    def save(self, swap: Callable[[Any], Any]) -> Saved:
        """The contents of all carriers, with `swap` applied."""
        return Saved([(c, _contents(c, lambda item: substitute(item, swap))) for c in self.walk()])

    @contextlib.contextmanager
    def installed(self, module: nn.Module) -> Iterator[None]:
        """Inside, these are what a call of `module` reaches; afterwards its attributes are what they were."""
        before = [(part, dict(vars(part))) for part in module.modules()]
        try:
            for key, root in self.roots.items():
                if isinstance(key, tuple):
                    part, name = key
                    part.__dict__[name] = root
            with collecting(self.roots.get(_COLLECTOR)):
                yield
        finally:
            for part, attributes in before:
                now = vars(part)
                for name in now.keys() - attributes.keys():
                    del now[name]
                for name, value in attributes.items():
                    if now.get(name) is not value:
                        now[name] = value


class Saved:
    """Carriers, each with what it held at one moment."""

    def __init__(self, contents: Sequence[tuple[Any, Any]] = ()) -> None:
        self._contents = contents

    def is_as_it_was(self) -> bool:
        """Whether every carrier still holds the same tensors, and the same carriers."""
        return all(
            len(now := _tensors_and_more(_values(carrier))) == len(then := _tensors_and_more(_values(contents)))
            and all(map(operator.is_, now, then))
            for carrier, contents in self._contents
        )

    def restore(self, swap: Callable[[Any], Any]) -> None:
        """Give every carrier its contents again, with `swap` applied."""
        for carrier, contents in self._contents:
            _fill(carrier, _contents(contents, lambda item: substitute(item, swap)))


def _contents(carrier: Any, swap: Callable[[Any], Any]) -> Any:
    """A list or dict of its own with what is in the carrier."""
    if isinstance(carrier, list):
        return [swap(item) for item in carrier]
    items = carrier if isinstance(carrier, dict) else vars(carrier)
    return {key: swap(item) for key, item in items.items()}


def _tensors_and_more(values: Iterable[Any]) -> list[Any]:
    """Those of `values` that are tensors or may hold some; numbers and names are left out."""
    return [value for value in values if isinstance(value, (Tensor, tuple)) or is_carrier(value)]


def _values(carrier: Any) -> list[Any]:
    if isinstance(carrier, list):
        return list(carrier)
    return list((carrier if isinstance(carrier, dict) else vars(carrier)).values())


def _fill(carrier: Any, contents: Any) -> None:
    if isinstance(carrier, list):
        carrier[:] = contents
        return
    target = carrier if isinstance(carrier, dict) else vars(carrier)
    if list(target) == list(contents):
        target.update(contents)
        return
    target.clear()
    target.update(contents)
