"""How far one set of images is from another, in some network's features: torchmetrics' FID and KID."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megadit.evaluation.defaults import SUBSET_SIZE, SUBSETS
from megadit.runtime.seed import stream

ROWS = 4096  # features that a metric takes at once


class Given(nn.Module):
    """In place of torchmetrics' extractor: the features are there already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features_ND: Tensor) -> Tensor:
        return features_ND


class Kernel(NamedTuple):
    """KID: its mean and standard deviation over subsets, and what these were."""

    mean: float
    std: float
    subsets: int
    subset_size: int


def frechet(real_ND: Tensor, drawn_MD: Tensor) -> float:
    """The Frechet distance between Gaussians fitted to two sets of features (arXiv 1706.08500), in float64.

    Raises ValueError for fewer than two images in a set.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    _check_count(real_ND, drawn_MD)
    metric = FrechetInceptionDistance(feature=Given(real_ND.shape[1]), sync_on_compute=False)
    for features, is_real in ((real_ND, True), (drawn_MD, False)):
        for part in features.double().split(ROWS):
            metric.update(part, real=is_real)
    return float(metric.compute())


def kernel(
    real_ND: Tensor, drawn_MD: Tensor, seed: int = 0, subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE
) -> Kernel:
    """The kernel distance: the unbiased MMD^2 with the kernel (x y / D + 1)^3 (arXiv 1801.01401), in float64.

    Subsets have `subset_size` images of each set, or as many as the smaller one has; `seed` draws them. Raises
    ValueError for fewer than two images in a set.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    _check_count(real_ND, drawn_MD)
    size = min(subset_size, len(real_ND), len(drawn_MD))
    with warnings.catch_warnings():  # that it keeps all features: so do we
        warnings.simplefilter("ignore", UserWarning)
        metric = KernelInceptionDistance(
            feature=Given(real_ND.shape[1]), subsets=subsets, subset_size=size, sync_on_compute=False
        )
    metric.update(real_ND.double(), real=True)
    metric.update(drawn_MD.double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(seed, "kid").initial_seed() % 2**63)
        mean, std = metric.compute()
    return Kernel(float(mean), float(std), subsets, size)


def _check_count(real_ND: Tensor, drawn_MD: Tensor) -> None:
    for name, features in (("real", real_ND), ("drawn", drawn_MD)):
        if len(features) < 2:
            raise ValueError(f"{len(features)} {name} images; a distance needs at least 2 of each")


def too_few(real: int, drawn: int, width: int) -> list[str]:
    """Why a Frechet distance of so many images would mean little: their covariances lack rank."""
    return [
        f"{count} {name} images are fewer than the {width} features: their covariance lacks rank and FID is biased; "
        f"take more images, or kid"
        for name, count in (("real", real), ("drawn", drawn))
        if count < width
    ]
