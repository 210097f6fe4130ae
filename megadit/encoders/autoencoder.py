"""Images to latents and back with diffusers' AutoencoderKL, frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megadit.encoders.pretrained import (
    Source,
    fingerprint,
    missing_package,
    read_json,
    weight_files,
    weight_patterns,
)

CLASS = "AutoencoderKL"
SUBFOLDERS = ("", "vae")  # a repository of its own, or part of a pipeline
STEM = "diffusion_pytorch_model"


class Autoencoder:
    """An AutoencoderKL whose latents are shifted and scaled as its config says: what a network trains on.

    identity: what it is, for a manifest; channels: of a latent; downscale: pixels along one side of a latent's cell.
    """

    def __init__(self, network: Any, identity: Mapping[str, Any]) -> None:
        """`network` is an AutoencoderKL; it is frozen here. Raises ValueError for a config that has no meaning here."""
        check_config(network.config, str(identity.get("name", CLASS)), network.dtype)
        self.network = network.eval().requires_grad_(False)
        # Channels last takes a fifth off the time, but sums in another order: float32 stays diffusers' own.
        exact = network.dtype == torch.float32
        self._layout = torch.contiguous_format if exact else torch.channels_last
        self.network.to(memory_format=self._layout)
        self.channels = int(network.config.latent_channels)
        self.downscale = 2 ** (len(network.config.block_out_channels) - 1)
        self.scale, self.shift = float(network.config.scaling_factor), float(network.config.shift_factor or 0)
        self.identity = {
            **identity,
            "class": CLASS,
            "channels": self.channels,
            "downscale": self.downscale,
            "scaling_factor": network.config.scaling_factor,
            "shift_factor": network.config.shift_factor,
        }

    @classmethod
    def load(
        cls,
        source: str,
        device: torch.device | str,
        dtype: torch.dtype,
        revision: str = "",
        online: bool = False,
    ) -> Autoencoder:
        """The autoencoder that `source` names: a folder, or a model on the Hub; either may hold it in `vae/`.

        Without `online` only what is on this machine is looked at. Raises ValueError that says what to change: not
        found, another class, weights that lack or do not fit.
        """
        named = Source(source, revision, online)
        root = named.fetch([f"{name}/config.json".lstrip("/") for name in SUBFOLDERS])
        subfolder = find_subfolder(root, source)
        root = named.fetch(weight_patterns(subfolder, STEM))
        folder = root / subfolder
        paths = weight_files(folder, STEM)
        network = read_network(folder, dtype)
        identity = {"name": source, "revision": named.commit(root), "fingerprint": fingerprint(paths)}
        return cls(network.to(device), identity)

    @torch.no_grad()
    def encode(self, pixels_BCHW: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """Latents [B, channels, H / downscale, W / downscale] of pixels in [-1, 1]: (z - shift) * scale, float32.

        Without `generators` z is the posterior's mean; else a sample of it, with a generator for each image, so that
        an image's latents do not depend on its batch. A generator of the CPU draws the same on every device.
        Raises ValueError for a size that downscale does not divide.
        """
        self._check_pixels(pixels_BCHW)
        assert generators is None or len(generators) == len(pixels_BCHW), "one generator per image"
        pixels_BCHW = pixels_BCHW.to(self.network.device, self.network.dtype, memory_format=self._layout)
        posterior = self.network.encode(pixels_BCHW).latent_dist
        # In float32 whatever the network's precision is: bfloat16 would round the noise and the sum.
        posterior = type(posterior)(posterior.parameters.float())
        z_BCHW = posterior.mode() if generators is None else posterior.sample(list(generators))
        return ((z_BCHW - self.shift) * self.scale).contiguous()

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Pixels [B, 3, h * downscale, w * downscale] in [-1, 1], float32, of latents as `encode` returns them.

        Raises ValueError for another number of channels.
        """
        if latents_BCHW.ndim != 4 or latents_BCHW.shape[1] != self.channels:
            raise ValueError(
                f"latents {list(latents_BCHW.shape)} do not fit {self.identity.get('name', CLASS)}, whose latents are "
                f"[images, {self.channels}, height, width]"
            )
        z_BCHW = latents_BCHW.to(self.network.device, torch.float32) / self.scale + self.shift
        return self.network.decode(z_BCHW.to(self.network.dtype)).sample.float().clamp(-1, 1).contiguous()

    def _check_pixels(self, pixels_BCHW: Tensor) -> None:
        if pixels_BCHW.ndim != 4 or pixels_BCHW.shape[1] != 3:
            raise ValueError(f"pixels {list(pixels_BCHW.shape)} are not [images, 3, height, width]")
        height, width = pixels_BCHW.shape[2:]
        if height % self.downscale or width % self.downscale:
            raise ValueError(
                f"an image of {height} x {width} pixels does not fit {self.identity.get('name', CLASS)}: height and "
                f"width must be multiples of {self.downscale}"
            )


def find_subfolder(root: Path, source: str) -> str:
    """Where in `root` the autoencoder is. Raises ValueError that says what is there instead."""
    found = {}
    for subfolder in SUBFOLDERS:
        path = root / subfolder / "config.json"
        if path.is_file():
            found[path] = str(read_json(path).get("_class_name"))
            if found[path] == CLASS:
                return subfolder
    if found:
        others = ", ".join(f"{path} is of {name}" for path, name in found.items())
        raise ValueError(f"{source} holds no {CLASS}: {others}; name the folder of an {CLASS}")
    raise ValueError(f"{source} has neither config.json nor vae/config.json; name the folder of an {CLASS}")


def check_config(config: Mapping[str, Any], name: str, dtype: torch.dtype) -> None:
    """Raises ValueError for what `encode` and `decode` would compute wrongly."""
    if config["in_channels"] != 3 or config["out_channels"] != 3:
        raise ValueError(f"{name} is not for RGB images: in_channels is {config['in_channels']}, not 3")
    if not config["scaling_factor"]:
        raise ValueError(f"{name} has no scaling_factor in its config.json; write one (1.0 leaves latents as they are)")
    given = [key for key in ("latents_mean", "latents_std") if config.get(key) is not None]
    if given:
        raise ValueError(f"{name} sets {' and '.join(given)}; only scaling_factor and shift_factor are applied")
    if dtype == torch.float16 and config.get("force_upcast"):
        raise ValueError(f"{name} overflows in float16 (force_upcast in its config.json); take bfloat16 or float32")


def read_network(folder: Path, dtype: torch.dtype) -> Any:
    """diffusers' own class with the weights of `folder`. Raises ValueError naming what does not fit."""
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise missing_package(error) from error
    from safetensors import SafetensorError

    try:
        network, report = AutoencoderKL.from_pretrained(
            folder,
            torch_dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,  # else a warning that accelerate is not installed
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be loaded as {CLASS}: {type(error).__name__}: {error}") from error
    if report["missing_keys"]:  # they would be random
        raise ValueError(f"the weights in {folder} lack {', '.join(sorted(report['missing_keys'])[:3])}")
    return network
