"""Runs every Triton kernel and compares its bits with the native kernels.

Run as a program in a process of its own: with TRITON_INTERPRET=1, which must be set before Triton is imported, in
Triton's interpreter on CPU tensors; without it on the GPU. Prints one JSON object: how many comparisons were made.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from offload.kernels import dispatch, gradient, loss, master, moments, optimizer, projection
from offload.kernels.rounding import Rounding
from offload.kernels.triton import formats, tuning

sys.path.insert(0, str(Path(__file__).resolve().parent))  # a bare `kernels` may be another project's package
from bits import DTYPES, any_values, assert_same_bits, make_master

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
LENGTHS = (1, 1040, 4099)


def compare(kernel: Callable[..., object], *tensors: Tensor | None) -> int:
    """Both implementations on copies of `tensors`; 1 if every tensor and the result have the same bits."""
    outcomes = []
    for name, device in (("native", "cpu"), ("triton", DEVICE)):
        copies = [None if tensor is None else tensor.clone().to(device) for tensor in tensors]
        with dispatch.use(name):
            value = kernel(*copies)
        outcomes.append(([None if copy is None else copy.cpu() for copy in copies], value))
    for left, right in zip(outcomes[1][0], outcomes[0][0], strict=True):
        assert_same_bits(left, right)
    values = [torch.tensor(value if value is not None else 0.0, dtype=torch.float64) for _, value in outcomes]
    assert_same_bits(values[1], values[0], "result")
    return 1


def check_optimizer() -> int:
    count = 0
    for n, is_split, dtype, decoupled in itertools.product(LENGTHS, (False, True), DTYPES, (False, True)):
        param, low = make_master(n, 0, is_split, n)
        m, v = any_values(n, torch.float32, 1), any_values(n, torch.float32, 2).abs()
        grad = any_values(n, dtype, 3)
        adam = optimizer.AdamScalars(
            lr=1e-3,
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
            weight_decay=0.1,
            step=3,
            decoupled=decoupled,
            maximize=dtype == torch.float32,
        )
        count += compare(lambda *t, s=adam: optimizer.adam_(*t, s, 0.37), param, low, m, v, grad)
        for momentum, first in ((0.0, False), (0.9, False), (0.9, True)):
            sgd = optimizer.SgdScalars(
                lr=0.1,
                momentum=momentum,
                dampening=0.0,
                weight_decay=0.01,
                nesterov=decoupled and momentum > 0,
                first=first,
            )
            count += compare(lambda *t, s=sgd: optimizer.sgd_(*t, s, 0.37), param, low, m if momentum else None, grad)
    return count


def check_moments() -> int:
    count = 0
    scalars = optimizer.AdamScalars(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, step=3, decoupled=True)
    for n, is_split, dtype in itertools.product(LENGTHS, (False, True), DTYPES):
        param, low = make_master(n, 0, is_split, n)
        grad = any_values(n, dtype, 3)
        m, v = any_values(n, torch.bfloat16, 1), any_values(n, torch.bfloat16, 2).abs()
        for seed in (0, 1):  # keys with and without their top bit
            rounding = Rounding(seed=seed, step=n, first_index=2**32 - 500)
            count += compare(lambda *t, r=rounding: moments.adam_bf16_(*t, scalars, r, 0.5), param, low, m, v, grad)
        codes = torch.randint(-127, 128, (n,), dtype=torch.int8)
        squares = torch.randint(0, 256, (n,), dtype=torch.uint8)
        scales = torch.rand(moments.num_scales(n)), torch.rand(moments.num_scales(n)) * 1e-4
        scales[1][0] = 0.0
        for g in (grad, grad.nan_to_num(0.0, 1.0, 1.0).clamp(-1, 1)):
            count += compare(
                lambda *t: moments.adam_8bit_(*t, scalars, 0.5), param, low, codes, scales[0], squares, scales[1], g
            )
    return count


def check_gradient() -> int:
    count = 0
    kernels = (
        gradient.copy_,
        gradient.accumulate_,
        gradient.copy_squared_norm_,
        gradient.accumulate_squared_norm_,
    )
    for n, dst, src in itertools.product(LENGTHS, DTYPES, DTYPES):
        target, source = any_values(n, dst, 1), any_values(n, src, 2)
        for kernel in kernels:
            count += compare(kernel, target, source)
        count += compare(gradient.squared_norm, any_values(n, dst, 1, finite=True))
        count += compare(lambda flat: gradient.scale_(flat, 1 / 3), target)
    return count


def check_projection() -> int:
    count = 0
    for n, is_split, dtype in itertools.product(LENGTHS, (False, True), DTYPES):
        param, low = make_master(n, 0, is_split, n)
        grad = any_values(n, dtype, 3)
        count += compare(lambda *t: projection.project_(*t, 0.3, 1.1), param, low, grad)
        for part in ("weight_grad", "weight_weight", "grad_grad"):
            count += compare(lambda *t, k=part: getattr(projection.projection_sums(*t), k), param, low, grad)
    return count


def check_master() -> int:
    count = 0
    for n in LENGTHS:
        values = any_values(n, torch.float32, n)
        param, low = torch.zeros(n, dtype=torch.bfloat16), torch.zeros(n, dtype=torch.int16)
        count += compare(master.split_, values, param, low)
        master.split_(values, param, low)
        count += compare(master.join_, param, low, torch.zeros(n))
    return count


def check_shapes() -> int:
    """The shapes that tuning may choose: one call of each element-wise kernel."""
    count = 0
    n = LENGTHS[-1]
    adam = optimizer.AdamScalars(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, step=3, decoupled=True)
    sgd = optimizer.SgdScalars(lr=0.1, momentum=0.9, dampening=0.0, weight_decay=0.01, nesterov=True, first=False)
    rounding = Rounding(seed=1, step=2, first_index=2**32 - 500)
    param, low = make_master(n, 0, True, n)
    m, v = any_values(n, torch.float32, 1), any_values(n, torch.float32, 2).abs()
    grad, values = any_values(n, torch.bfloat16, 3), any_values(n, torch.float32, 4)
    for shape in formats.SHAPES[1:]:
        formats.set_shape(shape)
        count += compare(lambda *t: optimizer.adam_(*t, adam, 0.37), param, low, m, v, grad)
        count += compare(lambda *t: optimizer.sgd_(*t, sgd, 0.37), param, low, m, grad)
        count += compare(
            lambda *t: moments.adam_bf16_(*t, adam, rounding, 0.5), param, low, m.bfloat16(), v.bfloat16(), grad
        )
        count += compare(gradient.accumulate_, values, grad)
        count += compare(gradient.copy_, grad, values)
        count += compare(lambda flat: gradient.scale_(flat, 1 / 3), grad)
        count += compare(lambda *t: projection.project_(*t, 0.3, 1.1), param, low, grad)
        count += compare(master.split_, values, param, low)
        count += compare(master.join_, param, low, values)
    formats.set_shape(formats.SHAPES[0])
    return count


def check_tuning() -> int:
    """The fastest shape is kept; a failure keeps the one before."""
    elapsed = 0.0

    def clock(device: torch.device) -> float:
        nonlocal elapsed
        elapsed += 1.0 if formats.current_shape() == formats.SHAPES[2] else 2.0
        return elapsed

    assert tuning.tune(torch.device(DEVICE), 4096, clock) == formats.SHAPES[2] == formats.current_shape()

    def broken(device: torch.device) -> float:
        raise RuntimeError("no clock")

    try:
        tuning.tune(torch.device(DEVICE), 4096, broken)
    except RuntimeError:
        assert formats.current_shape() == formats.SHAPES[2]
    else:
        raise AssertionError("the clock was not asked")
    formats.set_shape(formats.SHAPES[0])
    if not INTERPRETED:
        assert tuning.tune(torch.device(DEVICE)) == formats.current_shape()
    return 1


def check_loss() -> int:
    """Exponentials are not correctly rounded anywhere, so here the distance to float64 is compared."""
    count = 0
    for dtype, vocabulary in itertools.product(DTYPES, (7, 5000)):
        generator = torch.Generator().manual_seed(vocabulary)
        hidden, weight = (torch.randn(rows, 16, generator=generator).to(dtype) for rows in (9, vocabulary))
        target = torch.randint(0, vocabulary, (9,), generator=generator)
        target[3] = -100
        inputs = [tensor.to(DEVICE).requires_grad_(True) for tensor in (hidden, weight)]
        logits = torch.nn.functional.linear(*inputs).detach()  # in the dtype, as both implementations make them
        exact = torch.nn.functional.cross_entropy(logits.double(), target.to(DEVICE)).item()
        results = []
        for name in ("reference", "triton"):
            with dispatch.use(name):
                value = loss.linear_cross_entropy(*inputs, target.to(DEVICE), chunk_tokens=4)
            results.append((value, *torch.autograd.grad(value, inputs)))
        assert abs(results[1][0].item() - exact) <= 4e-6 * abs(exact), (results[1][0], exact)
        for left, right in zip(results[1][1:], results[0][1:], strict=True):
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(left, right, rtol=2 * eps, atol=8 * eps * right.abs().max().item())
        count += 1
    return count


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # numpy reports overflows, which these inputs are made to cause
    checks = (
        check_optimizer,
        check_moments,
        check_gradient,
        check_projection,
        check_master,
        check_shapes,
        check_tuning,
        check_loss,
    )
    print(json.dumps({check.__name__: check() for check in checks}))
