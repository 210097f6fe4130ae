"""A dense checkpoint becomes a mixture of experts: each expert starts as the layer that it is put in the place of.

Sparse upcycling (Komatsuzaki et al., arXiv 2212.05055). The router starts as in a new network. Masters, averages and
moments come along, so that the run goes on where it was.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor

from megadit.checkpoint.source import CheckpointSource, FolderSource, Source, open_source
from megadit.checkpoint.stream import Outgoing
from megadit.conversion.mapping import widest
from megadit.conversion.run_folder import run_dtype, weights_only, write_run_folder
from megadit.conversion.weights import (
    Bar,
    Parameter,
    Weights,
    checkpoint_weights,
    differences,
    exported_weights,
    listing,
    parameters_of,
    read_in_parts,
)
from megadit.model.config import ROUTING_PRESETS, ECDiTConfig
from megadit.model.weights import init_of
from megadit.parallel.layout import ParallelConfig
from megadit.runtime.seed import stream
from megadit.training.build import tokenizer_beside
from megadit.training.config import RunConfig, check, check_known, differing, parse
from megadit.training.drawn import as_drawn

# What may change of a model section: how tokens are routed, and to what.
ROUTING = frozenset({
    "routing_preset", "routing", "experts", "expert_ratio", "moe_every", "dense_first", "capacity_factor",
    "capacity_overrides", "routing_group", "gate", "normalise_gates", "route_scale", "router_input", "shared_experts",
    "shared_ratio", "top_k", "dropless", "balance_loss", "balance_counts",
})  # fmt: skip
MOMENTS = ("exp_avg", "exp_avg_sq")
_EXPERT = re.compile(r"(blocks\.\d+\.feedforward)\.experts\.(up|gate|down)(_bias)?")
_NOISE_ROWS = 256  # that are drawn at a time


@dataclass(frozen=True)
class Upcycled:
    """What was made. `departures`: why the network does not compute what the dense one did; empty when it does."""

    line: str
    departures: list[str]


def upcycle(
    path: Path, destination: Path, overrides: Sequence[str], noise: float, seed: int | None, bar: Bar
) -> Upcycled:
    """Make a run's folder of the dense checkpoint or export at `path`, with experts as `overrides` say.

    noise: standard deviation of what is added to each expert, relative to that of the dense weights. seed: of the
    noise and the router, by default the run's. Raises ValueError before anything is written.
    """
    dense = open_dense(path)
    if not 0 <= noise < float("inf"):
        raise ValueError(f"--noise {noise} must be 0 or more")
    config = with_experts(dense.config, overrides)
    run = dataclasses.replace(config.run, dir=str(destination.absolute()), name=destination.name)
    config = dataclasses.replace(config, run=run)
    dtypes = dtypes_of(dense.source)
    if isinstance(dense.source, FolderSource):
        dtypes = {"weight": run_dtype({dtypes["weight"]})}
        config = weights_only(config, destination, dtypes["weight"])
    maker = Maker(dense.source, dtypes, config, noise, config.run.seed if seed is None else seed)
    tensors = maker.tensors(dense.config)
    write_run_folder(destination, config, dense.step, tensors, dense.tokenizer, bar)
    what = f"{config.model.experts} experts in {layers_text(config)}"
    return Upcycled(f"{destination}: step {dense.step}, {', '.join(dtypes)}; {what}", departures(config.model, noise))


def layers_text(config: RunConfig) -> str:
    layers = [str(layer) for layer in range(config.model.layers) if config.model.is_moe(layer)]
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(layers)}"


def open_dense(path: Path) -> Weights:
    """The weights at `path`. Raises ValueError unless they are a dense network of ours, and its state is complete."""
    source = open_source(path)
    if isinstance(source, CheckpointSource):
        dense = checkpoint_weights(source, "model", tokenizer_beside(path))
        check_kinds(source)
    else:
        if "format" not in source.config:
            raise ValueError(f"{path} is no checkpoint or export of ours; import it first")
        dense = exported_weights(source)
    if dense.config.model.has_experts:
        raise ValueError(f"{source.path} has experts already; upcycle starts from a dense model")
    return dense


def dtypes_of(source: Source) -> dict[str, torch.dtype]:
    """What there is of each parameter, and in which precision: weight, and in training master, ema and moments."""
    if isinstance(source, FolderSource):
        return {"weight": widest(spec.dtype for spec in source.tensors.values())}
    kinds = dict.fromkeys(name.partition(".")[0] for name in source.tensors)
    return {
        kind: widest(spec.dtype for name, spec in source.tensors.items() if name.startswith(f"{kind}."))
        for kind in kinds
    }


def check_kinds(source: CheckpointSource) -> None:
    """Raises ValueError listing the tensors that one kind has of the weights' names and shapes, and another lacks."""
    wanted = {name: spec.shape for name, spec in source.parameters("weight").items()}
    faults = []
    for kind in dtypes_of(source):
        found = {name: spec.shape for name, spec in source.parameters(kind).items()}
        faults += [f"{kind}.{fault}" for fault in differences(wanted, found, "weight", kind)]
    if faults:
        raise ValueError(listing(f"{source.path} is not complete", faults))


def with_experts(dense: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """The configuration with experts. Raises ValueError when overrides ask for more, or for less, than that."""
    raw = dense.to_dict()
    before = dict(raw["model"])
    given = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key.startswith("model."):
            raise ValueError(
                f"{override!r} is not of the form model.key=value; other sections may change when training"
            )
        check_known(key.removeprefix("model."), list(before), "key", prefix="model.")
        given[key.removeprefix("model.")] = yaml.safe_load(value) if value else ""
    preset = given.get("routing_preset") or ""
    if preset:
        check_known(preset, ROUTING_PRESETS, "model.routing_preset")
    raw["model"] = {**before, **ROUTING_PRESETS.get(preset, {}), **given}
    config = parse(raw, "upcycle")
    after = config.to_dict()["model"]
    other = [change for key in after if key not in ROUTING for change in differing("model", before, {key: after[key]})]
    if other:
        raise ValueError(f"upcycling adds experts and changes nothing else of a model, but {'; '.join(other)}")
    if not config.model.has_experts:
        raise ValueError("the model would stay dense; set model.experts=8, or model.routing=expert_choice")
    if config.model.expert_hidden != config.model.hidden:
        raise ValueError(
            f"model.expert_ratio={config.model.expert_ratio} makes experts of hidden width "
            f"{config.model.expert_hidden}, the dense layers have {config.model.hidden}; leave it out"
        )
    check(as_drawn(config, 1, ParallelConfig()), 1)
    return config


def departures(model: ECDiTConfig, noise: float) -> list[str]:
    """Why a network of experts that are all the dense layer does not compute what that did; empty when it does.

    It does when every token is certain to be taken, and gates sum to 1 over the experts that took it.
    """
    factors = [model.capacity_factor_of(layer) for layer in range(model.layers) if model.is_moe(layer)]
    if model.routing == "expert_choice":
        seated = takes_all = min(factors) >= model.experts
        cure = f"model.capacity_factor={model.experts}"
    else:
        # A token's picks are of different experts, so one of them may be asked by all tokens.
        seated = model.dropless or model.top_k * min(factors) >= model.experts
        takes_all = seated and model.top_k == model.experts
        cure = "model.dropless=true"
    reasons = []
    if not seated:
        reasons.append(f"not every token is certain of an expert (with {cure} it is)")
    if not (model.normalise_gates or (model.gate == "softmax" and takes_all)):
        reasons.append("a token's gates do not sum to 1 (with model.normalise_gates=true they do)")
    if model.route_scale != 1:
        reasons.append(f"gates are multiplied by model.route_scale={model.route_scale}")
    if model.shared_experts:
        reasons.append("shared experts are added to what the dense layer was")
    if noise:
        reasons.append(f"experts differ by noise of {noise}")
    return reasons


class Maker:
    """Makes each tensor of the network with experts, of the dense one's, when it is written."""

    def __init__(
        self, source: Source, dtypes: Mapping[str, torch.dtype], config: RunConfig, noise: float, seed: int
    ) -> None:
        """`dtypes`: of each kind of tensor that is made."""
        self.source, self.dtypes, self.config, self.noise, self.seed = source, dtypes, config, noise, seed

    def tensors(self, dense: RunConfig) -> list[Outgoing]:
        known = parameters_of(dense)
        return [
            self._copied(kind, name) if name in known else self._made(kind, name, parameter)
            for kind in self.dtypes
            for name, parameter in parameters_of(self.config).items()
        ]

    def _key(self, kind: str, name: str) -> str:
        return name if isinstance(self.source, FolderSource) else f"{kind}.{name}"

    def _copied(self, kind: str, name: str) -> Outgoing:
        key = self._key(kind, name)
        dtype = self.dtypes[kind]

        def parts() -> Iterator[Tensor]:
            return (part.to(dtype) for part in read_in_parts(self.source, key))

        return Outgoing(f"{kind}.{name}", self.source.tensors[key].shape, dtype, parts)

    def _made(self, kind: str, name: str, parameter: Parameter) -> Outgoing:
        dtype = self.dtypes[kind]
        expert = _EXPERT.fullmatch(name)
        if expert is not None:
            dense = f"{expert[1]}.{expert[2]}.{'bias' if expert[3] else 'weight'}"
            return Outgoing(
                f"{kind}.{name}", parameter.shape, dtype, lambda: self._experts(kind, name, dense, parameter, dtype)
            )
        return Outgoing(f"{kind}.{name}", parameter.shape, dtype, lambda: self._drawn(kind, name, parameter, dtype))

    def _experts(self, kind: str, name: str, dense: str, parameter: Parameter, dtype: torch.dtype) -> Iterator[Tensor]:
        # A dense layer's matrix is [out, in], an expert's [in, out].
        if not self.noise or kind in MOMENTS:
            whole = self._read(kind, dense)
            for _ in range(parameter.shape[0]):
                yield whole[None].to(dtype)
            return
        # Weights are rounded masters; averages move by the same noise.
        base = self._read("master" if kind == "weight" and "master" in self.dtypes else kind, dense)
        reference = base if kind != "ema" else self._read("master" if "master" in self.dtypes else "weight", dense)
        scale = self.noise * float(reference.double().square().mean().sqrt())
        for expert in range(parameter.shape[0]):
            generator = stream(self.seed, "upcycle", name, expert)
            noisy = torch.empty_like(base, dtype=dtype)
            for rows, out in zip(base.split(_NOISE_ROWS), noisy.split(_NOISE_ROWS), strict=True):
                # In float64: float32 normals differ between CPUs of different vector width.
                drawn = torch.randn(rows.shape, generator=generator, dtype=torch.float64)
                out.copy_((rows.double() + scale * drawn).to(base.dtype))
            yield noisy[None]

    def _read(self, kind: str, dense: str) -> Tensor:
        whole = self.source.read(self._key(kind, dense))
        return whole.t().contiguous() if whole.ndim == 2 else whole

    def _drawn(self, kind: str, name: str, parameter: Parameter, dtype: torch.dtype) -> Iterator[Tensor]:
        """As a new network draws it; its moments are 0."""
        if kind in MOMENTS:
            yield torch.zeros(parameter.shape, dtype=dtype)
            return
        assert "ep" not in parameter.placement.cut_axes, name
        drawn = init_of(name, self.config.model, self.config.text).draw(parameter.shape, stream(self.seed, name))
        # Masters begin as the parameters that a run draws, in their precision.
        yield drawn.to(self.dtypes["weight"]).to(dtype)
