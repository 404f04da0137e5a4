"""The user's gradient hooks on parameters, called as torch calls them: once per backward, with the whole gradient.

Autograd meets a parameter once per call of its unit, so left where they are, hooks would see parts of a sum. The engine
takes them off and calls them on the sum, with the unit's values there, before the gradient leaves the device.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Hooks = dict[int, Callable[[Any], Any]]  # torch's own, of which handles remove entries


class GradientHooks:
    """Keeps what `register_hook` and `register_post_accumulate_grad_hook` were given, before and after wrapping.

    Args:
        micro_batches: backwards per step. With several, hooks behind the accumulation would want to see a sum that lies
            in the engine.
    """

    def __init__(self, micro_batches: int) -> None:
        self._micro_batches = micro_batches
        self._on_gradient: dict[nn.Parameter, Hooks] = {}
        self._on_accumulated: dict[nn.Parameter, Hooks] = {}

    def take_off(self, parameter: nn.Parameter) -> None:
        """The parameter has no hooks and these are ours; handles that the user has stay good."""
        self._on_gradient[parameter] = parameter._backward_hooks or OrderedDict()
        self._on_accumulated[parameter] = parameter._post_accumulate_grad_hooks or OrderedDict()
        parameter._backward_hooks = None
        parameter._post_accumulate_grad_hooks = OrderedDict()

    def shadow(self, parameter: nn.Parameter) -> None:
        """Hooks that are registered from here on are ours as well."""
        self._shadow(parameter, "register_hook", self._on_gradient[parameter])
        self._shadow(parameter, "register_post_accumulate_grad_hook", self._on_accumulated[parameter])

    def _shadow(self, parameter: nn.Parameter, name: str, hooks: Hooks) -> None:
        def register(hook: Callable[[Any], Any]) -> RemovableHandle:
            if not parameter.requires_grad:
                raise RuntimeError(f"{name}() on a parameter that does not require a gradient")
            handle = RemovableHandle(hooks)
            hooks[handle.id] = hook
            return handle

        parameter.__dict__[name] = register

    def put_back(self) -> None:
        for parameter in self._on_gradient:
            for name in ("register_hook", "register_post_accumulate_grad_hook"):
                parameter.__dict__.pop(name, None)
            parameter._backward_hooks = self._on_gradient[parameter] or None
            parameter._post_accumulate_grad_hooks = self._on_accumulated[parameter]
        self._on_gradient, self._on_accumulated = {}, {}

    def on(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Whether one of `parameters` has hooks."""
        return any(self._on_gradient.get(p) or self._on_accumulated.get(p) for p in parameters)

    def call(self, gradients: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        """What the hooks make of one backward's gradients, in the compute dtype. The parameters show their values.

        Raises: what a hook raises; RuntimeError for a result of another shape or dtype, and for hooks behind the
            accumulation where a step has several backwards.
        """
        shaped = {}
        for parameter, gradient in gradients.items():
            for hook in list(self._on_gradient.get(parameter, {}).values()):
                result = hook(gradient)
                if result is not None:
                    _check(gradient, result)
                    gradient = result
            left = self._accumulated(parameter, gradient)
            if left is not None:
                shaped[parameter] = left
        return shaped

    def _accumulated(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor | None:
        """`gradient` as the hooks behind the accumulation leave it in `parameter.grad`."""
        hooks = list(self._on_accumulated.get(parameter, {}).values())
        if not hooks:
            return gradient
        if self._micro_batches > 1:
            raise RuntimeError(
                f"register_post_accumulate_grad_hook with micro_batches={self._micro_batches}: the hook would see one "
                "backward's gradient instead of their sum, which lives in the engine; use register_hook, or look at "
                "the sum inside `with engine.gather(...)` before step()"
            )
        before, parameter.grad = parameter.grad, gradient
        try:
            for hook in hooks:
                hook(parameter)
            left = parameter.grad
        finally:
            parameter.grad = before
        if left is not None:
            _check(gradient, left)
        return left


def _check(gradient: Tensor, result: Any) -> None:
    if not isinstance(result, Tensor) or result.shape != gradient.shape or result.dtype != gradient.dtype:
        what = f"{result.dtype} {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
        raise RuntimeError(
            f"a gradient hook gave {what} for a gradient of {gradient.dtype} {tuple(gradient.shape)}; a hook returns "
            "None or a tensor of the same shape and dtype"
        )
