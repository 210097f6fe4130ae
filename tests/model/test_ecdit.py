"""The whole network: its stages chained by hand are the network, whatever the cut."""

from dataclasses import replace

import pytest
import torch

from megadit.model.ecdit import ECDiT, whole_model
from megadit.model.embed import kept, patchify, unpatchify
from megadit.model.text import TextConfig
from megadit.parallel.placement import placement_of

IDS = torch.tensor([[2, 7, 8, 3, 0, 0], [2, 3, 0, 0, 0, 0]])
BALANCED = {"routing": "token_choice", "balance_loss": 0.1}
CLASSES = {"conditioning": "class", "classes": 3}
# name: (changes of the configuration, shapes of what a stage hands on)
X, COND, TEXT, BALANCE, SHARED = (2, 16, 32), (2, 32), (2, 6, 16), (1,), (2, 6, 32)
MODELS = {
    "ungated": ({"modulation": "scale_shift"}, [X, COND, TEXT]),
    "gated": ({"modulation": "gated"}, [X, COND, TEXT]),
    "balanced": (BALANCED, [X, COND, TEXT, BALANCE]),
    "classes": (CLASSES, [X, COND]),
    "balanced_classes": (BALANCED | CLASSES, [X, COND, BALANCE]),
    "adaln_single": ({"modulation": "shared", "router_input": "timestep"}, [X, COND, SHARED, TEXT]),
    "balanced_adaln_single": ({"modulation": "shared"} | BALANCED | CLASSES, [X, COND, SHARED, BALANCE]),
    "rotary": ({"positions": "rotary", "head_width": 8}, [X, COND, TEXT]),
    "per_layer": ({"embedders": "per_layer"} | CLASSES, [X, COND]),
    "per_layer_of_text": ({"embedders": "per_layer"}, [X, COND, TEXT]),
    "states": ({"text": TextConfig(kind="precomputed", channels=10, width=16), "bias": True}, [X, COND, TEXT]),
    "pooled": ({"text": TextConfig(kind="t5+clip", channels=10, width=16, pooled=7)}, [X, COND, TEXT]),
}


@pytest.fixture
def build(config, text, region, grid, filled):
    def stage(layers, recompute="none", text=text, **changes):
        return filled(ECDiT(replace(config, **changes), text, layers, region, grid["ep"], recompute))

    return stage


@pytest.fixture
def inputs(randn):
    """The image and the keyword arguments, captions and classes."""
    times = torch.tensor([0.3, 0.9], dtype=torch.float64)
    captions = {"text_ids_BL": IDS, "text_mask_BL": IDS != 0, "text_states_BLC": randn(2, 6, 10)}
    captions["text_pooled_BP"] = randn(2, 7)
    return randn(2, 3, 8, 8), {"timesteps_B": times, "size": (8, 8), "labels_B": torch.tensor([2, 3])} | captions


def tensors(out):
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("cuts", [(0, 2, 4), (0, 1, 4), (0, 1, 2, 3, 4)])
def test_chained_stages_are_the_network(build, inputs, cuts, model):
    (image, keywords), (changes, shapes) = inputs, MODELS[model]
    whole = build(range(4), **changes)
    stages = [build(range(*ends), **changes) for ends in zip(cuts, cuts[1:], strict=False)]
    carry = (image,)
    for stage in stages[:-1]:
        carry = stage(*carry, **keywords)
        assert [part.shape for part in carry] == shapes
    outputs = tensors(stages[-1](*carry, **keywords))
    assert [part.shape for part in outputs] == [image.shape, *[(1,)] * (BALANCE in shapes)]
    for part, wanted in zip(outputs, tensors(whole(image, **keywords)), strict=True):
        torch.testing.assert_close(part, wanted, rtol=0, atol=1e-12)
    names = [name for stage in stages for name, _ in stage.named_parameters()]
    assert len(set(names)) == len(names)
    assert set(names) == {name for name, _ in whole.named_parameters()}


def test_the_balance_loss_is_the_sum_over_layers(build, inputs):
    """Whoever trains weighs it; half precision does not carry it."""
    image, keywords = inputs
    network = build(range(4), **BALANCED)
    found = []
    for block in (network.blocks["1"], network.blocks["3"]):
        block.register_forward_hook(lambda _block, _args, out: found.append(out[1].balance))
    _, balance = network(image, **keywords)
    assert len(found) == 2
    torch.testing.assert_close(balance, found[0] + found[1], rtol=0, atol=1e-12)
    assert build(range(4), routing="token_choice")(image, **keywords).shape == image.shape
    stage, keywords["timesteps_B"] = build(range(1), **BALANCED).to(torch.bfloat16), torch.tensor([0.3, 0.9])
    carry = stage(image.bfloat16(), **keywords)
    assert [part.dtype for part in carry] == [torch.bfloat16] * 3 + [torch.float32]


def test_statistics_are_under_the_global_layer_and_given_once(build, inputs):
    image, keywords = inputs
    first, last = build(range(3)), build(range(3, 4))
    assert first.take_stats(1) == {}
    last(*first(image, **keywords), **keywords)
    stats = [stage.take_stats(1) for stage in (first, last)]
    assert [list(of_stage) for of_stage in stats] == [[1], [3]]
    assert 0 < stats[1][3].entropy.item() <= 1
    assert [stage.take_stats(1) for stage in (first, last)] == [{}, {}]


def test_statistics_are_means_over_the_last_training_forwards(build, inputs, randn):
    """A schedule's forward to learn shapes comes before them; sampling and evaluation are not among them."""
    image, keywords = inputs
    network, images = build(range(4), capacity_factor=0.5), [image, randn(2, 3, 8, 8), randn(2, 3, 8, 8)]
    each = []
    for noisy in images:
        network(noisy, **keywords)
        each.append(network.take_stats(1))
    for noisy in images:
        network(noisy, **keywords)
    with torch.no_grad():
        network(100 * image, **keywords)
    means = network.take_stats(2)
    assert list(means) == [1, 3]
    for layer, stats in means.items():
        for name, value in stats._asdict().items():
            wanted = (getattr(each[1][layer], name) + getattr(each[2][layer], name)) / 2
            torch.testing.assert_close(value, wanted, rtol=1e-14, atol=0)
    assert means[1].entropy != each[0][1].entropy


@pytest.mark.parametrize(
    "model", ["gated", "classes", "adaln_single", "per_layer", "per_layer_of_text", "states", "pooled"]
)
def test_every_input_matters_and_images_do_not_mix(build, inputs, model):
    image, keywords = inputs
    network = build(range(4), **MODELS[model][0])
    velocity = network(image, **keywords)
    others = {"timesteps_B": torch.tensor([0.3, 0.1]).double(), "text_ids_BL": IDS.clamp_max(5)}
    others |= {"labels_B": torch.tensor([2, 1]), "text_mask_BL": IDS > 2}
    others |= {key: -keywords[key] for key in ("text_states_BLC", "text_pooled_BP")}
    states = ["text_states_BLC", "text_mask_BL"]
    read = {"classes": ["labels_B"], "per_layer": ["labels_B"], "states": states, "pooled": [*states, "text_pooled_BP"]}
    read = read.get(model, ["text_ids_BL", "text_mask_BL"])
    unread = others.keys() - {"timesteps_B", *read}
    for key, other in others.items():
        change = (network(image, **(keywords | {key: other})) - velocity).abs().max()
        assert change == 0 if key in unread else change > 1e-3, key
    changed = network(torch.stack([image[0], -image[1]]), **keywords)
    torch.testing.assert_close(changed[0], velocity[0], rtol=0, atol=1e-13)
    assert (changed[1] - velocity[1]).abs().max() > 1e-3


@pytest.mark.parametrize("recompute", ["block", "moe"])
@pytest.mark.parametrize("model", MODELS)
def test_recomputing_changes_no_gradient(build, inputs, model, recompute):
    image, keywords = inputs
    gradients = []
    for how in ("none", recompute):
        network = build(range(4), how, **MODELS[model][0])
        sum(part.square().sum() for part in tensors(network(image, **keywords))).backward()
        gradients.append({name: parameter.grad for name, parameter in network.named_parameters()})
        assert all(stats.picks.isfinite() for stats in network.take_stats(1).values())
    plain, recomputed = gradients
    for name, gradient in plain.items():
        assert gradient.norm() > 0, name
        torch.testing.assert_close(
            recomputed[name], gradient, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("recompute", ["none", "block", "moe"])
def test_only_what_is_recomputed_runs_twice(build, inputs, recompute):
    image, keywords = inputs
    network, runs = build(range(4), recompute), []
    for name, module in network.named_modules():
        if name.split(".")[-1] in ("attention", "experts"):
            module.register_forward_hook(lambda module, *_: runs.append(type(module).__name__))
    with torch.no_grad():
        network(image, **keywords)
    assert (runs.count("SelfAttention"), runs.count("Experts")) == (4, 2)
    runs.clear()
    network(image, **keywords).sum().backward()
    twice = {"none": (4, 2), "block": (8, 4), "moe": (4, 4)}
    assert (runs.count("SelfAttention"), runs.count("Experts")) == twice[recompute]


@pytest.mark.parametrize("model", MODELS)
def test_the_whole_model_is_known_without_a_process_group(build, text, model):
    """Names, shapes and placements, on no device."""
    changes = MODELS[model][0]
    built = build(range(4), **changes)
    whole = whole_model(built.config, changes.get("text", text))
    described = {name: (p.shape, placement_of(p)) for name, p in whole.named_parameters()}
    assert described == {name: (p.shape, placement_of(p)) for name, p in built.named_parameters()}
    assert all(parameter.is_meta for parameter in whole.parameters())


def test_the_whole_model_needs_no_size_of_a_microbatch(config, text):
    whole = whole_model(replace(config, routing_group="batch"), text)
    assert {name for name, _ in whole.named_parameters()} == {
        name for name, _ in whole_model(config, text).named_parameters()
    }


@pytest.mark.parametrize("ends", [(0, 2), (1, 3), (2, 4)])
def test_each_layer_has_its_own_embedders_but_the_first(build, ends):
    """The first layer's are where those of all layers were, for they serve the head too."""
    names = {name for name, _ in build(range(*ends), embedders="per_layer", **CLASSES).named_parameters()}
    parts = ("time_in.weight", "time_in.bias", "time_out.weight", "time_out.bias", "labels")
    wanted = {f"blocks.{layer}.embedder.{part}" for layer in range(*ends) if layer for part in parts}
    wanted |= {f"embed.{part}" for part in parts if ends[0] == 0}
    assert {name for name in names if ".time_" in name or name.endswith("labels")} == wanted


def test_embedders_of_a_layer_condition_that_layer_alone(build, inputs):
    """Layer 0's the head too: with all layers' the same, per-layer embedders compute what shared ones do."""
    image, keywords = inputs
    shared, own = build(range(4), **CLASSES), build(range(4), embedders="per_layer", **CLASSES)
    state = shared.state_dict()
    for name in own.state_dict():
        if ".embedder." in name:
            state[name] = state[f"embed.{name.split('.embedder.')[1]}"]
    own.load_state_dict(state)
    velocity = own(image, **keywords)
    torch.testing.assert_close(velocity, shared(image, **keywords), rtol=0, atol=1e-12)
    seen = {}
    for layer, block in own.blocks.items():
        block.register_forward_pre_hook(lambda _, args, layer=layer: seen.update({layer: args[1]}))
    own.head.register_forward_pre_hook(lambda _, args: seen.update({"head": args[1]}))
    own(image, **keywords)
    before = dict(seen)
    with torch.no_grad():
        own.blocks["2"].embedder.labels.add_(1)
    own(image, **keywords)
    assert {name for name, value in seen.items() if not torch.equal(value, before[name])} == {"2"}


@pytest.mark.parametrize("model", ["gated", "states"])
def test_padding_is_not_read_but_by_a_caption_without_a_token(build, inputs, model):
    """Which has a finite velocity and finite gradients, and spoils no other image."""
    (image, keywords), network = inputs, build(range(4), **MODELS[model][0])
    velocity, mask = network(image, **keywords), keywords["text_mask_BL"]
    padded = {"text_ids_BL": IDS.masked_fill(~mask, 11)}
    padded["text_states_BLC"] = keywords["text_states_BLC"].masked_fill(~mask[:, :, None], 100.0)
    torch.testing.assert_close(network(image, **keywords | padded), velocity, rtol=0, atol=1e-13)
    empty = network(image, **keywords | {"text_mask_BL": torch.stack([mask[0], torch.zeros(6, dtype=torch.bool)])})
    empty.square().sum().backward()
    assert empty.isfinite().all() and (empty[1] - velocity[1]).abs().max() > 1e-3
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())
    torch.testing.assert_close(empty[0], velocity[0], rtol=0, atol=1e-13)


@pytest.mark.parametrize("positions", ["sincos", "rotary"])
def test_positions_tell_tokens_apart(build, inputs, randn, positions):
    """An image whose patches are all of one colour, in other places: else its velocity would move along."""
    _, keywords = inputs
    network = build(range(4), positions=positions, head_width=8, experts=0)
    image = randn(2, 3, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)

    def mean_of_patches(image):
        return torch.nn.functional.avg_pool2d(network(image, **keywords), 2)

    assert (mean_of_patches(image.flip(2, 3)) - mean_of_patches(image).flip(2, 3)).abs().max() > 1e-3


@pytest.mark.parametrize("positions", ["sincos", "rotary"])
def test_rotary_positions_are_not_added(build, inputs, positions):
    image, keywords = inputs
    stage = build(range(1), positions=positions, head_width=8)
    told = [keywords[key] for key in ("timesteps_B", "text_ids_BL", "text_mask_BL", "labels_B")]
    tokens = stage.embed(torch.ones_like(image), *told)[0]
    assert torch.allclose(tokens, tokens[:, :1].expand_as(tokens), atol=1e-13) == (positions == "rotary")


@pytest.mark.parametrize("positions", ["sincos", "rotary"])
@pytest.mark.parametrize("model", ["gated", "balanced", "adaln_single", "pooled"])
def test_a_network_that_sees_all_tokens_in_their_order_is_the_network(build, inputs, model, positions):
    image, keywords = inputs
    network = build(range(4), positions=positions, head_width=8, **MODELS[model][0])
    whole, part = (
        tensors(network(image, **keywords | seen)) for seen in ({}, {"kept_BT": torch.arange(16).repeat(2, 1)})
    )
    wanted = (patchify(whole[0], 2), *whole[1:])
    for found, expected in zip(part, wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("positions", ["sincos", "rotary"])
@pytest.mark.parametrize("cuts", [(0, 4), (0, 1, 3, 4)])
def test_tokens_that_are_dropped_do_not_matter_and_the_others_know_their_places(build, inputs, randn, positions, cuts):
    (image, keywords), places = inputs, torch.tensor([[0, 1, 5, 6, 9, 15], [2, 3, 4, 7, 8, 9]])
    keywords["kept_BT"] = places
    stages = [
        build(range(*ends), positions=positions, head_width=8) for ends in zip(cuts, cuts[1:], strict=False)
    ]  # fmt: skip

    def velocity(image, **changes):
        carry = (image,)
        for stage in stages:
            carry = tensors(stage(*carry, **keywords | changes))
        return carry[0]

    found = velocity(image)
    assert found.shape == (2, 6, 12)
    patches, noise = patchify(image, 2), randn(2, 16, 12)
    seen = torch.zeros(2, 16, 1, dtype=torch.bool).scatter(1, places[:, :, None], True)
    other = unpatchify(torch.where(seen, patches, noise), 2, (8, 8))
    torch.testing.assert_close(velocity(other), found, rtol=0, atol=1e-12)
    # The same patches in other places, and in another order.
    moved = torch.tensor([[3, 1, 5, 6, 9, 15], [2, 3, 4, 7, 8, 9]])
    taken = unpatchify(patches.scatter(1, moved[:, :, None].expand(-1, -1, 12), kept(patches, places)), 2, (8, 8))
    assert (velocity(taken, kept_BT=moved) - found).abs().max() > 1e-3
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(velocity(image, kept_BT=places[:, order]), found[:, order], rtol=0, atol=1e-12)
    # Experts compete for the tokens that are seen: ceil(6 x 2 / 4) of them each, so 12 picks for 6 tokens.
    for stage in stages:
        assert all(stats.picks == 2 for stats in stage.take_stats(1).values())
