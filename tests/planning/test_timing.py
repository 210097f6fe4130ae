"""Seconds: the roofline at its two ends, collectives against a ring that is played step by step, and utilisation."""

import dataclasses
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megadit.planning.hardware import Efficiency, Gpu
from megadit.planning.timing import members_per_node, seconds_of, seconds_of_collective, spans_nodes, utilisation

# Round numbers, all different, so that each can be seen in a result.
GPU = Gpu(
    name="round",
    memory_bytes=10**9,
    matrix_rate={"bfloat16": 1000.0, "float32": 100.0},
    memory_bandwidth=80.0,
    link_bandwidth=40.0,
    network_bandwidth=10.0,
    efficiency=Efficiency(
        matrix=0.5,
        memory=0.25,
        link=0.5,
        network=0.4,
        launch_seconds=0.125,
        latency_seconds=0.5,
        network_latency_seconds=2.0,
    ),
)
FREE = dataclasses.replace(
    GPU,
    efficiency=dataclasses.replace(
        GPU.efficiency, launch_seconds=0.0, latency_seconds=0.0, network_latency_seconds=0.0
    ),
)


def test_a_kernel_takes_the_longer_of_arithmetic_and_memory():
    assert seconds_of([(5000, 20)], GPU, "bfloat16") == 0.125 + 10  # 5000 / (1000 * 0.5)
    assert seconds_of([(5000, 20)], GPU, "float32") == 0.125 + 100
    assert seconds_of([(5000, 400)], GPU, "bfloat16") == 0.125 + 20  # 400 / (80 * 0.25)
    assert seconds_of([(0, 0)], GPU, "bfloat16") == 0.125
    assert seconds_of([], GPU, "bfloat16") == 0


def test_kernels_of_both_kinds_do_not_overlap():
    both = seconds_of([(5000, 20), (5000, 400)], GPU, "bfloat16")
    assert both == 30.25 > seconds_of([(10000, 420)], GPU, "bfloat16")


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=30))
def test_a_counter_is_worth_its_elements(operations):
    one_by_one = sum(seconds_of([operation], GPU, "float32") for operation in operations)
    assert seconds_of(Counter(operations), GPU, "float32") == pytest.approx(one_by_one, rel=1e-12)
    assert seconds_of(operations, GPU, "float32") == pytest.approx(one_by_one, rel=1e-12)


def ring_traffic(operation, n):
    """What the busiest link of a ring carries, in parts of the whole tensor, by playing the ring chunk by chunk."""
    held = [
        [{rank} if operation != "all-gather" or rank == chunk else set() for chunk in range(n)] for rank in range(n)
    ]
    sent = [0] * n
    everyone = set(range(n))

    def step(chunk_of, replace):
        moved = [(rank, chunk_of(rank), set(held[rank][chunk_of(rank)])) for rank in range(n)]
        for rank, chunk, content in moved:
            right = (rank + 1) % n
            held[right][chunk] = content if replace else held[right][chunk] | content
            sent[rank] += 1

    if operation != "all-gather":
        for turn in range(n - 1):
            step(lambda rank, turn=turn: (rank - turn - 1) % n, replace=False)
        assert all(held[rank][rank] == everyone for rank in range(n))
    if operation != "reduce-scatter":
        for turn in range(n - 1):
            step(lambda rank, turn=turn: (rank - turn) % n, replace=True)
        whole = everyone if operation == "all-reduce" else None
        assert all(held[rank][chunk] == (whole or {chunk}) for rank in range(n) for chunk in range(n))
    return Fraction(max(sent), n)


@pytest.mark.parametrize("operation", ["all-reduce", "all-gather", "reduce-scatter"])
@pytest.mark.parametrize("n", [2, 3, 8])
def test_a_collective_in_a_node_takes_as_long_as_its_ring(operation, n):
    seconds = seconds_of_collective(operation, 640, n, per_node=n, gpu=GPU)
    assert seconds == pytest.approx(0.5 + float(ring_traffic(operation, n) * 640 / 20), rel=1e-12)


@pytest.mark.parametrize("operation", ["all-reduce", "all-gather", "reduce-scatter"])
def test_members_of_a_node_share_its_way_out(operation):
    traffic = float(ring_traffic(operation, 16)) * 640
    one, two, eight = (seconds_of_collective(operation, 640, 16, per_node=k, gpu=GPU) for k in (1, 2, 8))
    assert one == pytest.approx(2 + traffic / 4, rel=1e-12)
    assert two == pytest.approx(2 + traffic / 2 / 4, rel=1e-12)
    assert eight == pytest.approx(2 + traffic / 20, rel=1e-12)  # eight adapters carry 32, more than a link's 20


def test_an_exchange_sends_to_each_rank_its_part():
    assert seconds_of_collective("all-to-all", 640, 8, per_node=8, gpu=FREE) == 7 * 80 / 20
    # Six ranks of eight are elsewhere, and each adapter carries what its rank sends them.
    assert seconds_of_collective("all-to-all", 640, 8, per_node=2, gpu=FREE) == 6 * 80 / 4
    # Fast enough a network, and the other members of the node are what takes long.
    fast = dataclasses.replace(FREE, network_bandwidth=1000.0)
    assert seconds_of_collective("all-to-all", 640, 8, per_node=4, gpu=fast) == 3 * 80 / 20


@pytest.mark.parametrize("operation", ["send", "recv", "broadcast", "reduce"])
def test_what_has_one_source_or_one_end_moves_the_whole_tensor(operation):
    assert seconds_of_collective(operation, 640, 2, per_node=2, gpu=GPU) == 0.5 + 640 / 20
    assert seconds_of_collective(operation, 640, 2, per_node=1, gpu=GPU) == 2 + 640 / 4


@pytest.mark.parametrize("operation", ["all-reduce", "all-gather", "reduce-scatter"])
@pytest.mark.parametrize("per_node", [1, 8])
def test_messages_of_a_ring_wait_for_one_another(operation, per_node):
    slow = dataclasses.replace(GPU, efficiency=dataclasses.replace(GPU.efficiency, message_seconds=3.0))
    before, after = (seconds_of_collective(operation, 640, 8, per_node, gpu) for gpu in (GPU, slow))
    sent = ring_traffic(operation, 8) * 8  # an eighth of the tensor in each message
    assert after - before == pytest.approx(3 * float(sent), rel=1e-12)


def test_a_message_is_a_message():
    slow = dataclasses.replace(GPU, efficiency=dataclasses.replace(GPU.efficiency, message_seconds=3.0))
    assert seconds_of_collective("send", 640, 2, 2, slow) == 3 + seconds_of_collective("send", 640, 2, 2, GPU)
    exchange = (seconds_of_collective("all-to-all", 640, 8, 8, gpu) for gpu in (slow, GPU))
    assert next(exchange) - next(exchange) == pytest.approx(7 * 3)


def test_a_group_of_one_takes_no_time():
    assert seconds_of_collective("all-reduce", 640, 1, per_node=1, gpu=GPU) == 0


@given(st.integers(1, 8), st.integers(1, 6), st.integers(1, 16))
def test_members_per_node_of_regular_groups(gpus_per_node, size, stride):
    members = [stride * index for index in range(size)]
    nodes = {rank // gpus_per_node for rank in members}
    fewest = min(sum(rank // gpus_per_node == node for rank in members) for node in nodes)
    assert members_per_node(members, gpus_per_node) == fewest
    assert spans_nodes(members, gpus_per_node) == (len(nodes) > 1)


def test_a_group_that_lies_unevenly_leaves_by_its_narrowest_node():
    assert members_per_node([0, 6, 7, 8], gpus_per_node=8) == 1
    assert spans_nodes([0, 6, 7, 8], gpus_per_node=8)
    assert not spans_nodes([0, 6, 7], gpus_per_node=8)


def test_utilisation_is_of_the_datasheet_rate():
    assert utilisation(flops=8000.0, seconds=4.0, num_gpus=8, gpu=GPU, dtype="bfloat16") == 0.25
    assert utilisation(flops=8000.0, seconds=40.0, num_gpus=8, gpu=GPU, dtype="float32") == 0.25
    # A step made of matrix products alone reaches the efficiency that was assumed, and no more.
    seconds = seconds_of([(5000, 0)], FREE, "bfloat16")
    assert utilisation(5000, seconds, 1, FREE, "bfloat16") == FREE.efficiency.matrix
