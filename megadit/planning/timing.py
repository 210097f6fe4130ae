"""Seconds of kernels and of collectives on given hardware, and how well a step uses it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from megadit.planning.hardware import Gpu

# How often the tensor goes around a ring of n ranks, in n - 1 messages of an n-th of it each. So rounds x (n - 1) / n
# are the bytes that cross each rank's link for each byte of the whole tensor: the factors from "algorithm" to "bus"
# bandwidth of NCCL's tests (NVIDIA/nccl-tests, doc/PERFORMANCE.md). No algorithm of messages between ranks needs less.
# In-network reduction (SHARP) does with less, and is not modelled. What is not here goes as one message.
_ROUNDS = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1, "all-to-all": 1}
_ONE_MESSAGE = ("broadcast", "reduce", "send", "recv")


def messages(operation: str, group_size: int) -> tuple[int, float]:
    """(how many messages a rank sends one after another, bytes of them all for each byte of the whole tensor).

    >>> messages("all-reduce", 4)
    (6, 1.5)
    """
    if operation in _ONE_MESSAGE:
        return 1, 1.0
    count = _ROUNDS[operation] * (group_size - 1)
    return count, count / group_size


def seconds_of(operations: Iterable[tuple[int, int]] | Mapping[tuple[int, int], int], gpu: Gpu, dtype: str) -> float:
    """Seconds of kernels that run one after another, each given as (FLOPs, bytes read and written).

    `operations` may be a Counter, which is faster for many of a kind. Each kernel takes the longer of its arithmetic
    and its memory traffic (the roofline of Williams et al., 2009), and its launch. FLOPs are those of matrix products,
    at the rate of `dtype`; all other arithmetic hides behind the memory that it reads.
    """
    efficiency = gpu.efficiency
    rate = gpu.rate(dtype) * efficiency.matrix
    bandwidth = gpu.memory_bandwidth * efficiency.memory
    return sum(
        count * (max(flops / rate, nbytes / bandwidth) + efficiency.launch_seconds)
        for (flops, nbytes), count in Counter(operations).items()
    )


def members_per_node(members: Sequence[int], gpus_per_node: int) -> int:
    """How many of a group's ranks are on one node: the fewest, where nodes differ. Ranks fill one node after another.

    >>> members_per_node([0, 4, 8, 12], gpus_per_node=8)
    2
    """
    return min(Counter(rank // gpus_per_node for rank in members).values())


def spans_nodes(members: Sequence[int], gpus_per_node: int) -> bool:
    """Whether a group has ranks on more than one node."""
    return members_per_node(members, gpus_per_node) < len(members)


def seconds_of_collective(operation: str, nbytes: int, group_size: int, per_node: int, gpu: Gpu) -> float:
    """Seconds of one collective: a latency, and bytes over bandwidth.

    `nbytes` is of the whole tensor: the sum, what is gathered, what is scattered, what one rank sends in an exchange.
    `per_node`: of the group's ranks, those on one node; all of them, when it stays inside (`members_per_node`). A send
    has a group of two, sender and receiver.

    A group over several nodes uses the links and the network at the same time; the slower one counts. NCCL lays as many
    rings as a node has members, each leaving through another one's adapter, so that each adapter carries its part of
    the traffic and each link all of it; in an exchange, each rank sends to the others of its node over its link and to
    the rest through its adapter. The latency is one number for all sizes of group, as NCCL takes trees for short
    messages, and `Efficiency.message_seconds` for each message of a ring, which is what gloo takes.
    """
    if group_size == 1:
        return 0.0
    count, share = messages(operation, group_size)
    traffic, waiting = nbytes * share, count * gpu.efficiency.message_seconds
    link = gpu.link_bandwidth * gpu.efficiency.link
    network = gpu.network_bandwidth * gpu.efficiency.network
    if per_node == group_size:
        return gpu.efficiency.latency_seconds + waiting + traffic / link
    if operation == "all-to-all":
        inside, outside = nbytes * (per_node - 1) / group_size, nbytes * (group_size - per_node) / group_size
    else:
        inside, outside = traffic if per_node > 1 else 0.0, traffic / per_node
    return gpu.efficiency.network_latency_seconds + waiting + max(inside / link, outside / network)


def utilisation(flops: float, seconds: float, num_gpus: int, gpu: Gpu, dtype: str) -> float:
    """The part of the GPUs' datasheet rate that a step reaches: MFU or HFU, by which FLOPs are counted.

    Model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B) counts what the model needs, forward and backward, and
    not what recomputation adds: the same step in less time is always better. Hardware FLOPs utilisation counts all that
    ran. Both are over the dense peak, not over what `Efficiency` leaves of it.
    """
    return flops / (seconds * num_gpus * gpu.rate(dtype))
