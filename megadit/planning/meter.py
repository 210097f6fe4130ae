"""Sees what runs: kernels with their FLOPs and bytes, collectives, and the bytes that are alive, by category.

Tensors on the meta device have sizes and nothing else, so a network of any size can be watched in one process.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from megadit.parallel.grid import UNIONS, Grid
from megadit.parallel.layout import AXES
from megadit.planning.recall import recalled

ACTIVATIONS = "activations"  # the category of whatever nobody has claimed


class Operation(NamedTuple):
    """One kernel. flops: of its matrix products, two for each multiply-add. nbytes: of tensors read and written."""

    flops: int
    nbytes: int


class Collective(NamedTuple):
    """One call on one rank. nbytes: of the whole tensor: the sum, what is gathered, what is scattered, what a rank
    sends in an exchange.
    """

    axis: str
    operation: str
    nbytes: int


class Peaks(NamedTuple):
    """Most bytes that were alive at once: of each category by itself, of all together, and what that was made of."""

    of: dict[str, int]
    total: int
    then: dict[str, int]


# c10d's name -> ours, and the tensor whose bytes count.
_COLLECTIVES: dict[str, tuple[str, Callable[[Any], Tensor]]] = {
    "allreduce_": ("all-reduce", lambda args: args[0][0]),
    "_allgather_base_": ("all-gather", lambda args: args[0]),
    "_reduce_scatter_base_": ("reduce-scatter", lambda args: args[1]),
    "alltoall_base_": ("all-to-all", lambda args: args[1]),
    "broadcast_": ("broadcast", lambda args: args[0][0]),
    "reduce_": ("reduce", lambda args: args[0][0]),
    "send": ("send", lambda args: args[0][0]),
    "recv_": ("recv", lambda args: args[0][0]),
}

_aten = torch.ops.aten
# torch counts fused attention on GPUs only. The backward makes the scores again: five products, where it saved none.
_FLOPS = {
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, out_val=None, **__: sdpa_flop_count(
        q.shape, _whole_heads(k, q), _whole_heads(v, q)
    ),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, out_val=None, **__: (
        sdpa_backward_flop_count(grad.shape, q.shape, _whole_heads(k, q), _whole_heads(v, q))
    ),
}


def _whole_heads(key_BHSK: Tensor, query_BHTK: Tensor) -> torch.Size:
    """The shape of keys or values as if each query head had its own: grouped ones are multiplied as often."""
    return torch.Size((query_BHTK.shape[0], query_BHTK.shape[1], *key_BHSK.shape[2:]))


@contextmanager
def fused_attention() -> Iterator[None]:
    """On the meta device torch takes attention apart, scores and all. Here it is the one kernel that devices run.

    torch's own function is replaced: a mode over torch functions would be off where a block is recomputed.
    """
    own = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _fused  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = own


def _fused(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
    if attn_mask is not None:  # the kernel adds it to the scores
        attn_mask = torch.where(attn_mask, 0.0, -torch.inf).to(query.dtype)
    return _aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=attn_mask)[0]


class Meter(TorchDispatchMode):
    """Within the context everything that torch dispatches is counted.

    operations: kernels and how often each ran. collectives: in the order of their calls. live: bytes by category.
    """

    def __init__(self, grid: Grid, device: torch.device) -> None:
        """`device`: where the tensors lie that count."""
        super().__init__()
        self.device, self._category_made = device, ACTIVATIONS
        # By name, the axis of each group; of groups with the same members, the axis that comes first.
        self._axes = {grid[name].handle.group_name: name for name in (*AXES, *UNIONS)}
        self.operations: Counter[Operation] = Counter()
        self.collectives: list[Collective] = []
        self.live: Counter[str] = Counter()
        self.peaks: Counter[str] = Counter()
        self.at_peak: dict[str, int] = {}
        self.peak = 0
        self._total = 0
        self._category: dict[int, tuple[str, int]] = {}  # of each live storage, with its bytes

    def claim(self, category: str, tensors: Iterable[Tensor]) -> None:
        """From now on the memory of these tensors belongs to the category, also that made before the meter."""
        for tensor in tensors:
            self._track(tensor, category)
            key = tensor.untyped_storage()._cdata
            before, nbytes = self._category[key]
            self.live[before] -= nbytes
            self.live[category] += nbytes
            self._category[key] = category, nbytes
            self.peaks[category] = max(self.peaks[category], self.live[category])

    @contextmanager
    def making(self, category: str) -> Iterator[None]:
        """Within the context what is made belongs to the category."""
        before, self._category_made = self._category_made, category
        yield
        self._category_made = before

    def take_peaks(self) -> Peaks:
        """The peaks since the last time; new ones begin with what is alive now."""
        taken = Peaks(dict(self.peaks), self.peak, self.at_peak)
        self.peaks, self.peak, self.at_peak = Counter(self.live), self._total, dict(self.live)
        return taken

    def _track(self, tensor: Tensor, category: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._category:
            return
        nbytes = storage.nbytes()
        self._category[key] = category, nbytes
        self.live[category] += nbytes
        self._total += nbytes
        weakref.finalize(storage, self._freed, key).atexit = False
        if self.live[category] > self.peaks[category]:
            self.peaks[category] = self.live[category]
        if self._total > self.peak:
            self.peak, self.at_peak = self._total, dict(self.live)

    def _freed(self, key: int) -> None:
        category, nbytes = self._category.pop(key)
        self.live[category] -= nbytes
        self._total -= nbytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            self._count_collective(func, args)
            return func(*args, **kwargs)
        out = recalled(func, args, kwargs) if self.device.type == "meta" else func(*args, **kwargs)
        if not func.is_view:
            made = [tensor for tensor in _tensors(out) if tensor.device.type == self.device.type]
            for tensor in made:
                self._track(tensor, self._category_made)
            if made:
                self._count_operation(func, args, kwargs, out, made)
        return out

    def _count_operation(self, func: Any, args: Any, kwargs: Mapping[str, Any], out: Any, made: list[Tensor]) -> None:
        formula = _FLOPS.get(func._overloadpacket)
        flops = 0 if formula is None else int(formula(*args, **kwargs, out_val=out))
        nbytes = sum(tensor.nbytes for tensor in (*_tensors(args), *_tensors(kwargs.values()), *made))
        if flops or nbytes:
            self.operations[Operation(flops, nbytes)] += 1

    def _count_collective(self, func: Any, args: Any) -> None:
        """One that is not known is a KeyError: better than one that is not counted."""
        operation, whole = _COLLECTIVES[func._overloadpacket.__name__]
        (group,) = [arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())]
        axis = self._axes[dist.ProcessGroup.unbox(group).group_name]
        self.collectives.append(Collective(axis, operation, whole(args).nbytes))


def _tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors of an operation's arguments or results, which may be lists of them."""
    if isinstance(tree, Tensor):
        yield tree
    elif not isinstance(tree, (str, torch.ScriptObject)) and isinstance(tree, Iterable):
        for item in tree:
            yield from _tensors(item)
