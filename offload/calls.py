"""A call of a unit: parameters there, compute, parameters gone; in backward the same again, with recomputation.

[Note: one autograd node per call] To autograd a call is one node. Its forward computes with gradients enabled on
detached inputs and drops the graph; its backward brings the unit back, computes again and runs a backward of its own
inside. Where there is memory for what the graph saves, it is kept instead (`activations.py`). Either way a unit is on
the device exactly from the first to the last line of one Python function: no hook decides when to let go, nothing that
autograd saved outlives the slot, and a parameter's gradients arrive call by call. As in reentrant checkpointing, every
tensor that needs a gradient must enter and leave as an argument, a result or a module attribute, or in something that
these lead to (`carriers.py`).
Source: activation recomputation, Chen et al., arXiv:1604.06174.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .activations import ActivationBudget, SavedTensors, used_outside
from .ambient import Autocast, RandomState, in_functional_transform, replayed
from .carriers import Carriers, Mark, Saved, is_carrier
from .scheduler.devices import Device
from .staged import Staged
from .tree import Rebuild, flatten, tensors_of, with_tensors
from .turns import Turn
from .units import CallSite
from .untraced import untraced


class CallHost(Protocol):
    """What a call asks of the engine."""

    device: Device
    activations: ActivationBudget

    @property
    def recomputing(self) -> int:
        """How many backwards of units the calling thread is inside of."""

    def before_call(self, site: CallSite) -> None:
        """A call of `site` is about to be made. Where micro-batches take turns, others may have theirs first."""

    def hold(self, site: CallSite, recompute: bool = False) -> contextlib.AbstractContextManager[Sequence[Staged]]:
        """Inside, the site's units are on the device and their parameters show their values."""

    def num_updates(self, site: CallSite) -> tuple[int, ...]:
        """How many updates each of the site's units has had."""

    def forward_made(self, site: CallSite) -> Turn:
        """A call that backward may visit was made. Returns whose turn it is."""

    def forward_dropped(self, site: CallSite, turn: Turn) -> None:
        """Such a call will not be visited: its graph is gone."""

    def results_stashed(self, attributes: Sequence[tuple[nn.Module, str]]) -> None:
        """A call has left tensors with a graph in these module attributes."""

    def backward_begins(self, site: CallSite, turn: Turn) -> None:
        """Backward has reached a call of `site`, made in `turn`."""

    def backward_ended(self, site: CallSite, turn: Turn, first_visit: bool) -> None:
        """All gradients of the call have been accumulated."""

    def boundary_held(self, nbytes: int) -> None:
        """`nbytes` more (or, negative, fewer) of unit inputs are kept for backward."""

    def temporaries_seen(self, site: CallSite, nbytes: int) -> None:
        """Autograd saved `nbytes` of tensors, beside parameters, inside one call of `site`."""


class UnitForward:
    """Stands in for a call site's `forward`."""

    def __init__(self, site: CallSite, host: CallHost) -> None:
        self.site = site
        self.host = host
        self.original: Callable[..., Any] = site.module.forward
        self.own = {id(p) for p in site.module.parameters()}
        self.__wrapped__ = self.original  # for `inspect.signature`
        self.parameters = tuple(site.module.parameters())
        self.measured = False
        self._mutable_buffers: set[str] | None = None
        self._anchor = torch.zeros((), requires_grad=True)
        # Kept: a leaf's node lives no longer than somebody has it.
        self.anchor_node = torch.autograd.graph.get_gradient_edge(self._anchor).node

    @property
    def trainable(self) -> bool:
        """Whether a parameter needs a gradient just now."""
        return any(parameter.requires_grad for parameter in self.parameters)

    @untraced
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if in_functional_transform():
            raise RuntimeError(
                f"unit {self.site.name!r} was called inside a torch.func transform (vmap, grad, jacrev, ...), which "
                "cannot look into the engine; take gradients with engine.backward(loss) or torch.autograd.grad, or "
                "transform a module of your own with engine.state_dict() loaded into it"
            )
        self.host.before_call(self.site)
        if not torch.is_grad_enabled():
            return self._without_graph(args, kwargs)
        where = f"the call of {self.site.name!r}"
        leaves, rebuild = flatten((args, tuple(kwargs.values())), where, is_carrier)
        carriers = Carriers.of_call(leaves, self.site.module)
        carried = [tensor for tensor in carriers.tensors(where) if id(tensor) not in self.own and not _is_spent(tensor)]
        if not self.trainable and not any(tensor.requires_grad for tensor in [*tensors_of(leaves), *carried]):
            return self._without_graph(args, kwargs)
        inputs = list({id(tensor): tensor for tensor in [*tensors_of(leaves), *carried]}.values())
        call = Call(self, leaves, tuple(kwargs), rebuild, carriers, inputs)
        try:
            results = UnitCall.apply(call, self._anchor, *inputs)
        except BaseException:
            call.leave_carriers(call.before, inputs)
            raise
        return call.deliver(list(results), inputs)

    def _without_graph(self, args: Any, kwargs: Any) -> Any:
        with self.host.hold(self.site), torch.no_grad():
            result = self.original(*args, **kwargs)
            return detach_from_parameters(result, self.site)

    def buffers_before(self) -> dict[str, Tensor]:
        """Copies of the buffers that a forward may change, for the recomputation (BatchNorm's statistics do)."""
        if not self.site.module.training:
            return {}
        return {
            name: buffer.detach().clone()
            for name, buffer in self.site.module.named_buffers()
            if self._mutable_buffers is None or name in self._mutable_buffers
        }

    def changed_buffers(self, before: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those of `before` whose buffer holds something else now.

        Values are compared, because batch norm writes its statistics without a trace in the version. That makes an
        accelerator wait for the host, so there only the first call looks at all buffers.
        """
        now = dict(self.site.module.named_buffers())
        changed = {n: b for n, b in before.items() if n in now and not torch.equal(b, now[n])}
        if self.host.device.torch_device.type != "cpu":
            self._mutable_buffers = set(changed) | (self._mutable_buffers or set())
        return changed


class Call:
    """One call with a graph: what its recomputation needs.

    Args:
        leaves: those of the positional arguments and of the values of the named ones, `keywords`; carriers are leaves.
        inputs: the tensors among the leaves and in the carriers, each once: modules ask whether two are one object.
    """

    def __init__(
        self,
        forward: UnitForward,
        leaves: list[Any],
        keywords: tuple[str, ...],
        rebuild: Rebuild,
        carriers: Carriers,
        inputs: Sequence[Tensor],
    ) -> None:
        self.forward = forward
        self.kept: Kept | None = None  # first: what follows may raise, and `__del__` runs all the same
        self._recomputing = False
        self.visited = True  # until the engine has been told of the call: a failure before that owes it nothing
        self.boundary_nbytes = 0
        self.turn = Turn(0, None)
        mark = _without_spent(_marking(inputs))  # tensors are kept by autograd, which checks versions
        self.leaves = [None if n in carriers.roots else mark(leaf) for n, leaf in enumerate(leaves)]
        self.keywords = keywords
        self.carriers = carriers.copy(mark)
        # The caller's own carriers, with what they held before the call and hold after it, until that is delivered.
        self._live: Carriers | None = carriers
        self.before, self._after = carriers.save(mark), Saved()
        self.num_passed = len({id(tensor) for tensor in tensors_of(leaves)})
        self.foreign = torch._C._current_graph_task_id() != -1 and not forward.host.recomputing
        self.rebuild = rebuild
        self.random = RandomState.capture(forward.host.device)
        self.autocast = Autocast.capture(forward.host.device)
        self.buffers: dict[str, Tensor] = {}
        self.stashed: list[tuple[nn.Module, str]] = []
        self.samples: list[Tensor] = []
        self.num_updates = forward.host.num_updates(forward.site)
        self.frozen = [parameter for parameter in forward.parameters if not parameter.requires_grad]
        self._result_leaves: list[Any] = []
        self._result_rebuild: Rebuild | None = None
        self.turn = forward.host.forward_made(forward.site)
        self.visited = False

    def __del__(self) -> None:
        self.drop_graph()
        self.forward.host.boundary_held(-self.boundary_nbytes)
        if not self.visited:
            self.forward.host.forward_dropped(self.forward.site, self.turn)

    def keep_graph(self, saved: SavedTensors, inputs: list[Tensor], results: list[Tensor]) -> None:
        """Keep the graph from `inputs` to `results` for backward, if there is memory for what it saves."""
        self.forward.host.temporaries_seen(self.forward.site, saved.nbytes)
        if self.forward.host.activations.keep(self.forward.site, saved.nbytes):
            self.kept = Kept(saved, inputs, results)

    def drop_graph(self) -> None:
        kept, self.kept = self.kept, None
        if kept is not None:
            self.forward.host.activations.let_go(kept.saved.nbytes)

    def compute(self, inputs: Sequence[Tensor], carriers: Carriers) -> tuple[list[Any], Rebuild, list[Tensor]]:
        """Run the module with gradients on. Returns result leaves, their rebuild, and tensors that it left elsewhere.

        Args:
            carriers: what the call reaches, with `inputs` in it.
        """
        unmark = _unmarking(inputs)
        leaves = [carriers.roots[n] if n in carriers.roots else unmark(leaf) for n, leaf in enumerate(self.leaves)]
        args, named = self.rebuild(leaves)
        with torch.enable_grad(), self.autocast.applied():
            result = self.forward.original(*args, **dict(zip(self.keywords, named, strict=True)))
        self._refuse_changed_containers(leaves, args, named)
        known = {id(carrier) for carrier in carriers.walk()}
        where = f"the result of {self.forward.site.name!r}"
        # Lists and dicts that the module has made are copied as results; what the caller has keeps its identity.
        result_leaves, rebuild = flatten(
            result, where, lambda node: id(node) in known or (is_carrier(node) and not isinstance(node, (list, dict)))
        )
        return result_leaves, rebuild, self._find_left(inputs, leaves, result_leaves)

    def _refuse_changed_containers(self, leaves: list[Any], args: Any, named: Any) -> None:
        """Containers that are no carriers were copied for the module: what it put into them would be lost."""
        where = f"the call of {self.forward.site.name!r}"
        after, _ = flatten((args, named), where, is_carrier)
        if len(after) != len(leaves) or any(new is not old for new, old in zip(after, leaves, strict=True)):
            raise RuntimeError(
                f"{where} changed a container of class that was passed to it, and the change would be lost; "
                "return what was added, or leave it in a list, a dict or an attribute of the module"
            )

    def _find_left(self, inputs: Sequence[Tensor], leaves: list[Any], result_leaves: list[Any]) -> list[Tensor]:
        """Tensors with a graph that the module left in its attributes (an auxiliary loss) and in carriers (a key/value
        cache): results like any other."""
        module = self.forward.site.module
        known = {id(tensor) for tensor in [*inputs, *tensors_of(result_leaves)]}
        self.stashed = [
            (part, name)
            for part in module.modules()
            for name, value in vars(part).items()
            if isinstance(value, Tensor) and value.grad_fn is not None and id(value) not in known
        ]
        left = {id(tensor): tensor for part, name in self.stashed for tensor in [vars(part)[name]]}
        held = _parameter_storages(self.forward.site)
        carriers = Carriers.of_call([*leaves, *result_leaves], module)
        for tensor in carriers.tensors(f"the call of {self.forward.site.name!r}"):
            is_own = id(tensor) in known or id(tensor) in self.forward.own
            in_slot = tensor.numel() > 0 and tensor.untyped_storage().data_ptr() in held
            if not is_own and (tensor.grad_fn is not None or in_slot):
                left[id(tensor)] = tensor
        results = tensors_of(result_leaves)
        self._after = carriers.save(_marking([*inputs, *results, *left.values()]))
        return list(left.values())

    def enter_carriers(self, inputs: Sequence[Tensor]) -> Carriers:
        """The caller's carriers, with the call's `inputs` in them."""
        assert self._live is not None
        self.before.restore(_unmarking(inputs))
        return self._live

    def leave_carriers(self, saved: Saved, tensors: Sequence[Tensor]) -> None:
        """The caller's carriers with `tensors` in them. From here on nothing in the graph may refer to a carrier, which
        refers to the graph."""
        saved.restore(_unmarking(tensors))
        self._live, self.before, self._after = None, Saved(), Saved()

    def keep_result(self, leaves: list[Any], rebuild: Rebuild) -> None:
        self._result_leaves = with_tensors(leaves, [_HERE] * len(leaves))
        self._is_result_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        self._result_rebuild = rebuild

    def deliver(self, tensors: list[Tensor], inputs: Sequence[Tensor]) -> Any:
        """The module's result, made of the tensors that autograd knows, and those in the caller's carriers."""
        count = sum(self._is_result_tensor)
        for (module, name), tensor in zip(self.stashed, tensors[count:], strict=False):
            setattr(module, name, tensor)
        self.leave_carriers(self._after, [*inputs, *tensors])
        if self.stashed:
            self.forward.host.results_stashed(self.stashed)
        fresh = iter(tensors[:count])
        leaves = [
            next(fresh) if is_tensor else leaf
            for leaf, is_tensor in zip(self._result_leaves, self._is_result_tensor, strict=True)
        ]
        assert self._result_rebuild is not None
        result = self._result_rebuild(leaves)
        self._result_leaves, self._result_rebuild = [], None
        return result

    def compare(self, results: list[Tensor]) -> None:
        """Raises: RuntimeError if the recomputation gave other numbers than the forward (a few are compared)."""
        same = len(results) == len(self.samples) and all(
            sample.shape == (again := _sample(result)).shape
            and torch.allclose(sample, again, rtol=0.02, atol=1e-3 * _magnitude(sample), equal_nan=True)
            for sample, result in zip(self.samples, results, strict=True)
        )
        if not same:
            raise RuntimeError(
                f"{self.forward.site.name!r} computed something else when its forward ran again in backward, so its "
                "gradients would be wrong; it probably keeps state between calls (a key/value cache, a counter): "
                "switch that off for training, e.g. use_cache=False"
            )

    def backward_kept(self, gradients: Sequence[Tensor | None], accumulate: bool) -> list[Tensor]:
        """Backward through the kept graph, which is gone afterwards. Returns the inputs with their gradients."""
        assert self.kept is not None
        saved, inputs, results = self.kept
        with self.forward.host.hold(self.forward.site, recompute=True) as staged, saved.within(staged):
            try:
                _backward(results, gradients, inputs, accumulate)
            finally:
                self.drop_graph()
        return inputs

    def backward_recomputed(
        self, tensors: Sequence[Tensor], gradients: Sequence[Tensor | None], accumulate: bool
    ) -> list[Tensor]:
        """Compute again from `tensors`, then backward. Returns the inputs with their gradients."""
        host = self.forward.host
        if self._recomputing:
            raise RuntimeError(
                f"backward through unit {self.forward.site.name!r} came back to the same call: a tensor with a graph "
                "was put into an attribute of the unit before the call, where it is taken for what the unit left; pass "
                "it as an argument, or in a list or dict (torch.nn.utils.parametrizations for weight_norm and the like)"
            )
        self._recomputing = True
        with host.hold(self.forward.site, recompute=True), replayed(self.random, host.device), self.buffers_as_before():
            inputs = [_as_input(tensor) for tensor in tensors]
            carriers = self.carriers.copy(_unmarking(inputs))
            frozen = frozen_as_before(self.frozen)
            with _measured(self.forward), carriers.installed(self.forward.site.module), frozen:
                leaves, _, left = self.compute(inputs, carriers)
            results = tensors_of(leaves) + left
            self._after = Saved()
            del leaves, left, carriers
            self.compare(results)
            _backward(results, gradients, inputs, accumulate)
        self._recomputing = False
        return inputs

    @contextlib.contextmanager
    def buffers_as_before(self) -> Iterator[None]:
        """Inside, buffers that forward changed have the values it started from; afterwards, those they had."""
        slots = [
            (owner._buffers, key, buffer, buffer.detach().clone(), self.buffers[name])
            for name, owner, key, buffer in named_buffer_slots(self.forward.site.module)
            if name in self.buffers
        ]
        stashed = [(module, name, vars(module)[name]) for module, name in self.stashed]
        try:
            with torch.no_grad():
                for _, _, buffer, _, before in slots:
                    buffer.copy_(before)
            yield
        finally:
            with torch.no_grad():
                for buffers, key, buffer, now, _ in slots:
                    buffers[key] = buffer  # a forward may bind a new tensor instead of writing to the old one
                    buffer.copy_(now)
            for module, name, tensor in stashed:
                setattr(module, name, tensor)


def named_buffer_slots(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """(full name, owner, its own name, buffer) for every buffer below `module`, named as `named_buffers` does."""
    for prefix, owner in module.named_modules():
        for key, buffer in owner._buffers.items():
            if buffer is not None:
                yield f"{prefix}.{key}" if prefix else key, owner, key, buffer


_HERE = object()


class UnitCall(torch.autograd.Function):
    """The node. See [Note: one autograd node per call]."""

    @staticmethod
    def forward(ctx: Any, call: Call, anchor: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        forward = call.forward
        host, site = forward.host, forward.site
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        versions = [tensor._version for tensor in tensors]
        call.buffers = forward.buffers_before()
        keep = host.activations.may_keep(site)
        with host.hold(site) as staged:
            inputs = [_as_input(tensor) for tensor in tensors]
            saved = SavedTensors(site, staged, inputs)
            with _explained(site), saved.collected() if keep else _of_no_concern_outside(site):
                leaves, rebuild, left = call.compute(inputs, call.enter_carriers(inputs))
            results = tensors_of(leaves) + left
            needs = [result.requires_grad for result in results]
            if keep and any(needs):
                call.keep_graph(saved, inputs, results)
            held = _parameter_storages(site)
            results = [
                result.detach().clone() if call.kept is not None and saved.holds_storage(result)
                else _as_result(result, held, tensors)
                for result in results
            ]  # fmt: skip
        if any(tensor._version != version for tensor, version in zip(tensors, versions, strict=True)):
            raise RuntimeError(
                f"{site.name!r} changed one of its inputs in place, so its backward could not compute the same again; "
                "make the module write to a new tensor, or clone the input before the call"
            )
        call.buffers = forward.changed_buffers(call.buffers)
        call.samples = [_sample(result) for result in results]
        call.keep_result(leaves, rebuild)
        # Of what lies in carriers, each tensor is counted by the call that has left it there.
        counted = [*tensors[: call.num_passed], *results[len(results) - len(left) :]]
        call.boundary_nbytes = sum(tensor.nbytes for tensor in counted)
        host.boundary_held(call.boundary_nbytes)
        ctx.mark_non_differentiable(*(r for r, need in zip(results, needs, strict=True) if not need))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        forward = call.forward
        host, site = forward.host, forward.site
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"a backward with create_graph=True reached unit {site.name!r}; the engine gives no gradients of "
                "gradients, because what it computes in backward is gone with the unit: leave create_graph out, or "
                "compute penalties on gradients in a model that is not wrapped"
            )
        if call.foreign:
            raise RuntimeError(
                f"unit {site.name!r} was called inside torch.utils.checkpoint(use_reentrant=True); the "
                "engine recomputes by itself: switch gradient checkpointing off, or give use_reentrant=False"
            )
        if call.num_updates != host.num_updates(site):
            raise RuntimeError(
                f"backward through unit {site.name!r}, whose values were changed since this forward by step(), "
                "load_state_dict() or gather(write=True), so the gradients would be of neither; make every backward "
                "before that, or run forward again"
            )
        tensors = ctx.saved_tensors
        # torch.autograd.grad and backward(inputs=...) want gradients of their inputs and none of anything else.
        accumulate: bool = torch._C._will_engine_execute_node(forward.anchor_node)
        if accumulate:
            host.backward_begins(site, call.turn)
        inputs: list[Tensor] = []
        if any(gradient is not None for gradient in gradients):
            if call.kept is not None:
                inputs = call.backward_kept(gradients, accumulate)
            else:
                inputs = call.backward_recomputed(tensors, gradients, accumulate)
        if accumulate:
            first_visit, call.visited = not call.visited, True
            host.backward_ended(site, call.turn, first_visit)
        return None, None, *(tensor.grad for tensor in inputs or [torch.empty(0)] * len(tensors))


class Kept(NamedTuple):
    """A graph that was kept: what it saves, and its leaves and ends."""

    saved: SavedTensors
    inputs: list[Tensor]
    results: list[Tensor]


def _backward(
    results: Sequence[Tensor], gradients: Sequence[Tensor | None], inputs: Sequence[Tensor], accumulate: bool
) -> None:
    """Leave the gradients of `inputs` in them, and with `accumulate` those of parameters where autograd puts them."""
    pairs = [(r, g) for r, g in zip(results, gradients, strict=True) if g is not None and r.requires_grad]
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    if not pairs:
        return
    ends, given = [result for result, _ in pairs], [gradient for _, gradient in pairs]
    if accumulate:
        torch.autograd.backward(ends, given)
    elif wanted:
        for tensor, gradient in zip(wanted, torch.autograd.grad(ends, wanted, given, allow_unused=True), strict=True):
            tensor.grad = gradient


@contextlib.contextmanager
def frozen_as_before(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, none of `parameters` needs a gradient, as when forward ran: torch's graph would know nothing of them."""
    since = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in since:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in since:
            parameter.requires_grad_(True)


def _is_spent(tensor: Tensor) -> bool:
    """Whether a call left the tensor somewhere and has had its backward: there is no graph to go on from any more."""
    call = getattr(tensor.grad_fn, "call", None)
    return isinstance(call, Call) and call.visited


def _without_spent(mark: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`mark`, and values in the place of spent tensors: what a unit leaves in a list of its own would otherwise tie
    each call's graph to the one before."""

    def swap(value: Any) -> Any:
        marked = mark(value)
        return marked.detach() if isinstance(marked, Tensor) and _is_spent(marked) else marked

    return swap


def _marking(tensors: Sequence[Tensor]) -> Callable[[Any], Any]:
    """Replaces each of `tensors` by its mark."""
    place = {id(tensor): n for n, tensor in enumerate(tensors)}
    return lambda value: Mark(place[id(value)]) if isinstance(value, Tensor) and id(value) in place else value


def _unmarking(tensors: Sequence[Tensor]) -> Callable[[Any], Any]:
    """Replaces marks by their tensors."""
    return lambda value: tensors[value.index] if isinstance(value, Mark) else value


def _as_input(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _sample(result: Tensor) -> Tensor:
    """A few numbers of a result on the CPU; none where looking would make the host wait for a device."""
    flat = result.detach()
    if flat.device.type != "cpu" or not flat.numel() or not flat.dtype.is_floating_point:
        return torch.empty(0)
    index = torch.linspace(0, flat.numel() - 1, min(16, flat.numel()), dtype=torch.float64).long()
    return flat.reshape(-1)[index].float()


def _magnitude(sample: Tensor) -> float:
    finite = sample[sample.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _parameter_storages(site: CallSite) -> set[int]:
    return {p.untyped_storage().data_ptr() for p in site.module.parameters() if p.numel()}


def _as_result(result: Tensor, held: set[int], inputs: Sequence[Tensor]) -> Tensor:
    """`result` as a tensor of its own: neither a view of the graph inside, nor an alias of a slot or of an input."""
    if result.numel() == 0:
        return result.detach().clone()
    address = result.untyped_storage().data_ptr()
    if address in held or any(tensor.untyped_storage().data_ptr() == address for tensor in inputs):
        return result.detach().clone()
    return result.data  # unlike detach(), no view: the caller may change it in place, as it may a module's result


def detach_from_parameters(value: Any, site: CallSite) -> Any:
    """`value` with every tensor that aliases one of the site's parameters cloned: the slot will be reused."""
    leaves, rebuild = flatten(value, f"the result of {site.name!r}")
    held = _parameter_storages(site)
    tensors = tensors_of(leaves)
    aliases = [t.numel() > 0 and t.untyped_storage().data_ptr() in held for t in tensors]
    if not any(aliases):
        return value
    return rebuild(with_tensors(leaves, [t.clone() if a else t for t, a in zip(tensors, aliases, strict=True)]))


@contextlib.contextmanager
def _explained(site: CallSite) -> Iterator[None]:
    """Add to autograd's complaint about in-place changes of a leaf which unit it is about."""
    try:
        yield
    except RuntimeError as error:
        if "in-place" in str(error):
            error.add_note(
                f"raised inside unit {site.name!r}, whose inputs must stay as they are for the recomputation in "
                "backward; make the module write to a new tensor, or clone the input first"
            )
        raise


@contextlib.contextmanager
def _of_no_concern_outside(site: CallSite) -> Iterator[None]:
    """What a graph that is thrown away saves goes to nobody. A checkpoint of the user around several calls counts what
    is saved in it, and must count the same when it computes again, whether a call keeps its graph or not.

    Who got hold of a tensor of that graph (a hook of the user on an inner module) cannot go backward through it: the
    parameters that it saved are others by then.
    """
    is_over = False

    def unpack(tensor: Tensor) -> Tensor:
        if is_over:
            raise RuntimeError(used_outside(site))
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(Tensor.detach, unpack):
            yield
    finally:
        is_over = True


@contextlib.contextmanager
def _measured(forward: UnitForward) -> Iterator[None]:
    """At the first recomputation of a site, count the bytes that autograd saves inside it."""
    if forward.measured:
        yield
        return
    forward.measured = True
    held = _parameter_storages(forward.site)
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # not the tensor itself: a saved result would then keep its own graph alive for ever

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
    forward.host.temporaries_seen(forward.site, sum(seen.values()))
