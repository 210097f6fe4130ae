"""Time one mixture-of-experts layer, forward and backward, against its matrix products alone and against other code.

    python tools/bench_moe.py                                  # the layer of EC-DiT-XL-32E, 4 images of 1,024 tokens
    python tools/bench_moe.py --only floor,ours,einsum         # some contestants only
    python tools/bench_moe.py --sweep                          # floor and ours with 8 to 128 experts, as many tokens
    python tools/bench_moe.py --device cuda --dtype bfloat16 --images 64 --json moe.json

What is timed is one forward and the gradients of the input and of every weight, into fresh memory. Contestants take
turns, a round of all of them after another, so that a machine that slows down slows all of them; a ratio is formed
within each round, and its median and quartiles are printed. One untimed round comes first.

  floor                the experts' matrix products and nothing else: for each of the two matrices the product forward,
                       the gradient of its input and the gradient of its weight
  dense                a dense layer of equal FLOPs: hidden width capacity factor x 4 d, for every token
  ours                 expert choice, megadit.model.moe
  ours-token-choice    the same layer, each token asking for its best two experts, of equal capacity
  einsum               expert choice as research code has it: one-hot dispatch masks and einsum, image by image
  deepspeed            deepspeed.moe.layer.MoE, top 2, of equal capacity over all images; one rank
  ours-nucleus         the layer configured as Nucleus-Image has it: SwiGLU experts of equal FLOPs, a router that reads
                       the timestep too, normalised gates, and a shared expert, which adds FLOPs of its own
  nucleus-loop         diffusers' NucleusMoELayer in the same configuration, a loop over experts
  nucleus-grouped      the same with grouped matrix products

GFLOP counts the matrix products of forward and backward that were really done. "x ours" divides by our layer in the
same configuration: by ours-nucleus for the nucleus rows, by ours for the others.

"Peak" is the most memory that a step holds above weights and inputs, that is activations, gradients and temporaries:
on CUDA torch.cuda.max_memory_allocated; on the CPU the running sum of all allocations and frees that torch's
allocator reports to the profiler in an untimed step (what a maths library allocates for itself is not in it).

What cannot run here says why. The tool needs about five times the memory of the experts' weights. On the CPU a part of
each step goes into page faults of fresh memory, that of the weights' gradients above all: more with more experts, for
every contestant.
"""

# ruff: noqa: E402 (the command line comes first)
from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

DTYPES = ("float64", "float32", "bfloat16")
NAMES = (
    "floor",
    "dense",
    "ours",
    "ours-token-choice",
    "einsum",
    "deepspeed",
    "ours-nucleus",
    "nucleus-loop",
    "nucleus-grouped",
)


def positive(kind: type[int] | type[float]) -> Callable[[str], int | float]:
    """A number above 0, for argparse."""

    def parse(text: str) -> int | float:
        number = kind(text)
        if not 0 < number < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not more than 0")
        return number

    parse.__name__ = kind.__name__
    return parse


def experts_list(text: str) -> list[int]:
    """8,16,32 -> [8, 16, 32], for argparse."""
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text} has a number that is not more than 0")
    return numbers


def contestants(text: str) -> list[str]:
    """Names with commas between them, for argparse."""
    names = text.split(",")
    for name in names:
        if name not in NAMES:
            raise argparse.ArgumentTypeError(f"there is no contestant {name!r}; there are {', '.join(NAMES)}")
    return names


def arguments() -> argparse.Namespace:
    """What the user asks for; ends the process with a message where that cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    natural, real = positive(int), positive(float)
    parser.add_argument("--width", type=natural, default=1152, help="model width d (default: %(default)s)")
    parser.add_argument("--experts", type=natural, default=32, help="number of experts (default: %(default)s)")
    parser.add_argument("--images", type=natural, default=4, help="images of a step (default: %(default)s)")
    parser.add_argument("--tokens", type=natural, default=1024, help="tokens of an image (default: %(default)s)")
    parser.add_argument(
        "--capacity-factor", type=real, default=2.0, help="mean experts of a token (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of everything (default: %(default)s)")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA where there is a GPU"
    )
    parser.add_argument("--repeats", type=natural, default=7, help="timed rounds (default: %(default)s)")
    parser.add_argument("--only", type=contestants, default=list(NAMES), metavar="NAME,NAME", help="default: all")
    parser.add_argument(
        "--sweep",
        type=experts_list,
        nargs="?",
        const=[8, 16, 32, 64, 128],
        default=[],
        metavar="N,N",
        help="instead of the contest, time floor and ours with these numbers of experts (8,16,32,64,128 if none are "
        "named), for the same tokens",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured there too")
    args = parser.parse_args()
    if args.json is not None and (args.json.is_dir() or not args.json.parent.is_dir()):
        parser.error(f"--json {args.json}: that is a folder, or there is no folder {args.json.parent}")
    import torch  # last: it takes seconds

    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    return args


if __name__ == "__main__":  # before the imports below, which take seconds
    arguments()

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from megadit.model.config import ROUTING_PRESETS, ECDiTConfig
from megadit.model.moe import MoE
from megadit.parallel.grid import Group
from megadit.parallel.tensor.mappings import ReplicatedTokens

TOP_K = 2
LAYER = 0
# Variables that change what fresh memory costs.
ALLOCATION = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD", "THP_MEM_ALLOC_ENABLE")


class CannotRun(Exception):
    """This contestant does not run here; the message says why."""


@dataclass(frozen=True)
class Setting:
    """Sizes of the layer and of what passes through it. Shapes: B images, T tokens, D width, E experts, F hidden."""

    width: int = 1152
    experts: int = 32
    images: int = 4
    tokens: int = 1024
    capacity_factor: float = 2.0
    dtype: str = "float32"
    device: str = "cpu"

    def config(self, **changes: Any) -> ECDiTConfig:
        """Our layer's configuration; every layer has experts."""
        shape = {"width": self.width, "experts": self.experts, "capacity_factor": self.capacity_factor, "moe_every": 1}
        return ECDiTConfig(**(shape | changes))

    @property
    def picks(self) -> int:
        """Tokens that each expert computes, of all images."""
        return self.images * self.config().capacity(LAYER, self.tokens)


@contextmanager
def group_of_one() -> Iterator[Group]:
    """A process group of this process alone, over gloo on any device: one rank exchanges nothing."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        handle = dist.group.WORLD
        assert handle is not None
        yield Group(handle, size=1, rank=0)
    finally:
        dist.destroy_process_group()


class Problem:
    """What the contestants share: inputs, the gradient of the output, and weights, which are drawn when first used."""

    def __init__(self, setting: Setting, group: Group) -> None:
        self.setting, self.group = setting, group
        self._generator = torch.Generator(setting.device).manual_seed(0)
        shape = (setting.images, setting.tokens, setting.width)
        self.x_BTD = self.draw(*shape).requires_grad_()
        self.plain_BTD = self.draw(*shape).requires_grad_()  # the nucleus router's tokens
        self.time_BD = self.draw(setting.images, setting.width).requires_grad_()
        self.gradient_BTD = self.draw(*shape)

    def draw(self, *shape: int, deviation: float = 1.0) -> Tensor:
        """Normal elements of the setting's type on its device."""
        factory: dict[str, Any] = {"dtype": getattr(torch, self.setting.dtype), "device": self.setting.device}
        return torch.empty(*shape, **factory).normal_(0, deviation, generator=self._generator)

    def _weights(self, config: ECDiTConfig) -> dict[str, Tensor]:
        names = our_layer(config, self.group).named_parameters()
        return {name: self.draw(*weight.shape, deviation=config.width**-0.5) for name, weight in names}

    @cached_property
    def gelu(self) -> dict[str, Tensor]:
        """router.weight [E, D], experts.up [E, D, F], experts.down [E, F, D]."""
        return self._weights(self.setting.config())

    @cached_property
    def nucleus_config(self) -> ECDiTConfig:
        """Three matrices, so two thirds of the hidden width."""
        sizes = {"experts": self.setting.experts, "capacity_factor": self.setting.capacity_factor}
        places = {"moe_every": 1, "dense_first": 0}
        return self.setting.config(**(ROUTING_PRESETS["nucleus"] | sizes | places | {"expert_ratio": 8 / 3}))

    @cached_property
    def swiglu(self) -> dict[str, Tensor]:
        """The router's, the experts' and the shared expert's, under our layer's names."""
        return self._weights(self.nucleus_config)

    @cached_property
    def gate_up(self) -> Tensor:
        """The experts' gate and up matrices side by side, [E, D, 2F]."""
        return torch.cat([self.swiglu["experts.gate"], self.swiglu["experts.up"]], dim=2)

    def of_fewer_experts(self, experts: int) -> Problem:
        """The same with the first so many of the GELU experts, in the same memory."""
        fewer = Problem(replace(self.setting, experts=experts), self.group)
        fewer.gelu = {name: weight[:experts] for name, weight in self.gelu.items()}
        return fewer


def our_layer(config: ECDiTConfig, group: Group) -> MoE:
    """The layer without memory: its weights are put in by name."""
    with torch.device("meta"):
        return MoE(config, LAYER, ReplicatedTokens(group), group)


class Contestant(NamedTuple):
    """step: forward and backward; gives [output, gradients of inputs, gradients of weights]."""

    step: Callable[[], Sequence[Tensor]]
    rival: str = "ours"  # our row that this one is compared with


def of_autograd(
    problem: Problem, forward: Callable[..., Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor], rival: str
) -> Contestant:
    """What autograd differentiates."""
    leaves = [*inputs, *weights]

    def step() -> Sequence[Tensor]:
        out_BTD = forward(*inputs)
        out_BTD.backward(problem.gradient_BTD)
        results = [out_BTD.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]
        for leaf in leaves:
            leaf.grad = None
        return results

    return Contestant(step, rival)


def of_module(
    problem: Problem,
    module: nn.Module,
    weights: dict[str, Tensor],
    inputs: Sequence[Tensor],
    forward: Callable[..., Tensor],
    rival: str = "ours",
) -> Contestant:
    """A module that was built without memory, with these weights by name."""
    module.load_state_dict(weights, assign=True)
    return of_autograd(problem, forward, inputs, list(module.parameters()), rival)


def floor(problem: Problem) -> Contestant:
    """The matrix products of `Experts`, on inputs of the right shapes."""
    up_EDF, down_EFD = problem.gelu["experts.up"], problem.gelu["experts.down"]
    experts, width, hidden = up_EDF.shape
    x_ECD = problem.draw(experts, problem.setting.picks, width)
    out_gradient_ECD = problem.draw(experts, problem.setting.picks, width)
    hidden_ECF = problem.draw(experts, problem.setting.picks, hidden)
    hidden_gradient_ECF = problem.draw(experts, problem.setting.picks, hidden)

    def step() -> Sequence[Tensor]:
        torch.bmm(x_ECD, up_EDF)
        out_ECD = torch.bmm(hidden_ECF, down_EFD)
        down_gradient_EFD = torch.bmm(hidden_ECF.mT, out_gradient_ECD)
        torch.bmm(out_gradient_ECD, down_EFD.mT)
        up_gradient_EDF = torch.bmm(x_ECD.mT, hidden_gradient_ECF)
        return [out_ECD, torch.bmm(hidden_gradient_ECF, up_EDF.mT), up_gradient_EDF, down_gradient_EFD]

    return Contestant(step)


def dense(problem: Problem) -> Contestant:
    """Every token through one wide layer."""
    setting = problem.setting
    hidden = round(setting.capacity_factor * setting.config().hidden)
    up_FD = problem.draw(hidden, setting.width, deviation=setting.width**-0.5).requires_grad_()
    down_DF = problem.draw(setting.width, hidden, deviation=hidden**-0.5).requires_grad_()

    def forward(x_BTD: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x_BTD, up_FD), approximate="tanh"), down_DF)

    return of_autograd(problem, forward, [problem.x_BTD], [up_FD, down_DF], "ours")


def ours(problem: Problem, **changes: Any) -> Contestant:
    """Our layer; the changes are to its configuration."""
    moe = our_layer(problem.setting.config(**changes), problem.group)
    return of_module(problem, moe, problem.gelu, [problem.x_BTD], lambda x_BTD: moe(x_BTD, x_BTD, problem.time_BD)[0])


def token_choice(problem: Problem) -> Contestant:
    """The same layer in the field's usual mode."""
    if problem.setting.experts < TOP_K:
        raise CannotRun(f"a token asks for {TOP_K} experts")
    return ours(problem, routing="token_choice", top_k=TOP_K, capacity_factor=problem.setting.capacity_factor / TOP_K)


def einsum(problem: Problem) -> Contestant:
    """Dispatch and combine as products with one-hot masks [B, E, C, T], as in the appendix of arXiv 2202.09368."""
    router_ED, up_EDF, down_EFD = (
        problem.gelu[name].detach().requires_grad_() for name in ("router.weight", "experts.up", "experts.down")
    )
    capacity = problem.setting.config().capacity(LAYER, problem.setting.tokens)

    def forward(x_BTD: Tensor) -> Tensor:
        routed = torch.promote_types(x_BTD.dtype, torch.float32)
        affinity_BTE = F.linear(x_BTD.to(routed), router_ED.to(routed)).softmax(dim=-1)
        gate_BEC, index_BEC = affinity_BTE.mT.topk(capacity, dim=2)
        mask_BECT = F.one_hot(index_BEC, x_BTD.shape[1]).to(x_BTD.dtype)
        picked_BECD = torch.einsum("bect,btd->becd", mask_BECT, x_BTD)
        hidden_BECF = F.gelu(torch.einsum("becd,edf->becf", picked_BECD, up_EDF), approximate="tanh")
        expert_BECD = torch.einsum("becf,efd->becd", hidden_BECF, down_EFD)
        return torch.einsum("bect,bec,becd->btd", mask_BECT, gate_BEC.to(x_BTD.dtype), expert_BECD)

    return of_autograd(problem, forward, [problem.x_BTD], [router_ED, up_EDF, down_EFD], "ours")


def deepspeed(problem: Problem) -> Contestant:
    """DeepSpeed's layer; its experts are modules of linear layers, so it has its own copy of the weights."""
    setting = problem.setting
    os.environ.setdefault("DS_ACCELERATOR", setting.device)
    try:
        from deepspeed.moe.layer import MoE as DeepSpeedMoE
    except ImportError as error:
        raise CannotRun(f"deepspeed is not installed ({error})") from error
    hidden = setting.config().expert_hidden
    with torch.device("meta"):
        moe = DeepSpeedMoE(
            setting.width,
            nn.Sequential(
                nn.Linear(setting.width, hidden, bias=False),
                nn.GELU(approximate="tanh"),
                nn.Linear(hidden, setting.width, bias=False),
            ),
            num_experts=setting.experts,
            k=TOP_K,
            capacity_factor=setting.capacity_factor / TOP_K,
            min_capacity=0,
            top2_2nd_expert_sampling=False,  # its default adds noise to the choice
        )
    weights = {"deepspeed_moe.gate.wg.weight": problem.gelu["router.weight"]}
    for i, (up_DF, down_FD) in enumerate(zip(problem.gelu["experts.up"], problem.gelu["experts.down"], strict=True)):
        expert = f"deepspeed_moe.experts.deepspeed_experts.{i}"
        weights[f"{expert}.0.weight"] = up_DF.t().contiguous()
        weights[f"{expert}.2.weight"] = down_FD.t().contiguous()
    return of_module(problem, moe, weights, [problem.x_BTD], lambda x_BTD: moe(x_BTD)[0])


def our_nucleus(problem: Problem) -> Contestant:
    """Our layer as Nucleus-Image routes."""
    moe = our_layer(problem.nucleus_config, problem.group)
    inputs = [problem.x_BTD, problem.plain_BTD, problem.time_BD]
    return of_module(problem, moe, problem.swiglu, inputs, lambda *inputs: moe(*inputs)[0], "ours-nucleus")


def nucleus(problem: Problem, grouped: bool) -> Contestant:
    """diffusers' layer; gate and up are one matrix, so it has its own copy of them."""
    try:
        from diffusers.models.transformers.transformer_nucleusmoe_image import NucleusMoELayer
    except ImportError as error:
        raise CannotRun(f"diffusers with its NucleusMoELayer is not installed ({error})") from error
    config, ours = problem.nucleus_config, problem.swiglu
    with torch.device("meta"):
        layer = NucleusMoELayer(
            hidden_size=config.width,
            moe_intermediate_dim=config.expert_hidden,
            num_experts=config.experts,
            capacity_factor=config.capacity_factor,
            use_sigmoid=False,
            route_scale=config.route_scale,
            use_grouped_mm=grouped,
        )
    weights = {
        "gate.weight": ours["router.weight"],
        "experts.gate_up_proj": problem.gate_up,
        "experts.down_proj": ours["experts.down"],
        "shared_expert.net.0.proj.weight": torch.cat([ours["shared.up.weight"], ours["shared.gate.weight"]]),
        "shared_expert.net.2.weight": ours["shared.down.weight"],
    }
    inputs = [problem.x_BTD, problem.plain_BTD, problem.time_BD]
    return of_module(problem, layer, weights, inputs, layer, "ours-nucleus")


BUILDERS: tuple[Callable[[Problem], Contestant], ...] = (  # in the order of NAMES
    floor,
    dense,
    ours,
    token_choice,
    einsum,
    deepspeed,
    our_nucleus,
    lambda problem: nucleus(problem, grouped=False),
    lambda problem: nucleus(problem, grouped=True),
)
CONTESTANTS = dict(zip(NAMES, BUILDERS, strict=True))


class Ratio(NamedTuple):
    """Of two contestants' times, round by round: the median and the quartiles around it."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}-{self.high:.3f})"


@dataclass
class Row:
    """What was measured of one contestant; `missing` says why nothing was."""

    name: str
    rival: str = "ours"
    missing: str | None = None
    flops: int = 0
    peak_bytes: int = 0
    seconds: list[float] = field(default_factory=list)  # of each round

    def over(self, other: Row) -> Ratio | None:
        """This row's time over the other's, where both ran."""
        if not self.seconds or not other.seconds:
            return None
        ratios = [mine / others for mine, others in zip(self.seconds, other.seconds, strict=True)]
        low, middle, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        return Ratio(middle, low, high)


def grouped_flops(a_shape: torch.Size, b_shape: torch.Size, *rest: Any, **more: Any) -> int:
    """Of a grouped matrix product: rows x inner x columns, whichever of the three is the ragged one."""
    return 2 * a_shape.numel() * b_shape[-1]


def count_flops(step: Callable[[], Sequence[Tensor]]) -> int:
    """FLOPs of the matrix products of one step."""
    # torch's own counter takes a grouped product for nothing.
    grouped = {torch.ops.aten._grouped_mm: grouped_flops} if hasattr(torch.ops.aten, "_grouped_mm") else {}
    with FlopCounterMode(display=False, custom_mapping=grouped) as counter:
        step()
    return counter.get_total_flops()


def peak_bytes(step: Callable[[], Sequence[Tensor]], device: str) -> int:
    """The most memory that the step held at once, above what was held before it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def seconds_of(step: Callable[[], Sequence[Tensor]], device: str) -> float:
    """Time of one step. Freeing its results is not in it."""
    if device == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        results = step()
        end.record()
        end.synchronize()
        del results
        return begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    results = step()
    seconds = time.perf_counter() - start
    del results
    return seconds


def measure(
    builders: Mapping[str, Callable[[], Contestant]], device: str, repeats: int, memory: bool = True
) -> list[Row]:
    """Build each contestant, count its FLOPs (which warms it up), measure its memory, then time all in turns."""
    rows, steps = [], {}
    with tqdm(total=len(builders) * (repeats + 1), unit="step", dynamic_ncols=True) as bar:
        for name, build in builders.items():
            bar.set_description(f"{name}: first step")
            row = Row(name)
            rows.append(row)
            try:
                contestant = build()
                row.rival = contestant.rival
                row.flops = count_flops(contestant.step)
                row.peak_bytes = peak_bytes(contestant.step, device) if memory else 0
                steps[name] = contestant.step
            except CannotRun as error:
                row.missing = str(error)
            except (RuntimeError, NotImplementedError, TypeError, AttributeError) as error:
                if name.startswith(("floor", "ours")):
                    raise
                row.missing = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            bar.update()
        running = deque(row for row in rows if row.missing is None)
        bar.total = len(rows) + repeats * len(running)
        for turn in range(repeats):
            for row in running:
                bar.set_description(f"round {turn + 1} of {repeats}: {row.name}")
                row.seconds.append(seconds_of(steps[row.name], device))
                bar.update()
            running.rotate(-1)  # the next round begins with another one
    return rows


def hardware(device: str) -> dict[str, Any]:
    """What it ran on. load: processes that wanted a core just before, which tells a quiet machine."""
    found: dict[str, Any] = {"machine": platform.machine(), "system": platform.platform(), "cores": os.cpu_count()}
    cpuinfo, pages = Path("/proc/cpuinfo"), Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        found["processor"] = names[0] if names else "unknown"
    if pages.exists():
        found["huge_pages"] = pages.read_text().strip()
    found["environment"] = {key: os.environ[key] for key in ALLOCATION if key in os.environ}
    found |= {"threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 2)}
    if device == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability()}
    return found


def versions() -> dict[str, str]:
    """Of everything that is timed."""
    found = {"python": platform.python_version()}
    for package in ("torch", "deepspeed", "diffusers", "megadit"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def by_name(rows: Sequence[Row], name: str) -> Row:
    """The row of this name, or an empty one."""
    return next((row for row in rows if row.name == name), Row(name))


def table(rows: Sequence[Row]) -> str:
    """One line for each contestant."""
    head = f"{'':17s} {'seconds':>9s} {'GFLOP':>8s} {'GFLOP/s':>9s} {'peak MiB':>9s}   {'x floor':21s} x ours"
    lines = [head]
    for row in rows:
        if row.missing is not None:
            lines.append(f"{row.name:17s} cannot run: {row.missing}")
            continue
        seconds = median(row.seconds)
        lines.append(
            f"{row.name:17s} {seconds:9.4f} {row.flops / 1e9:8.1f} {row.flops / seconds / 1e9:9.1f} "
            f"{row.peak_bytes / 2**20:9.0f}   {row.over(by_name(rows, 'floor')) or '-'!s:21s} "
            f"{row.over(by_name(rows, row.rival)) or '-'}"
        )
    return "\n".join(lines)


def sweep_table(rows: Sequence[Row], sweep: Sequence[int]) -> str:
    """One line for each number of experts, and how much the number matters."""
    lines = [f"{'experts':>7s} {'floor':>9s} {'ours':>9s}   {'ours / floor':21s} ours / ours with {sweep[0]}"]
    first = by_name(rows, f"ours-{sweep[0]}")
    for experts in sweep:
        floor, ours = by_name(rows, f"floor-{experts}"), by_name(rows, f"ours-{experts}")
        lines.append(
            f"{experts:7d} {median(floor.seconds):9.4f} {median(ours.seconds):9.4f}   "
            f"{ours.over(floor)!s:21s} {ours.over(first)}"
        )
    for name in ("floor", "ours"):
        medians = [median(by_name(rows, f"{name}-{experts}").seconds) for experts in sweep]
        lines.append(f"{name}: slowest / fastest = {max(medians) / min(medians):.3f}")
    return "\n".join(lines)


def contest(problem: Problem, names: Sequence[str], repeats: int) -> list[Row]:
    """All the named contestants on one problem."""
    builders = {name: partial(CONTESTANTS[name], problem) for name in names}
    return measure(builders, problem.setting.device, repeats)


def sweep_experts(setting: Setting, group: Group, sweep: Sequence[int], repeats: int) -> list[Row]:
    """Floor and ours for each number of experts; all use the first experts of the largest problem."""
    largest = Problem(replace(setting, experts=max(sweep)), group)
    builders: dict[str, Callable[[], Contestant]] = {}
    for experts in sweep:
        problem = largest.of_fewer_experts(experts)
        builders[f"floor-{experts}"] = partial(floor, problem)
        builders[f"ours-{experts}"] = partial(ours, problem)
    return measure(builders, setting.device, repeats, memory=False)


def as_json(setting: Setting, rows: Sequence[Row], sweep: Sequence[int], found: dict[str, Any]) -> dict[str, Any]:
    """What goes into the file; it has the times of all rounds, so that any statistic can be taken later."""

    def of_row(row: Row) -> dict[str, Any]:
        floor_name = f"floor-{row.name.rpartition('-')[2]}" if sweep else "floor"
        ratios = {"over_floor": row.over(by_name(rows, floor_name)), "over_ours": row.over(by_name(rows, row.rival))}
        middle = {"median_seconds": median(row.seconds) if row.seconds else None}
        return asdict(row) | middle | {name: ratio and ratio._asdict() for name, ratio in ratios.items()}

    return {
        "setting": asdict(setting),
        "sweep": list(sweep),
        "hardware": found,
        "versions": versions(),
        "rows": [of_row(row) for row in rows],
    }


def main() -> int:
    args = arguments()
    setting = Setting(**{name: getattr(args, name) for name in Setting.__dataclass_fields__})
    found = hardware(setting.device)
    print(f"{found.get('gpu') or found.get('processor')}, {found['threads']} threads, load {found['load']}; {setting}")
    with group_of_one() as group:
        if args.sweep:
            rows = sweep_experts(setting, group, args.sweep, args.repeats)
            print(sweep_table(rows, args.sweep))
        else:
            rows = contest(Problem(setting, group), args.only, args.repeats)
            print(table(rows))
    if args.json is not None:
        args.json.write_text(json.dumps(as_json(setting, rows, args.sweep, found), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
