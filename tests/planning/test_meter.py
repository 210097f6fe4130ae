"""What a meter sees, on tensors whose sizes are known."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from megadit.parallel.grid import Grid, Layout
from megadit.planning.meter import Collective, Meter, Operation, fused_attention
from megadit.planning.simulation import META, fake_world


@pytest.fixture
def grid():
    with fake_world(0, 8):
        yield Grid(Layout(pp=2, edp=1, ep=2, tp=2), 0)


def test_bytes_are_alive_from_the_first_kernel_to_the_last_reference(grid):
    with Meter(grid, META) as meter:
        x = torch.ones(1000, device="meta")
        meter.claim("weights", [x])
        y = x * 2
        view = y.view(10, 100)[3:]
        z = y + view.sum()
        assert meter.live["weights"] == 4000 and meter.live["activations"] == 8000
        del y, z
        assert meter.live["activations"] == 4000  # the view keeps all of what it is a view of
        del view
        assert meter.live["activations"] == 0
    peaks = meter.take_peaks()
    assert peaks.of == {"weights": 4000, "activations": 8004}
    assert peaks.total == 12004


def test_peaks_begin_anew(grid):
    with Meter(grid, META) as meter:
        x = torch.ones(1000, device="meta")
        meter.take_peaks()
        y = torch.ones(10, device="meta")
        del x
        assert meter.take_peaks().total == 4040
        assert meter.take_peaks().total == y.nbytes


def test_what_is_claimed_changes_its_category(grid):
    weight = torch.nn.Parameter(torch.ones(10, 10, device="meta"))
    weight.register_post_accumulate_grad_hook(lambda p: meter.claim("gradients", [p.grad]))
    with Meter(grid, META) as meter:
        meter.claim("weights", [weight])
        torch.ones(5, 10, device="meta").matmul(weight).sum().backward()
        assert meter.live["gradients"] == meter.live["weights"] == 400
        weight.grad = None
        assert meter.live["gradients"] == 0


def test_tensors_elsewhere_do_not_count(grid):
    with Meter(grid, META) as meter:
        torch.ones(10) * 2
    assert not meter.operations and meter.take_peaks().total == 0


def test_matrix_products_are_counted_as_torch_counts_them(grid):
    x, weight = torch.randn(4, 16, 32, requires_grad=True), torch.randn(64, 32, requires_grad=True)
    with FlopCounterMode(display=False) as expected:
        F.linear(x, weight).sum().backward()
    with Meter(grid, torch.device("cpu")) as meter:
        F.linear(x, weight).sum().backward()
    assert sum(op.flops * count for op, count in meter.operations.items()) == expected.get_total_flops()


def test_a_kernel_reads_its_arguments_and_writes_its_result(grid):
    x, y = torch.empty(8, 16, device="meta"), torch.empty(16, 4, device="meta")
    with Meter(grid, META) as meter:
        x.matmul(y)
        x.t()  # a view moves nothing
    assert meter.operations == {Operation(2 * 8 * 16 * 4, 4 * (8 * 16 + 16 * 4 + 8 * 4)): 1}


@pytest.mark.parametrize("mask", [None, torch.ones(2, 1, 1, 24, dtype=torch.bool)])
def test_attention_on_the_meta_device_is_the_kernel_that_devices_run(grid, mask):
    def attend(device):
        q, k, v = (
            torch.zeros(2, heads, length, 8, device=device, requires_grad=True)
            for heads, length in ((4, 16), (2, 24), (2, 24))
        )
        given = None if mask is None else mask.to(device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=given, enable_gqa=True), (q, k, v)

    counted = []
    for device in ("cpu", "meta"):
        with Meter(grid, torch.device(device)) as meter, fused_attention() if device == "meta" else torch.enable_grad():
            out, inputs = attend(device)
            out.sum().backward()
        counted.append((meter.operations, meter.live["activations"], out.shape, [x.grad.shape for x in inputs]))
    assert counted[0][2:] == counted[1][2:]
    assert {op.flops for op in counted[0][0]} == {op.flops for op in counted[1][0]}
    assert counted[0][1] == counted[1][1]


def test_torch_has_its_own_attention_again():
    own = F.scaled_dot_product_attention
    with pytest.raises(RuntimeError), fused_attention():
        raise RuntimeError
    assert F.scaled_dot_product_attention is own


def test_collectives_are_told_by_group_and_whole_tensor(grid):
    x = torch.empty(4, 6, device="meta")
    with Meter(grid, META) as meter:
        grid["tp"].all_reduce(x)
        grid["ep"].all_to_all(x)
        grid["tp"].all_gather(x, dim=1)
        grid["dp"].reduce_scatter(x, dim=0)
        grid["edp"].all_reduce(x)  # a group of one sends nothing
    assert meter.collectives == [
        Collective("tp", "all-reduce", 96),
        Collective("ep", "all-to-all", 96),
        Collective("tp", "all-gather", 192),
        Collective("dp", "reduce-scatter", 96),
    ]


def test_a_second_process_group_is_refused(grid):
    with pytest.raises(RuntimeError, match="process group already"), fake_world(0, 2):
        pass


def test_nothing_is_left_behind(grid):
    with Meter(grid, META) as meter:
        x = torch.ones(10, device="meta", requires_grad=True)
        (x * 2).sum().backward()
        del x
        gc.collect()
        assert sum(meter.live.values()) == 0
