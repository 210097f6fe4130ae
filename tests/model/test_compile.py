"""Compiled blocks and stages: one graph without breaks, compiled once, that computes what the eager ones do."""

import importlib
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from megadit.model.block import Block
from megadit.model.config import ECDiTConfig
from megadit.model.ecdit import ECDiT
from megadit.model.positions import rotary_positions
from megadit.parallel.grid import Grid, Layout
from megadit.parallel.init import Normal, initialise
from megadit.parallel.tensor.mappings import CutTokens, ReplicatedTokens
from tests.ranks import run_ranks
from tests.tiers import slow_but

TOKEN_CHOICE = {"routing": "token_choice", "balance_loss": 0.1}
NUCLEUS_LIKE = {"router_input": "timestep", "normalise_gates": True, "shared_experts": 1, "feedforward": "swiglu"}
IDS = torch.tensor([[2, 7, 8, 3, 0, 0], [2, 3, 0, 0, 0, 0]])


@pytest.fixture(autouse=True)
def strict():
    """No graph of another test, and an error instead of a second compilation for the same shapes."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def numbers(seed, *shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tensors(out):
    """The tensors of nested tuples and dictionaries, in order."""
    if out is None or isinstance(out, torch.Tensor):
        return [] if out is None else [out]
    return [tensor for part in (out.values() if isinstance(out, dict) else out) for tensor in tensors(part)]


def results(run, inputs, parameters):
    """All that `run` returns, and the gradients of a weighted sum of it."""
    inputs = [part.clone().requires_grad_() for part in inputs]
    out = tensors(run(*inputs))
    loss = sum((part * numbers(50, *part.shape)).sum() for part in out if part.requires_grad)
    gradients = torch.autograd.grad(loss, [*inputs, *parameters], allow_unused=True, materialize_grads=True)
    return [part.detach() for part in out] + list(gradients)


def assert_compiles_once(compiled, eager, module, counter, inputs_of, tolerance=1e-12):
    """Over three batches; `inputs_of(seed)`."""
    for seed in range(3):
        inputs, parameters = inputs_of(seed), list(module.parameters())
        found, wanted = results(compiled, inputs, parameters), results(eager, inputs, parameters)
        assert len(found) == len(wanted) > len(inputs) + len(parameters)
        for part, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(part, want, rtol=tolerance, atol=tolerance)
        assert all(want.norm() > 0 for want in wanted[-len(parameters) :])
    assert counter.frame_count == 1


def block_inputs(seed):
    """Tokens, conditioning, caption and shared modulation of two images."""
    tokens, conditioning = numbers(seed, 2, 16, 32), numbers(seed + 10, 2, 32)
    return tokens, conditioning, numbers(seed + 20, 2, 6, 16), numbers(seed + 30, 2, 6, 32)


@pytest.fixture
def compile_block(config, region, grid, filled):
    """A function that checks a compiled block under a backend."""

    def check(layer, backend, recompute_moe=False, **changes):
        config_of = replace(config, **{"modulation": "gated", "head_width": 4, **changes})
        block = filled(Block(config_of, 16, layer, region, grid["ep"], recompute_moe))
        counter = CompileCounterWithBackend(backend)

        def run(block, x, cond, caption, shared):
            rotary = rotary_positions(4, 4, 4, 1.0, x.device, x.dtype)[:, None, None]
            shared = shared if config_of.modulation == "shared" else None
            return block(x, cond, caption, IDS != 0, shared, rotary if config_of.positions == "rotary" else None)

        compiled = torch.compile(block, backend=counter, fullgraph=True, dynamic=False)
        assert_compiles_once(partial(run, compiled), partial(run, block), block, counter, block_inputs)

    return check


BLOCKS = {
    "dense": (0, {}),
    "expert_choice": (1, {}),
    "nucleus_like_pairs": (1, NUCLEUS_LIKE | {"routing_group": 2}),
    "capacity": (1, TOKEN_CHOICE | {"balance_counts": "first"}),
    "adaln_single": (0, {"modulation": "shared"}),
    "rotary": (1, {"positions": "rotary"}),
    "biased_experts": (1, {"modulation": "shared", "bias": True}),
}


@pytest.mark.parametrize("block", slow_but(["expert_choice", "nucleus_like_pairs"], BLOCKS))
def test_a_compiled_block_is_the_eager_one(compile_block, block):
    layer, changes = BLOCKS[block]
    compile_block(layer, "aot_eager", **changes)


def test_a_compiled_block_may_recompute_its_experts(compile_block):
    compile_block(1, "aot_eager", recompute_moe=True)


@pytest.mark.drill
@pytest.mark.timeout(900)
@pytest.mark.parametrize("block", ["expert_choice", "nucleus_like_pairs"])
def test_a_block_through_inductor_is_the_eager_one(compile_block, block):
    layer, changes = BLOCKS[block]
    # torch 2.13 on a CPU: a kernel fused anew forgets that it reads what a scatter wrote, and this pass puts it first.
    inductor = importlib.import_module("torch._inductor.config")  # five seconds, which the other tests need not spend
    with inductor.patch(reorder_for_peak_memory=False):
        compile_block(layer, "inductor", **changes)


@pytest.fixture
def compile_stage(config, text, region, grid, filled):
    """A function that checks the compiled `compute` of a stage of two layers, by default the whole network."""

    def check(backend, recompute, layers=range(2), **changes):
        config_of = replace(config, modulation="gated", layers=layers.stop, **changes)
        text_of = replace(text, layers=1)
        stage = filled(ECDiT(config_of, text_of, layers, region, grid["ep"], recompute))
        keywords = {"timesteps_B": numbers(30, 2).sigmoid(), "size": (8, 8)}
        keywords |= {"text_ids_BL": IDS, "text_mask_BL": IDS != 0, "labels_B": torch.tensor([0, 3])}
        counter = CompileCounterWithBackend(backend)

        def eager(*carry):
            return stage.compute(*carry, **keywords)

        compute = torch.compile(stage.compute, backend=counter, fullgraph=True, dynamic=False)

        def compiled(*carry):
            return compute(*carry, **keywords)

        def image(seed):
            return (numbers(seed, 2, 3, 8, 8),)

        assert_compiles_once(compiled, eager, stage, counter, image if layers.start == 0 else block_inputs)

    return check


# Embedding looks positions up in a cache that a graph goes past.
ignores_cache = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")


@ignores_cache
@pytest.mark.parametrize("recompute", slow_but(["none"], ["none", "block"]))
def test_a_compiled_stage_is_the_eager_one(compile_stage, recompute):
    compile_stage("aot_eager", recompute)


@ignores_cache
def test_a_compiled_stage_hands_on_its_balance_loss(compile_stage):
    compile_stage("aot_eager", "moe", **TOKEN_CHOICE, conditioning="class", classes=3)


@pytest.mark.drill
@pytest.mark.timeout(900)
def test_a_stage_through_inductor_is_the_eager_one(compile_stage):
    """The last one: in the first, the time features have float32 frequencies, which inductor rounds in its own way."""
    compile_stage("inductor", "block", range(2, 4))


@pytest.mark.parametrize(("overrides", "graphs"), [({}, 2), ({3: 1.0, 7: 1.0, 19: 1.0}, 3)])
def test_layers_of_one_kind_share_a_graph(config, text, region, grid, filled, overrides, graphs):
    """A dense one and one with experts for each capacity: torch compiles a function eight times at most."""
    config = replace(config, layers=24, capacity_overrides=overrides)
    network = filled(ECDiT(config, text, range(24), region, grid["ep"]))
    image, keywords = numbers(0, 2, 3, 8, 8), {"timesteps_B": numbers(30, 2).sigmoid(), "size": (8, 8)}
    keywords |= {"text_ids_BL": IDS, "text_mask_BL": IDS != 0}
    expected, counter = network(image, **keywords), CompileCounterWithBackend("eager")
    for block in network.blocks.values():
        block.compile(backend=counter, fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=False):
        torch.testing.assert_close(network(image, **keywords), expected, rtol=1e-12, atol=1e-12)
        network(image, **keywords)
    assert counter.frame_count == graphs


def block_of_rank(rank, world_size, layout, region_of, layer):
    """A block with collectives inside, compiled, on this rank."""
    grid = Grid(Layout(**layout), rank)
    shape = {"layers": 4, "width": 32, "heads": 4, "kv_heads": 2, "head_width": 6, "experts": 4}
    config = ECDiTConfig(**shape, modulation="gated", shared_experts=1, router_input="timestep")
    region = region_of(grid["tp"])
    block = Block(config, 16, layer, region, grid["ep"]).to(torch.float64)
    initialise(block.named_parameters(), grid, 1, lambda name: Normal(0.2))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True, dynamic=False)

    def inputs_of(seed):
        x, cond, text, _ = block_inputs(seed + 100 * grid["ep"].rank)
        return region.split_tokens(x), cond, text

    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_compiles_once(
            lambda *inputs: compiled(*inputs, IDS != 0),
            lambda *inputs: block(*inputs, IDS != 0),
            block,
            counter,
            inputs_of,
        )


@pytest.mark.parametrize(
    ("layout", "region_of"),
    [
        pytest.param({"pp": 1, "edp": 1, "ep": 1, "tp": 2}, ReplicatedTokens, marks=pytest.mark.drill),
        ({"pp": 1, "edp": 1, "ep": 1, "tp": 2}, CutTokens),
        ({"pp": 1, "edp": 1, "ep": 2, "tp": 1}, ReplicatedTokens),
    ],
    ids=["tensor2", "tensor2_sequence", "expert2"],
)
def test_a_compiled_block_communicates_as_the_eager_one_does(layout, region_of):
    run_ranks(block_of_rank, 2, layout, region_of, 1)
