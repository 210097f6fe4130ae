"""What is remembered of a kernel equals what it returns."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megadit.planning.recall import recalled


class Compare(TorchDispatchMode):
    """Calls every operator twice, plainly and remembered, and compares sizes."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._schema.is_mutable or func.is_view:
            return recalled(func, args, kwargs)
        plain, ours = func(*args, **kwargs), recalled(func, args, kwargs)
        self.count += 1
        assert facts(plain) == facts(ours), func
        return ours


def facts(tree):
    if isinstance(tree, torch.Tensor):
        return tree.shape, tree.stride(), tree.dtype, tree.device
    return [facts(item) for item in tree] if isinstance(tree, (list, tuple)) else tree


@pytest.mark.parametrize("shape", [(4, 8, 16), (2, 8, 16)])
def test_remembered_results_are_like_the_kernels_own(shape):
    with Compare() as compare:
        for _ in range(2):  # the second time from memory
            x = torch.empty(shape, device="meta", requires_grad=True)
            weight = torch.empty(32, 16, device="meta", dtype=torch.float32, requires_grad=True)
            y = torch.nn.functional.layer_norm(torch.nn.functional.linear(x, weight), (32,))
            values, index = y.transpose(1, 2).topk(2, dim=2)
            picked = torch.gather(y, 1, index.transpose(1, 2)) * values.transpose(1, 2).softmax(-1)
            picked.to(torch.bfloat16).float().sum(dim=(0, 2)).square().sum().backward()
            assert x.grad.shape == shape
    assert compare.count > 20


def test_numbers_of_another_type_are_another_call():
    x = torch.empty(3, dtype=torch.int64, device="meta")
    add = torch.ops.aten.add.Tensor
    for _ in range(2):
        assert recalled(add, (x, 1), {}).dtype == torch.int64
        assert recalled(add, (x, 1.0), {}).dtype == torch.float32


def test_arguments_of_another_dtype_shape_or_stride_are_another_call():
    halves = torch.empty(4, 2, dtype=torch.bfloat16, device="meta")
    for x in (halves, halves.float(), halves.new_empty(2, 4), halves.new_empty(2, 4).t()) * 2:
        plain = torch.ops.aten.neg.default(x)
        assert facts(recalled(torch.ops.aten.neg.default, (x,), {})) == facts(plain)


def test_results_do_not_share_memory():
    x = torch.empty(3, device="meta")
    first, second = (recalled(torch.ops.aten.neg.default, (x,), {}) for _ in range(2))
    assert first.untyped_storage()._cdata != second.untyped_storage()._cdata


def test_in_place_kernels_return_their_argument():
    x = torch.empty(3, device="meta")
    for _ in range(2):
        assert recalled(torch.ops.aten.add_.Tensor, (x, 1), {}) is x
