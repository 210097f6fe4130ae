"""What a layer communicates, over which group and how much of it, against formulas.

Collectives are counted as torch dispatches them, so that whatever calls them is seen. Sizes are bytes of the whole
tensor: the sum, what is gathered, what is scattered, what a rank sends in an exchange.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megadit.model.block import MODULATION_OUTPUTS, Block
from megadit.model.config import ECDiTConfig
from megadit.model.ecdit import ECDiT
from megadit.model.text import TextConfig
from megadit.parallel.grid import AXES, UNIONS, Grid, Layout
from megadit.parallel.init import Normal, initialise
from megadit.parallel.tensor.mappings import CutTokens, ReplicatedTokens
from tests.ranks import run_ranks

B, T = 4, 16  # images of one rank, tokens of an image
SHAPE = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 4, "head_width": 8, "experts": 8, "image_size": 8}
CONFIG = ECDiTConfig(**SHAPE, channels=1, modulation="gated", capacity_factor=2.0)
TEXT = TextConfig(vocabulary=20, length=6, width=16, layers=1, heads=2)
TOKEN_CHOICE = {"routing": "token_choice", "top_k": 3, "balance_loss": 0.1}
# name: (layer, changes of the configuration)
BLOCKS = {
    "dense": (0, {}),
    "expert_choice": (1, {}),
    "pairs": (1, {"routing_group": 2, "capacity_overrides": {1: 1.3}}),
    "nucleus": (1, {"router_input": "timestep", "shared_experts": 1, "normalise_gates": True, "feedforward": "swiglu"}),
    "capacity": (1, TOKEN_CHOICE | {"capacity_factor": 1.0}),
    "dropless": (1, TOKEN_CHOICE | {"dropless": True}),
}
LAYOUTS = {
    "tensor2": Layout(pp=1, edp=1, ep=1, tp=2),
    "expert2": Layout(pp=1, edp=1, ep=2, tp=1),
    "tensor4": Layout(pp=1, edp=1, ep=1, tp=4),
    "expert4": Layout(pp=1, edp=1, ep=4, tp=1),
    "expert2_data2": Layout(pp=1, edp=2, ep=2, tp=1),
    "tensor2_expert2": Layout(pp=1, edp=1, ep=2, tp=2),
}


class Collectives(TorchDispatchMode):
    """Lists (axis, operation, bytes) of the collectives inside; one that it does not know is a KeyError."""

    OPERATIONS = {
        "allreduce_": ("all-reduce", lambda args: args[0][0]),
        "_allgather_base_": ("all-gather", lambda args: args[0]),
        "_reduce_scatter_base_": ("reduce-scatter", lambda args: args[1]),
        "alltoall_base_": ("all-to-all", lambda args: args[1]),
    }

    def __init__(self, grid):
        super().__init__()
        self.axes = {grid[name].handle.group_name: name for name in (*AXES, *UNIONS)}
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            operation, whole = self.OPERATIONS[func.overloadpacket.__name__]
            (group,) = [
                arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())
            ]
            axis = self.axes[dist.ProcessGroup.unbox(group).group_name]
            self.calls.append((axis, operation, whole(args).nbytes))
        return func(*args, **(kwargs or {}))


def counted(grid, run):
    """(what `run` returned, calls inside)."""
    with Collectives(grid) as collectives:
        out = run()
    return out, collectives.calls


def numbers(seed, dtype, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def filled(module, grid, dtype):
    module.to(dtype)
    initialise(module.named_parameters(), grid, 1, lambda name: Normal(0.2))
    return module


def of_blocks(rank, world_size, layout, region_of, dtype):
    """name -> the calls of its forward and of its backward, on this rank."""
    grid, calls = Grid(layout, rank), {}
    region = region_of(grid["tp"])
    mask = torch.ones(B, TEXT.length, dtype=torch.bool)
    for name, (layer, changes) in BLOCKS.items():
        block = filled(Block(replace(CONFIG, **changes), TEXT.width, layer, region, grid["ep"]), grid, dtype)
        # Ranks along ep have images of their own.
        seed = 10 * grid["dp"].rank
        x = region.split_tokens(numbers(seed, dtype, B, T, CONFIG.width)).detach().requires_grad_()
        inputs = (x, numbers(seed + 1, dtype, B, CONFIG.width), numbers(seed + 2, dtype, B, TEXT.length, TEXT.width))
        (y, routing), forward = counted(grid, lambda block=block, inputs=inputs: block(*inputs, mask))
        loss = y.sum() if routing is None or routing.balance is None else y.sum() + routing.balance.sum()
        calls[name] = forward, counted(grid, loss.backward)[1]
    return calls


def sizes_of(dtype):
    """Bytes of an element: of tokens, and of affinities and what is summed of them, which are float32 at least."""
    return dtype.itemsize, max(dtype.itemsize, 4)


def tensor_calls(name, layout, is_cut, dtype=torch.float64):
    """(forward, backward) over tp.

    Each of the three sub-layers reads x and writes its share of y, both [B, T, D]: an all-reduce of y forward and one
    of x's gradient backward; with tokens cut, an all-gather of x and a reduce-scatter of y forward, and their adjoints
    backward. The modulation's n vectors [B, n D] are gathered, and where every rank modulates tokens of its own their
    gradients are summed. A mixture of experts adds its affinities [B, T, E] to what enters, and with tokens cut a
    balance loss adds the sum of its probabilities [B, E]. Nothing is added for the experts.
    """
    layer, changes = BLOCKS[name]
    config, (size, affinity_size) = replace(CONFIG, **changes), sizes_of(dtype)
    if layout.tp == 1:
        return Counter(), Counter()
    x = B * T * config.width * size
    entered = [x] * 3 + [B * T * config.experts * affinity_size] * config.is_moe(layer)
    vectors = B * MODULATION_OUTPUTS[config.modulation] * config.width * size
    if not is_cut:
        forward = [("all-reduce", x)] * 3 + [("all-gather", vectors)]
        return Counter(forward), Counter([("all-reduce", part) for part in entered])
    gathered, summed = [("all-gather", part) for part in entered], [("reduce-scatter", part) for part in entered]
    forward = gathered + [("reduce-scatter", x)] * 3 + [("all-gather", vectors)]
    if config.is_moe(layer) and config.balance_loss:
        forward.append(("all-reduce", B * config.experts * affinity_size))
    return Counter(forward), Counter(summed + [("all-gather", x)] * 3 + [("reduce-scatter", vectors)])


def expert_calls(name, layout, dtype=torch.float64):
    """(forward, backward) over ep: of fixed shapes, two equal-split exchanges each, of P L N D elements.

    P = ep ranks, L = E / (ep tp) experts of a rank, N = G C picks of a rank's G groups for one expert, D the width.
    """
    layer, changes = BLOCKS[name]
    config = replace(CONFIG, **changes)
    if layout.ep == 1 or not config.is_moe(layer):
        return Counter(), Counter()
    images = 1 if config.routing_group == "sample" else config.routing_group
    local = config.experts // (layout.ep * layout.tp)
    picks = (B // images) * config.capacity(layer, T * images)
    exchange = ("all-to-all", layout.ep * local * picks * config.width * dtype.itemsize)
    return Counter([exchange] * 2), Counter([exchange] * 2)


def along(axis, phases):
    """For each phase, the calls over the group of an axis."""
    return tuple(Counter((operation, size) for where, operation, size in calls if where == axis) for calls in phases)


@pytest.mark.parametrize("region_of", [ReplicatedTokens, CutTokens])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_block_communicates_what_the_formulas_say(layout, region_of):
    layout = LAYOUTS[layout]
    check_blocks(layout, region_of, torch.float64)


@pytest.mark.parametrize("region_of", [ReplicatedTokens, CutTokens])
def test_tokens_travel_in_half_precision_and_affinities_in_single(region_of):
    check_blocks(LAYOUTS["tensor2_expert2"], region_of, torch.bfloat16)


def check_blocks(layout, region_of, dtype):
    ranks = run_ranks(of_blocks, layout.tp * layout.ep * layout.edp, layout, region_of, dtype)
    for name in BLOCKS:
        for calls in ranks:
            assert {axis for phase in calls[name] for axis, *_ in phase} <= {"tp", "ep"}
            assert along("tp", calls[name]) == tensor_calls(name, layout, region_of is CutTokens, dtype), name
            if name != "dropless":
                assert along("ep", calls[name]) == expert_calls(name, layout, dtype), name
    check_dropless(layout, [calls["dropless"] for calls in ranks], dtype)


def check_dropless(layout, ranks, dtype):
    """How many go where is exchanged first, [P, L]; then the ranks together send each of a token's K picks once."""
    picks = len(ranks) * B * T * TOKEN_CHOICE["top_k"] // layout.tp
    local = CONFIG.experts // (layout.ep * layout.tp)
    sent = Counter()
    for phases in ranks:
        forward, backward = ([size for axis, _, size in calls if axis == "ep"] for calls in phases)
        if layout.ep == 1:
            assert forward == backward == []
            continue
        counts, there, back = forward
        assert counts == layout.ep * local * torch.int64.itemsize
        # A gradient goes the way of its token in the other direction.
        assert sorted(backward) == sorted([there, back])
        sent.update(there=there, back=back)
    travelled = picks * CONFIG.width * dtype.itemsize
    assert layout.ep == 1 or sent == {"there": travelled, "back": travelled}


def of_stage(rank, world_size, layout, region_of):
    """(forward, backward) of the stage in the middle of a deeper network, and of all blocks in it."""
    grid = Grid(layout, rank)
    config, region = replace(CONFIG, layers=8), region_of(grid["tp"])
    stage = filled(ECDiT(config, TEXT, range(2, 6), region, grid["ep"]), grid, torch.float64)
    x = region.split_tokens(numbers(0, torch.float64, B, T, config.width)).detach().requires_grad_()
    carry = (x, numbers(1, torch.float64, B, config.width), numbers(2, torch.float64, B, TEXT.length, TEXT.width))
    mask = torch.ones(B, TEXT.length, dtype=torch.bool)
    keywords = {"timesteps_B": None, "size": (8, 8), "text_mask_BL": mask}
    out, forward = counted(grid, lambda: stage(*carry, **keywords))
    return forward, counted(grid, sum(part.sum() for part in out).backward)[1]


@pytest.mark.parametrize("region_of", [ReplicatedTokens, CutTokens])
def test_a_stage_adds_one_sum_of_the_conditioning_and_of_the_text_to_its_blocks(region_of):
    layout = LAYOUTS["tensor2_expert2"]
    kinds = ("dense", "expert_choice") * 2
    sums = Counter(("all-reduce", 8 * size) for size in (B * CONFIG.width, B * TEXT.length * TEXT.width))
    for phases in run_ranks(of_stage, 4, layout, region_of):
        tensor = [tensor_calls(name, layout, region_of is CutTokens) for name in kinds]
        expert = [expert_calls(name, layout) for name in kinds]
        for phase, added in enumerate([Counter(), sums]):
            assert along("tp", phases)[phase] == sum((calls[phase] for calls in tensor), added)
            assert along("ep", phases)[phase] == sum((calls[phase] for calls in expert), Counter())
