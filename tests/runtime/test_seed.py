"""Random streams are functions of the seed and their names."""

import itertools

import torch

from megadit.runtime.seed import stream, use_deterministic_kernels
from tests.ranks import run_ranks


def draw(seed, *keys):
    return torch.rand(4, generator=stream(seed, *keys))


def test_a_stream_depends_on_its_keys_alone():
    expected = draw(0, "w", 1)
    torch.manual_seed(7)
    draw(0, "w", 2)
    assert torch.equal(draw(0, "w", 1), expected)


def test_streams_do_not_touch_the_global_generator():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    draw(0, "w")
    assert torch.equal(torch.get_rng_state(), before)


def test_different_keys_seeds_types_and_splits_are_different_streams():
    keys = [(0,), (1,), (0, "w"), (0, "w", 1), (0, "w", "1"), (0, 1, "w"), (0, "ab", "c"), (0, "a", "bc"), (0, "abc")]
    keys += [(0, "a, b"), (0, "a", "b"), (0, "a', 'b"), (0, -1), (0, ""), (-1,), (1 << 40,)]
    for one, other in itertools.combinations(keys, 2):
        assert not torch.equal(draw(*one), draw(*other)), (one, other)


def test_the_streams_never_change():
    """Pinned: another hash or generator would make every run and checkpoint of the past unrepeatable."""
    assert stream(0, "w", 1).initial_seed() == 15119341775929772002
    assert torch.rand(2, generator=stream(0, "w", 1), dtype=torch.float64).tolist() == [
        0.39565973330835236,
        0.08678375776835301,
    ]
    assert torch.randn(2, generator=stream(3, "draw", 5), dtype=torch.float64).tolist() == [
        0.3272343385525477,
        -2.189262038021146,
    ]


def refused(rank, world_size):
    """What an operation without a deterministic kernel says, before and after."""
    words = []
    for prepare in (lambda: None, use_deterministic_kernels):
        prepare()
        try:
            torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
            words.append("")
        except RuntimeError as error:
            words.append(str(error))
    sums = [torch.zeros(4).index_add_(0, torch.tensor([1, 1, 3]), torch.ones(3)).tolist() for _ in range(2)]
    return words, sums


def test_an_operation_without_a_deterministic_kernel_is_refused_by_name():
    (((before, after), sums),) = run_ranks(refused, 1)
    assert before == ""
    assert "put_" in after and "deterministic" in after
    assert sums == [[0, 2, 0, 1]] * 2
