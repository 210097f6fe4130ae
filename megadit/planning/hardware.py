"""GPUs, as their datasheets and measurements know them: rates, memory, links, and how much of each a program gets."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from megadit.training.config import DTYPES, check_known

SPARE = 0.1  # of a GPU's memory, for what CUDA, NCCL and fragmentation take


@dataclass(frozen=True)
class Efficiency:
    """What part of a datasheet's rate a program gets, and what each call costs however little it does.

    The defaults are for GPUs that nobody has calibrated.
    """

    # Matrix products of a transformer's shapes in bfloat16: 720 of 989 TFLOP/s on an H100 ("MI300X vs H100 vs H200
    # Benchmark Part 1: Training", SemiAnalysis 2024). The best shape of all gets 0.80 there, 0.86 on an A100 and 0.78
    # on a B200 ("Maximum Achievable Matmul FLOPS" in S. Bekman's ML Engineering).
    matrix: float = 0.73
    memory: float = 0.9  # assumed: what large copies reach
    # 370 of 450 GB/s of NVLink on an H100, the rest is protocol (an author of NCCL in NVIDIA/nccl-tests, issue 212).
    link: float = 0.82
    network: float = 0.8  # assumed: as above, and some congestion
    launch_seconds: float = 4e-6  # of each kernel; assumed: what the shortest one takes when torch launches it
    latency_seconds: float = 2e-5  # of each collective within a node; assumed
    message_seconds: float = (
        0.0  # of each message that a rank sends in a collective; gloo's rings send one after another
    )
    network_latency_seconds: float = 5e-5  # of each collective over several nodes; assumed


@dataclass(frozen=True)
class Gpu:
    """One device and its share of a node: the vendor's rates, and the `efficiency` with which programs use them.

    A CPU is one too: a rank is a process, and the rates are what one process has when it is alone.
    """

    name: str
    memory_bytes: int
    matrix_rate: dict[str, float]  # FLOP/s of dense matrix products, without sparsity, by dtype
    memory_bandwidth: float  # bytes/s
    link_bandwidth: float  # bytes/s to GPUs of the same node, in each direction
    network_bandwidth: float  # bytes/s to other nodes for each GPU, in each direction
    gpus_per_node: int = 8
    cores: int = 0  # that the ranks of a node share, for CPUs; 0: every rank has a device of its own
    efficiency: Efficiency = field(default_factory=Efficiency)

    def rate(self, dtype: str) -> float:
        """FLOP/s of matrix products, before efficiency. Raises ValueError for a dtype whose rate nobody gave."""
        if dtype not in self.matrix_rate:
            known = ", ".join(self.matrix_rate)
            raise ValueError(f"GPU {self.name} has no matrix_rate for {dtype}, only for {known}; add it, or use those")
        return self.matrix_rate[dtype]

    def slowdown(self, ranks_on_node: int) -> float:
        """How many times longer each rank computes when all ranks of a node do, for they share its cores; 1 on GPUs."""
        return max(1.0, ranks_on_node / self.cores) if self.cores else 1.0

    def to_yaml(self) -> str:
        """As `load_gpu` reads it back."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


# float32 is the vector units' rate, for torch does not use TF32 unless it is told to; float64 is the tensor cores'.
# Memory is in decimal gigabytes: CUDA reports a few percent more and takes about as much for itself.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(  # "NVIDIA A100 80GB SXM" in the A100 Tensor Core GPU datasheet; network: DGX A100 datasheet, 200 Gb/s each
            name="a100",
            memory_bytes=80 * 10**9,
            matrix_rate={"bfloat16": 312e12, "float32": 19.5e12, "float64": 19.5e12},
            memory_bandwidth=2.039e12,
            link_bandwidth=300e9,
            network_bandwidth=25e9,
        ),
        Gpu(  # "H100 SXM" in the H100 Tensor Core GPU datasheet; network: DGX H100 datasheet, 400 Gb/s each
            name="h100",
            memory_bytes=80 * 10**9,
            matrix_rate={"bfloat16": 989e12, "float32": 67e12, "float64": 67e12},
            memory_bandwidth=3.35e12,
            link_bandwidth=450e9,
            network_bandwidth=50e9,
        ),
        Gpu(  # "H200 SXM" in the H200 Tensor Core GPU datasheet; network: DGX H200 datasheet, 400 Gb/s each
            name="h200",
            memory_bytes=141 * 10**9,
            matrix_rate={"bfloat16": 989e12, "float32": 67e12, "float64": 67e12},
            memory_bandwidth=4.8e12,
            link_bandwidth=450e9,
            network_bandwidth=50e9,
        ),
        Gpu(  # "HGX B200" in the Blackwell datasheet, for one GPU; network: DGX B200 datasheet, 400 Gb/s each
            name="b200",
            memory_bytes=180 * 10**9,
            matrix_rate={"bfloat16": 2250e12, "float32": 75e12, "float64": 37e12},
            memory_bandwidth=7.7e12,
            link_bandwidth=900e9,
            network_bandwidth=50e9,
        ),
    )
}


def load_gpu(name_or_path: str) -> Gpu:
    """A GPU of the table, or the one that a YAML file describes: the fields of `Gpu`.

    Raises ValueError that names the nearest GPU for an unknown one, and file and key for a file that will not do.
    """
    if Path(name_or_path).suffix not in (".yaml", ".yml"):
        check_known(name_or_path, GPUS, "GPU")
        return GPUS[name_or_path]
    try:
        raw = yaml.safe_load(Path(name_or_path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"GPU {name_or_path}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"GPU {name_or_path}: not valid YAML: {' '.join(str(error).split())}") from error
    try:
        return _parse(raw)
    except ValueError as error:
        raise ValueError(f"GPU {name_or_path}: {error}") from error


def _parse(raw: Any) -> Gpu:
    """A Gpu from plain data. Raises ValueError that names the key."""
    if not isinstance(raw, dict):
        raise ValueError(f"expected keys ({', '.join(_names(Gpu))}), found {raw!r}")
    for prefix, values, known in (
        ("", raw, _names(Gpu)),
        ("matrix_rate.", raw.get("matrix_rate"), DTYPES),
        ("efficiency.", raw.get("efficiency"), _names(Efficiency)),
    ):
        for key in values if isinstance(values, dict) else ():
            check_known(key, known, "key", prefix)
    try:
        gpu = TypeAdapter(Gpu).validate_python(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        given = "" if first["type"] == "missing" else f"={first['input']!r}"
        raise ValueError(f"{key}{given}: {first['msg'][0].lower()}{first['msg'][1:]}") from error
    _check_numbers(gpu)
    return gpu


def _names(kind: type) -> list[str]:
    return [known.name for known in dataclasses.fields(kind)]


def _check_numbers(gpu: Gpu) -> None:
    """Raises ValueError for a rate of 0, a part of more than 1, and what is no number."""
    numbers = dataclasses.asdict(gpu)
    del numbers["name"]
    for section in ("matrix_rate", "efficiency"):
        numbers |= {f"{section}.{key}": value for key, value in numbers.pop(section).items()}
    for key, value in numbers.items():
        if key == "cores" or key.endswith("_seconds"):
            wanted, holds = "0 or more", 0 <= value < math.inf
        elif key.startswith("efficiency."):
            wanted, holds = "more than 0 and at most 1", 0 < value <= 1
        else:
            wanted, holds = "more than 0", 0 < value < math.inf
        if not holds:  # NaN too
            raise ValueError(f"{key}={value} must be {wanted}")
