"""FID and KID against their formulas in numpy, through what the tool calls."""

import numpy as np
import pytest
import torch

from megadit.evaluation.distances import frechet, kernel, too_few


def features(count, width, seed, shift=0.0):
    """Correlated and off centre, as a network's are."""
    draw = np.random.default_rng(seed)
    return draw.standard_normal((count, width)) @ draw.standard_normal((width, width)) + shift + 0.3


def frechet_by_hand(real, drawn):
    """|mu - mu'|^2 + tr(S + S' - 2 (S^1/2 S' S^1/2)^1/2), by eigenvalues of symmetric matrices."""
    difference = real.mean(0) - drawn.mean(0)
    one, other = np.cov(real, rowvar=False), np.cov(drawn, rowvar=False)
    values, vectors = np.linalg.eigh(one)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    middle = np.sqrt(np.linalg.eigvalsh(root @ other @ root).clip(0)).sum()
    return difference @ difference + np.trace(one) + np.trace(other) - 2 * middle


def kernel_by_hand(real, drawn):
    """The unbiased estimator of MMD^2, equation 4 of arXiv 1801.01401, written as its sums."""

    def k(x, y):
        return (x @ y / len(x) + 1) ** 3

    def apart(rows):
        n = len(rows)
        return sum(k(rows[i], rows[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))

    return apart(real) + apart(drawn) - 2 * np.mean([k(x, y) for x in real for y in drawn])


@pytest.mark.parametrize(("real", "drawn", "width"), [(300, 200, 16), (5000, 4500, 24), (64, 64, 1)])
def test_fid_is_the_formulas(real, drawn, width):
    one, other = features(real, width, 0), features(drawn, width, 1, shift=0.5)
    found = frechet(torch.from_numpy(one), torch.from_numpy(other))
    if width == 1:
        expected = (one.mean() - other.mean()) ** 2 + (one.std(ddof=1) - other.std(ddof=1)) ** 2
    else:
        expected = frechet_by_hand(one, other)
    assert found == pytest.approx(expected, rel=1e-6)
    assert found > 0.1


def test_fid_of_a_set_and_itself_is_nothing():
    one = torch.from_numpy(features(400, 16, 0))
    assert frechet(one, one) == pytest.approx(0, abs=1e-6)


def test_kid_of_whole_sets_is_the_formulas():
    """Subsets as large as the sets are the sets themselves, in another order."""
    one, other = features(60, 8, 0), features(60, 8, 1, shift=0.5)
    found = kernel(torch.from_numpy(one), torch.from_numpy(other), subsets=3)
    assert found.subset_size == 60
    assert found.mean == pytest.approx(kernel_by_hand(one, other), rel=1e-6)
    assert found.std == pytest.approx(0, abs=1e-9 * found.mean)


def test_kid_of_one_distribution_is_about_zero_also_below():
    """Unbiased: over many pairs of sets its mean is zero, which a biased estimator's is not."""
    draw = np.random.default_rng(3)
    found = [
        kernel(*(torch.from_numpy(draw.standard_normal((40, 8))) for _ in range(2)), subsets=1).mean for _ in range(60)
    ]
    assert min(found) < 0 < max(found)
    assert abs(np.mean(found)) < 3 * np.std(found) / 60**0.5


def test_kid_repeats_and_leaves_the_global_generator_alone():
    one, other = (torch.from_numpy(features(50, 8, seed)) for seed in (0, 1))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    found = [kernel(one, other, seed, subsets=4, subset_size=20) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("measure", [frechet, kernel])
def test_one_image_has_no_distance(measure):
    with pytest.raises(ValueError, match="1 drawn images; a distance needs at least 2"):
        measure(torch.randn(5, 3), torch.randn(1, 3))


def test_fewer_images_than_features_are_a_warning():
    assert too_few(8, 9, 8) == []
    (warning,) = too_few(8, 7, 8)
    assert warning.startswith("7 drawn images are fewer than the 8 features: their covariance lacks rank")
