"""Forward and backward of a model with fixed shapes never wait for the host, and no shape depends on data.

On a CPU nothing waits, so it is the ways to wait that are refused: operators that hand a number to the host or whose
shape follows from values, and the methods of a tensor that no operator stands for. Beside that, the model runs on the
meta device, where a tensor has no values that anything could depend on.
"""

import contextlib
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megadit.model.config import ROUTING_PRESETS
from megadit.model.ecdit import ECDiT

FORBIDDEN = {
    *("_local_scalar_dense", "is_nonzero", "equal", "allclose"),
    *("nonzero", "masked_select", "bincount", "repeat_interleave"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"),
}
METHODS = ["item", "tolist", "numpy", "cpu", "__array__", "__bool__", "__int__", "__float__", "__index__"]
MASKS = (torch.bool, torch.uint8)


class HostSync(Exception):
    """Something that would wait for the device."""


class _RefuseOperators(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indexed = args[1] if name.startswith(("index", "_index")) and isinstance(args[1], (list, tuple)) else ()
        # Indexing with a mask has as many results as there are True in it.
        by_mask = any(index is not None and index.dtype in MASKS for index in indexed)
        if name in FORBIDDEN or by_mask:
            raise HostSync(f"{func}")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_sync():
    """Raises HostSync where something would wait for the device."""

    def refuse(name):
        def method(*args, **kwargs):
            raise HostSync(f"Tensor.{name}")

        return method

    with pytest.MonkeyPatch.context() as patch, _RefuseOperators():
        for name in METHODS:
            patch.setattr(torch.Tensor, name, refuse(name))
        yield


class InBackward(torch.autograd.Function):
    """Does something to the gradient."""

    @staticmethod
    def forward(ctx, x, act):
        ctx.act = act
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        ctx.act(grad)
        return grad, None


WAYS_TO_WAIT = {
    "item": lambda x: x[0, 0].item(),
    "float": lambda x: float(x.sum()),
    "int": lambda x: int(x.sum()),
    "if": lambda x: 1 if x.sum() > 0 else 2,
    "index of a list": lambda x: [1, 2][x.argmax() * 0],
    "a number of a tensor": lambda x: torch.arange(x.argmax()),
    "a bound of a slice": lambda x: x[: x.argmax()],
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.detach().numpy(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "one-argument where": lambda x: torch.where(x > 0),
    "mask": lambda x: x[x > 0],
    "mask of rows": lambda x: x[:, x[0] > 0],
    "assignment by mask": lambda x: x.clone().__setitem__(x > 0, 0.0),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "unique rows": lambda x: x.unique(dim=0),
    "unique_consecutive": lambda x: x.unique_consecutive(),
    "bincount": lambda x: x.argmax(0).bincount(),
    "repeat_interleave": lambda x: x.repeat_interleave(x.argmax(0), 0),
    "one_hot": lambda x: F.one_hot(x.argmax(0), 5),
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x),
}


@pytest.mark.parametrize("way", WAYS_TO_WAIT)
def test_the_guard_catches(randn, way):
    x, act = randn(4, 4), WAYS_TO_WAIT[way]
    act(x)
    with no_sync(), pytest.raises(HostSync):
        act(x)


@pytest.mark.parametrize("way", WAYS_TO_WAIT)
def test_the_guard_catches_in_the_backward_pass(randn, way):
    x = randn(4, 4).requires_grad_()
    with no_sync(), pytest.raises(HostSync):
        (2 * InBackward.apply(3 * x, WAYS_TO_WAIT[way])).sum().backward()
    assert x.grad is None


def test_the_guard_lets_pass_what_has_a_fixed_shape(randn):
    x, index = randn(4, 4).requires_grad_(), torch.tensor([2, 0])
    with no_sync():
        y = torch.where(x > 0, x, 0).masked_fill(x > 1, 2.0)[index].gather(1, index[:, None])
        y = y.index_add(0, index * 0, y.clone()).sort().values.topk(1).values
        (y.sum() + x[:, None].cumsum(0).sum()).backward()
    assert x.grad is not None


def batch_of(config, generator):
    """(noisy images, keyword arguments) of two images in float64."""
    size = (config.image_size, config.image_size)
    ids = torch.tensor([[2, 7, 8, 3, 0, 0], [2, 3, 0, 0, 0, 0]])
    keywords = {"timesteps_B": torch.tensor([0.3, 0.9], dtype=torch.float64), "size": size}
    captions = {"text_ids_BL": ids, "text_mask_BL": ids != 0}
    if config.positions == "rotary":
        keywords["kept_BT"] = torch.tensor([[1, 2, 4, 7, 11], [0, 3, 4, 9, 15]])
    keywords |= {"labels_B": torch.tensor([2, 3])} if config.conditioning == "class" else captions
    return generator(2, config.channels, *size), keywords


TOKEN_CHOICE = {"routing": "token_choice", "balance_loss": 0.1}
FIXED = {
    "expert_choice": {},
    "pairs_by_sigmoid": {"routing_group": 2, "gate": "sigmoid", "capacity_overrides": {3: 0.5}},
    "capacity": TOKEN_CHOICE,
    "capacity_of_pairs": TOKEN_CHOICE | {"routing_group": 2, "balance_counts": "first", "shared_experts": 1},
    "nucleus": ROUTING_PRESETS["nucleus"] | {"experts": 4, "capacity_factor": 2.0, "dense_first": 1},
    "gshard": ROUTING_PRESETS["gshard"] | {"experts": 4},
    "classes": {"conditioning": "class", "classes": 3},
    "dense": {"routing": "dense"},
    "adaln_single": {"modulation": "shared", "bias": True},
    "rotary_of_a_part": {"positions": "rotary", "head_width": 8},
    "per_layer_embedders": {"embedders": "per_layer", "conditioning": "class", "classes": 3},
}
CASES = [(model, "none") for model in FIXED]
CASES += [(model, recompute) for model in ("expert_choice", "capacity") for recompute in ("block", "moe")]
DROPLESS = TOKEN_CHOICE | {"dropless": True}


@pytest.fixture
def model_of(config, text, region, grid, filled):
    def build(changes, recompute="none"):
        config_of = replace(config, **{"modulation": "gated", **changes})
        return filled(ECDiT(config_of, text, range(config_of.layers), region, grid["ep"], recompute))

    return build


def loss_of(network, image, keywords):
    out = network(image, **keywords)
    return sum(part.square().sum() for part in (out if isinstance(out, tuple) else (out,)))


@pytest.mark.parametrize(("model", "recompute"), CASES)
def test_a_model_of_fixed_shapes_never_waits(model_of, randn, model, recompute):
    network = model_of(FIXED[model], recompute)
    image, keywords = batch_of(network.config, randn)
    with no_sync():
        loss_of(network, image, keywords).backward()
        stats = network.take_stats(1)
    assert all(parameter.grad.norm() > 0 for parameter in network.parameters())
    assert len(stats) == sum(network.config.is_moe(layer) for layer in range(4))


def test_without_a_capacity_the_host_waits_for_how_many_tokens_go_where(model_of, randn):
    network = model_of(DROPLESS)
    image, keywords = batch_of(network.config, randn)
    with no_sync(), pytest.raises(HostSync):
        network(image, **keywords)


def test_the_meta_device_has_no_values_to_bring_to_the_host():
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        torch.ones(2, device="meta").to("cpu")


def on_meta(value):
    return value.to("meta") if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize(("model", "recompute"), CASES)
def test_no_shape_depends_on_data(model_of, randn, model, recompute):
    """Nor is anything sent to another device, which no operator tells of on a CPU."""
    network = model_of(FIXED[model], recompute)
    image, keywords = batch_of(network.config, randn)
    network.to("meta")
    loss = loss_of(network, on_meta(image), {key: on_meta(value) for key, value in keywords.items()})
    loss.backward()
    assert all(parameter.grad.shape == parameter.shape for parameter in network.parameters())


def test_without_a_capacity_shapes_depend_on_data(model_of, randn):
    network = model_of(DROPLESS)
    image, keywords = batch_of(network.config, randn)
    network.to("meta")
    with pytest.raises(RuntimeError, match="meta"):
        network(on_meta(image), **{key: on_meta(value) for key, value in keywords.items()})
