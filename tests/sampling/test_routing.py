"""What is recorded of a drawing is who took which patch, call by call, in every layout."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megadit.model.embed import normed
from megadit.model.moe import MoE
from megadit.model.positions import sincos_positions
from megadit.parallel.init import Normal
from megadit.sampling.generate import SampleConfig, generate, noise_of
from megadit.sampling.routing import Trace, check_branch, recorded
from megadit.training.config import images_per_group
from tests.ranks import run_ranks
from tests.sampling.test_generate import NUMBERS, PROMPTS, assembled
from tests.tiers import slow_but

LAYOUTS = {
    "tensor2": (2, ["parallel.tensor=2"]),
    "tensor2_sequence": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "pipeline2": (2, ["parallel.pipeline=2"]),
    "pipeline4": (4, ["parallel.pipeline=4"]),  # stages without experts; microbatches that are filled up
    "expert2": (2, ["parallel.expert=2"]),
    "pipeline2_zbv": (2, ["parallel.pipeline=2", "parallel.schedule=zbv"]),
}
MODELS = {
    "captions": [],
    "pairs": ["model.routing_group=2"],
    "capacity": ["model.routing=token_choice", "model.capacity_factor=0.5"],
    "dropless": ["model.routing=token_choice", "model.dropless=true"],
}

# What is planted: experts see nothing but where a patch lies, of 4 x 4, and each takes its 8 best ones.
CLASSES = ["model.conditioning=class", "model.classes=10", "model.gate=identity"]
UPPER = np.repeat([1, 1, 0, 0], 4)
OUTER = np.repeat([1, 0, 0, 1], 4)
LEFT = np.tile([1, 1, 0, 0], 4)
MIDDLE = np.tile([0, 1, 1, 0], 4)
WANTED = {  # by each of four experts
    1: {"early": [UPPER] * 4, "late": [MIDDLE] * 4},
    3: {"early": [UPPER, UPPER, LEFT, OUTER], "late": [LEFT, LEFT, MIDDLE, UPPER]},
}
COUNTS = {  # by hand, row by row
    (1, "early"): [4, 4, 4, 4, 4, 4, 4, 4, 0, 0, 0, 0, 0, 0, 0, 0],
    (1, "late"): [0, 4, 4, 0, 0, 4, 4, 0, 0, 4, 4, 0, 0, 4, 4, 0],
    (3, "early"): [4, 4, 3, 3, 3, 3, 2, 2, 1, 1, 0, 0, 2, 2, 1, 1],
    (3, "late"): [3, 4, 2, 1, 3, 4, 2, 1, 2, 3, 1, 0, 2, 3, 1, 0],
}


def router_weight(wanted):
    """Rows by which each expert likes the patches that it is to take, and dislikes the others."""
    tokens_TD = normed(sincos_positions(4, 4, 32, 1.0, torch.device("cpu")))
    likes_TE = torch.tensor(np.stack(wanted, axis=1) * 2.0 - 1.0, dtype=torch.float64)
    weight_DE = torch.linalg.lstsq(tokens_TD, likes_TE, driver="gelsd").solution
    assert ((tokens_TD @ weight_DE).sign() == likes_TE).all()
    return weight_DE.T


@torch.no_grad()
def plant(stages):
    """All weights are zero, so that tokens are their positions in every layer. Plant what routers like, late and early.

    Class 7 leaves the tokens as they are. Who is told no class sees them turned around (1 + scale = -1), so that the
    experts take the very patches that they dislike.
    """
    for stage in stages:
        for layer, block in stage.blocks.items():
            if isinstance(block.feedforward, MoE):
                scale_of_feedforward = slice(4 * 32, 5 * 32)
                block.modulation.linear.weight[scale_of_feedforward, 0] = -2 / F.silu(torch.tensor(3.0).double())
                block.feedforward.early, block.feedforward.late = map(router_weight, WANTED[int(layer)].values())
        if stage.embed is not None:
            stage.embed.labels[10, 0] = 3.0

        def choose(stage, _, keywords):
            for block in stage.blocks.values():
                if isinstance(block.feedforward, MoE):
                    moe = block.feedforward
                    moe.router.weight.copy_(moe.early if keywords["timesteps_B"][0] > 0.5 else moe.late)

        stage.register_forward_pre_hook(choose, with_kwargs=True)


def planted(rank, world_size, overrides, settings, prompts=("7",)):
    _, stages, pipeline, condition = assembled(rank, world_size, [*CLASSES, *overrides], lambda name: Normal(0.0))
    plant(stages)
    with recorded(pipeline) as recording:
        generate(pipeline, condition, prompts, (1, 8, 8), settings, 0, torch.float64, progress=recording.steps())
    return vars(recording.trace(len(prompts)))


@pytest.mark.parametrize("pipeline", [1, 2])
def test_planted_routing_is_counted_as_by_hand_and_in_the_steps_of_heun(pipeline):
    settings = SampleConfig("heun", steps=2, guidance=2.0)
    for told in run_ranks(planted, pipeline, [f"parallel.pipeline={pipeline}"], settings):
        trace = Trace(**told)
        assert (trace.experts, trace.grid, trace.layers) == (4, (4, 4), (1, 3))
        # The first step looks ahead to where the second begins; the last does not look ahead.
        assert (trace.steps, trace.times) == ((0, 0, 1), (1.0, 0.5, 0.5))
        for call, when in enumerate(["early", "late", "late"]):
            for place, layer in enumerate(trace.layers):
                counts = np.array(COUNTS[layer, when])
                assert trace.conditional_NLBT[call, place].tolist() == [counts.tolist()]
                assert trace.unconditional_NLBT[call, place].tolist() == [(4 - counts).tolist()]
        by_hand = np.array([[COUNTS[layer, when] for layer in (1, 3)] for when in ("early", "late")])
        np.testing.assert_array_equal(trace.maps(), by_hand)
        np.testing.assert_array_equal(trace.maps("unconditional"), 4 - by_hand)
        np.testing.assert_array_equal(trace.maps("difference"), 2 * by_hand - 4)


@pytest.mark.parametrize(
    ("settings", "steps", "times"),
    [
        (SampleConfig("euler", steps=4, guidance=2.0), (0, 1, 2, 3), (1.0, 0.75, 0.5, 0.25)),
        (SampleConfig("heun", steps=1, guidance=2.0), (0,), (1.0,)),
        (SampleConfig("heun", steps=4, guidance=2.0), (0, 0, 1, 1, 2, 2, 3), (1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25)),
    ],
)
def test_each_call_is_of_its_step(settings, steps, times):
    (told,) = run_ranks(planted, 1, [], settings)
    assert (told["steps"], told["times"]) == (steps, times)
    trace = Trace(**told)
    assert [trace.steps[i] for i in trace.firsts] == list(range(settings.steps))
    assert [trace.times[i] for i in trace.firsts] == [1 - i / settings.steps for i in range(settings.steps)]
    early = [trace.maps()[i, 0].tolist() == COUNTS[1, "early"] for i in range(settings.steps)]
    assert early == [1 - i / settings.steps > 0.5 for i in range(settings.steps)]


def recorded_drawing(rank, world_size, overrides, settings, drawings=1):
    """The trace of the last of some drawings, and their pictures."""
    config, stages, pipeline, condition = assembled(rank, world_size, overrides)
    group = images_per_group(config)
    prompts = NUMBERS[:3] if config.model.conditioning == "class" else PROMPTS[:3]
    common = (pipeline, condition, prompts, (1, 8, 8), settings, 5, config.dtype)
    for _ in range(drawings):
        with recorded(pipeline) as recording:
            pictures = generate(*common, group=group, progress=recording.steps())
        trace = recording.trace(-(-len(prompts) // group) * group)
    assert not pipeline.listeners
    assert not any(module._forward_hooks for stage in stages for module in stage.modules())
    bare = generate(*common, group=group)
    assert torch.equal(bare, pictures), "recording changes nothing"
    return vars(trace), pictures.numpy()


SETTINGS = SampleConfig("heun", steps=2, guidance=2.0)


@pytest.mark.parametrize("model", slow_but({"captions", "dropless"}, MODELS))
def test_every_layout_records_what_one_process_does(model):
    ((alone, _),) = run_ranks(recorded_drawing, 1, MODELS[model], SETTINGS)
    assert alone["conditional_NLBT"].shape == (3, 2, 4 if model == "pairs" else 3, 16)
    assert len(np.unique(alone["conditional_NLBT"])) > 1 or model == "dropless"
    for world_size, overrides in LAYOUTS.values():
        for told, _ in run_ranks(recorded_drawing, world_size, [*MODELS[model], *overrides], SETTINGS):
            assert told.keys() == alone.keys()
            for name in ("experts", "grid", "layers", "steps", "times"):
                assert told[name] == alone[name], name
            for name in ("conditional_NLBT", "unconditional_NLBT"):
                np.testing.assert_array_equal(told[name], alone[name], err_msg=f"{name}, {overrides}")
            torch.testing.assert_close(told["x_NBCHW"], alone["x_NBCHW"], rtol=0, atol=1e-6)


def by_hand(rank, world_size, overrides):
    """Takers of two Euler steps, each branch in a call of its own, from the routers' logits; and the pictures."""
    config, (network,), _, condition = assembled(rank, world_size, overrides)
    told, x_BCHW = condition.encode(PROMPTS[:3]), noise_of(5, range(3), (1, 8, 8))
    nothing = {key: value.expand_as(told[key]) for key, value in condition.nothing.items()}
    logits = []
    for block in network.blocks.values():
        if isinstance(block.feedforward, MoE):
            block.feedforward.router.register_forward_hook(lambda _, __, output: logits.append(output))
    maps = []
    with torch.no_grad():
        for time in (1.0, 0.5):
            fixed = {"timesteps_B": torch.full((3,), time, dtype=torch.float64), "size": (8, 8)}
            given, free = (network(x_BCHW, **fixed, **keywords) for keywords in (told, nothing))
            for layer_BTE in logits:
                chosen = layer_BTE.softmax(-1).transpose(1, 2).topk(8).indices  # C = 16 x 2 / 4
                maps.append(F.one_hot(chosen, 16).sum(dim=(1, 2)).numpy())
            logits.clear()
            x_BCHW = x_BCHW - 0.5 * (free + 2 * (given - free))
    return np.stack(maps).reshape(2, 2, 2, 3, 16), x_BCHW.numpy()


def test_takers_are_those_of_the_network_called_by_hand():
    settings = SampleConfig("euler", steps=2, guidance=2.0)
    ((told, pictures),) = run_ranks(recorded_drawing, 1, [], settings)
    ((maps, wanted),) = run_ranks(by_hand, 1, [])
    np.testing.assert_allclose(pictures, wanted, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(told["conditional_NLBT"], maps[:, 0])
    np.testing.assert_array_equal(told["unconditional_NLBT"], maps[:, 1])
    np.testing.assert_allclose(told["x_NBCHW"][0], noise_of(5, range(3), (1, 8, 8)), rtol=0, atol=1e-6)


def test_a_second_drawing_begins_anew_and_runs_that_learn_shapes_do_not_count():
    (once, _), (twice, _) = (run_ranks(recorded_drawing, 1, [], SETTINGS, drawings)[0] for drawings in (1, 2))
    assert once["steps"] == twice["steps"] == (0, 0, 1)
    np.testing.assert_array_equal(once["conditional_NLBT"], twice["conditional_NLBT"])


def test_images_of_a_group_share_the_experts_places():
    ((told, _),) = run_ranks(recorded_drawing, 1, MODELS["pairs"], SETTINGS)
    taken_NLG = told["conditional_NLBT"].reshape(3, 2, 2, -1).sum(axis=-1)
    assert (taken_NLG == 4 * 16).all(), "4 experts, each 2 x 16 x 2 / 4 patches of a pair"
    assert (told["conditional_NLBT"].sum(axis=-1) != 32).any(), "not of each image"


def test_compiled_blocks_are_recorded_too():
    overrides = ["run.compile=true"]
    (alone, pictures), (compiled, drawn) = (
        run_ranks(recorded_only, 1, changes, SETTINGS)[0] for changes in ([], overrides)
    )
    np.testing.assert_array_equal(compiled["conditional_NLBT"], alone["conditional_NLBT"])
    np.testing.assert_allclose(drawn, pictures, rtol=0, atol=1e-12)


def recorded_only(rank, world_size, overrides, settings):
    """As `recorded_drawing`, without drawing anew: compilers take minutes."""
    config, stages, pipeline, condition = assembled(rank, world_size, overrides)
    assert all((block._compiled_call_impl is not None) == config.run.compile for block in stages[0].blocks.values())
    with recorded(pipeline) as recording:
        common = (pipeline, condition, PROMPTS[:2], (1, 8, 8), settings, 5, config.dtype)
        pictures = generate(*common, progress=recording.steps())
    return vars(recording.trace(2)), pictures.numpy()


def refusal(rank, world_size, overrides):
    _, _, pipeline, _ = assembled(rank, world_size, overrides)
    with pytest.raises(ValueError) as caught, recorded(pipeline):
        pass
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("model.experts=0", "model.experts=0"),
        ("model.routing=dense", "model.routing=dense"),
        ("model.dense_first=4", "model.moe_every=2 and model.dense_first=4 of 4 layers"),
    ],
)
def test_a_model_without_experts_is_refused_by_the_key(override, why):
    (message,) = run_ranks(refusal, 1, [override])
    assert message.startswith(f"no layer of this model has experts ({why})") and "model.experts" in message


def test_a_branch_that_was_not_drawn_is_refused_and_calls_without_it_have_no_map():
    shape = {"experts": 4, "grid": (1, 2), "layers": (1,), "steps": (0, 1), "times": (1.0, 0.5)}
    conditional = np.array([[[[1.0, 2.0]]], [[[3.0, 0.0]]]], dtype=np.float32)
    nothing = np.full_like(conditional, np.nan)
    trace = Trace(**shape, x_NBCHW=torch.zeros(2, 1, 1, 1, 2), conditional_NLBT=conditional, unconditional_NLBT=nothing)
    assert not trace.is_guided and trace.maps().tolist() == [[[1.0, 2.0]], [[3.0, 0.0]]]
    with pytest.raises(ValueError, match="there is no difference branch: .* guidance other than 1"):
        trace.maps("difference")
    nothing[0] = 1.0
    assert trace.is_guided
    np.testing.assert_array_equal(trace.maps("difference"), [[[0.0, 1.0]], [[np.nan, np.nan]]])


@pytest.mark.parametrize(
    ("settings", "there"),
    [
        (SampleConfig(steps=4), True),
        (SampleConfig(steps=4, guidance=1.0), False),
        (SampleConfig(steps=4, guidance_from=0.4, guidance_until=0.6), True),
        (SampleConfig(steps=4, guidance_from=0.0, guidance_until=0.2), False),  # where the last step ends
        (SampleConfig(steps=4, shift=3.0, guidance_from=0.4, guidance_until=0.6), True),  # 1, 0.9, 0.75, 0.5
        (SampleConfig(steps=4, shift=3.0, guidance_from=0.2, guidance_until=0.4), False),
    ],
)
def test_a_branch_that_no_step_will_have_is_known_before(settings, there):
    check_branch("conditional", settings)
    for branch in ("unconditional", "difference"):
        if there:
            check_branch(branch, settings)
            continue
        with pytest.raises(ValueError, match=f"there is no {branch} branch: no step is drawn without the prompt"):
            check_branch(branch, settings)
