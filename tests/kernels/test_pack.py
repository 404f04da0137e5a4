"""Packing: parameters in one buffer, seen through views in their own shapes."""

from __future__ import annotations

import pytest
import torch

from offload.kernels.gradient import copy_
from offload.kernels.pack import FlatLayout, pack_, unpack_


def test_round_trip_through_one_buffer() -> None:
    tensors = [torch.randn(3, 5), torch.randn(()), torch.randn(0, 4), torch.randn(130), torch.randn(2, 3).T]
    layout = FlatLayout.of(tensors, alignment=64)
    assert layout.offsets == (0, 64, 128, 128, 320)
    assert layout.numel == 384
    flat = torch.full((layout.numel,), 9.0)
    pack_(flat, tensors, layout)
    assert flat[15:64].abs().sum() == 0.0 and flat[326:].abs().sum() == 0.0
    copies = [torch.empty_like(tensor) for tensor in tensors]
    unpack_(copies, flat, layout)
    for tensor, copy, view in zip(tensors, copies, layout.views(flat), strict=True):
        assert torch.equal(tensor, copy) and torch.equal(tensor, view)
    half = torch.empty(layout.numel, dtype=torch.bfloat16)
    copy_(half, flat)  # the whole unit in one cast copy
    for tensor, view in zip(tensors, layout.views(half), strict=True):
        assert torch.equal(tensor.bfloat16(), view)


def test_views_share_the_buffer() -> None:
    layout = FlatLayout(shapes=((2, 2), (3,)), alignment=1)
    flat = torch.arange(7.0)
    first, second = layout.views(flat)
    first.zero_()
    assert flat.tolist() == [0, 0, 0, 0, 4, 5, 6] and second.tolist() == [4, 5, 6]


def test_wrong_arguments_are_named() -> None:
    layout = FlatLayout(shapes=((2, 2),))
    with pytest.raises(ValueError, match=r"contiguous one of \[64\]"):
        layout.views(torch.zeros(4))
    with pytest.raises(ValueError, match="the layout was made for"):
        pack_(torch.zeros(64), [torch.zeros(4)], layout)
    with pytest.raises(ValueError, match="alignment is 0"):
        FlatLayout(shapes=(), alignment=0)
