"""Positions against loops, against diffusers, and by what they are for."""

import math
from dataclasses import replace

import pytest
import torch

from megadit.model.ecdit import ECDiT
from megadit.model.positions import rotary_positions, rotate, sincos_positions

CPU = torch.device("cpu")


@pytest.mark.parametrize(("rows", "columns", "scale"), [(3, 5, 1.0), (5, 3, 0.5), (1, 4, 2.0)])
def test_positions_encode_column_then_row(rows, columns, scale):
    positions = sincos_positions(rows, columns, 16, scale, CPU)
    assert positions.shape == (rows * columns, 16) and positions.dtype == torch.float64
    for row in range(rows):
        for column in range(columns):
            expected = []
            for coordinate in (column * scale, row * scale):
                angles = [coordinate / 10000 ** (i / 4) for i in range(4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            assert positions[row * columns + column].tolist() == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_positions_agree_with_diffusers(scale):
    reference = pytest.importorskip("diffusers.models.embeddings", reason="diffusers is the reference")
    theirs = reference.get_2d_sincos_pos_embed(48, 6, base_size=6, interpolation_scale=1 / scale, output_type="pt")
    torch.testing.assert_close(sincos_positions(6, 6, 48, scale, CPU), theirs, rtol=0, atol=1e-12)


def rotary(rows, columns, width, scale=1.0):
    return rotary_positions(rows, columns, width, scale, CPU, torch.float64)


@pytest.mark.parametrize(("rows", "columns", "scale"), [(3, 5, 1.0), (5, 3, 0.5), (1, 4, 2.0)])
def test_pairs_of_features_turn_by_row_then_by_column(randn, rows, columns, scale):
    """As complex numbers, one token after the other."""
    x = randn(2, 3, rows * columns, 12)
    turned = rotate(x, rotary(rows, columns, 12, scale)[:, None, None])
    for row in range(rows):
        for column in range(columns):
            angles = [coordinate * scale / 10000 ** (2 * i / 6) for coordinate in (row, column) for i in range(3)]
            token = torch.view_as_complex(x[:, :, row * columns + column].unflatten(-1, (-1, 2)))
            unit = torch.tensor([complex(math.cos(a), math.sin(a)) for a in angles], dtype=torch.complex128)
            expected = torch.view_as_real(token * unit).flatten(-2)
            torch.testing.assert_close(turned[:, :, row * columns + column], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("rows", "columns", "scale"), [(6, 6, 1.0), (4, 9, 0.25), (9, 4, 2.0)])
def test_rotary_positions_turn_as_flux_does(randn, rows, columns, scale):
    """FLUX's axes are an index that is nought for image tokens, row and column; its numbers are float32."""
    flux = pytest.importorskip("diffusers.models.transformers.transformer_flux", reason="diffusers is the reference")
    reference = pytest.importorskip("diffusers.models.embeddings")
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).double() * scale
    theirs = flux.FluxPosEmbed(theta=10000, axes_dim=[8, 8])(places)
    x, ours = randn(2, 3, rows * columns, 16), rotary(rows, columns, 16, scale)
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, wanted.double(), rtol=0, atol=1e-6)
    expected = reference.apply_rotary_emb(x, theirs)
    torch.testing.assert_close(rotate(x, ours[:, None, None]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("rows", "columns", "scale"), [(6, 6, 1.0), (4, 9, 0.25)])
def test_rotary_positions_agree_with_those_of_a_grid_in_diffusers(rows, columns, scale):
    """Which has the column first: its halves are ours the other way round."""
    reference = pytest.importorskip("diffusers.models.embeddings", reason="diffusers is the reference")
    crop = ((0, 0), (scale * rows, scale * columns))
    theirs = reference.get_2d_rotary_pos_embed(16, crop, (rows, columns), output_type="pt")
    for found, wanted in zip(rotary(rows, columns, 16, scale), theirs, strict=True):
        torch.testing.assert_close(found.roll(8, dims=1), wanted.double(), rtol=0, atol=1e-6)


def test_products_of_turned_vectors_know_the_distance_alone(randn):
    q, k = randn(16), randn(16)
    turns = rotary(6, 7, 16).view(2, 6, 7, 16)

    def product(at, other):
        places = (q, at), (k, other)
        turned = [
            rotate(x.view(1, 1, 1, 16), turns[:, row, column].view(2, 1, 1, 1, 16)) for x, (row, column) in places
        ]
        return (turned[0] * turned[1]).sum().item()

    assert product((1, 2), (3, 6)) == pytest.approx(product((2, 0), (4, 4)), rel=1e-12)
    assert abs(product((1, 2), (3, 6)) - product((1, 2), (3, 5))) > 1e-3
    assert abs(product((1, 2), (3, 6)) - product((3, 6), (1, 2))) > 1e-3


def test_halves_are_turned_in_float32(randn):
    x, turns = randn(1, 2, 12, 8).bfloat16(), rotary_positions(3, 4, 8, 1.0, CPU, torch.bfloat16)
    assert turns.dtype == torch.float32
    found = rotate(x, turns[:, None, None])
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, rotate(x.float(), turns[:, None, None]).bfloat16())


@pytest.mark.parametrize("size", [(8, 8), (8, 16), (4, 12)])
def test_the_longer_edge_spans_the_image_size(config, text, region, grid, randn, size):
    config = replace(config, positions="rotary", position_interpolation=2.0, head_width=8)
    stage = ECDiT(config, text, range(1, 2), region, grid["ep"])
    wanted = rotary(size[0] // 2, size[1] // 2, 8, 8 / max(size) / 2)
    torch.testing.assert_close(stage._rotary(size, randn(1), None), wanted[:, None, None], rtol=0, atol=1e-12)
