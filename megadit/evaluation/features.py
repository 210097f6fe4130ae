"""What a frozen network sees in a picture: the features that distances between sets of images are measured in.

The networks are transformers' and torch-fidelity's own, with weights from this machine; nothing is downloaded.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megadit.encoders.frozen_text import quiet, read_network
from megadit.encoders.pretrained import fingerprint, read_json, weight_files

PROCESSOR_FILE = "preprocessor_config.json"
INCEPTION_WIDTH = 2048  # of the pooled layer that FID is defined on
# Of a folder's own class: the class that is loaded, and which of its outputs are the features.
CLASSES = {
    "CLIPModel": ("CLIPVisionModelWithProjection", "image_embeds"),
    "CLIPVisionModelWithProjection": ("CLIPVisionModelWithProjection", "image_embeds"),
    "CLIPVisionModel": ("CLIPVisionModel", "pooler_output"),
    "Dinov2Model": ("Dinov2Model", "pooler_output"),  # the class token, as FD-DINOv2 has it (arXiv 2306.04675)
}


@dataclass(frozen=True)
class Extractor:
    """A network that makes `width` numbers of each picture.

    identity: what it is, for a result. extract: RGB pictures of any size -> [B, width], float32.
    """

    identity: dict[str, Any]
    width: int
    extract: Callable[[Sequence[Image.Image]], Tensor]


def open_extractor(source: Path, device: torch.device) -> Extractor:
    """A folder with a vision model of transformers, or the file of torch-fidelity's Inception-v3.

    Raises ValueError that says what to change: not there, another class, weights that lack, a package that lacks.
    """
    if source.is_file():
        return open_inception(source, device)
    if not source.is_dir():
        raise ValueError(
            f"{source}: neither the folder of a CLIP or DINOv2 model nor the file of Inception's weights; copy one to "
            "this machine: nothing is downloaded"
        )
    return open_vision_model(source, device)


def open_vision_model(folder: Path, device: torch.device) -> Extractor:
    """CLIP's image encoder or DINOv2, as transformers saves them. Raises ValueError as `open_extractor`."""
    class_name, output = CLASSES[architecture(folder, tuple(CLASSES))]
    process = open_image_processor(folder)
    with quiet():
        network = read_network(folder, class_name, torch.float32).eval().requires_grad_(False).to(device)
    config = network.config
    width = config.projection_dim if output == "image_embeds" else config.hidden_size

    @torch.no_grad()
    def extract(pictures: Sequence[Image.Image]) -> Tensor:
        pixels_BCHW = process(images=list(pictures), return_tensors="pt")["pixel_values"]
        return getattr(network(pixel_values=pixels_BCHW.to(device)), output).float().cpu()

    identity = {"class": class_name, "name": str(folder), "fingerprint": fingerprint(weight_files(folder, "model"))}
    return Extractor(identity, int(width), extract)


def architecture(folder: Path, known: Sequence[str]) -> str:
    """The class that a folder says it holds. Raises ValueError unless it is a known one."""
    names = read_json(folder / "config.json").get("architectures")
    for name in names if isinstance(names, list) else []:
        if name in known:
            return str(name)
    found = " or ".join(map(str, names)) if isinstance(names, list) and names else "an unnamed architecture"
    raise ValueError(f"{folder / 'config.json'} is of {found}; it must be of {', '.join(known)}")


def open_image_processor(folder: Path) -> Any:
    """The model's own resizing, cropping and scaling, by Pillow: torchvision's differs in the last bit.

    Raises ValueError naming the file that lacks or is of another kind.
    """
    path = folder / PROCESSOR_FILE
    kind = str(read_json(path).get("image_processor_type") or "CLIPImageProcessor").removesuffix("Fast")
    if kind not in ("CLIPImageProcessor", "BitImageProcessor"):
        raise ValueError(f"{path} is of {kind}; CLIP's is a CLIPImageProcessor, DINOv2's a BitImageProcessor")
    with quiet():
        import transformers

        try:
            return getattr(transformers, f"{kind}Pil").from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} cannot be used: {type(error).__name__}: {error}") from error


def open_inception(file: Path, device: torch.device) -> Extractor:
    """torch-fidelity's Inception-v3 (weights-inception-2015-12-05-6726825d.pth): what FID is defined on.

    Raises ValueError naming the package that lacks, or what is wrong with the file.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that is of another torch
        raise ValueError(
            f"Inception-v3's features need the packages torch-fidelity and torchvision ({error}); install "
            "torch-fidelity with the torchvision that belongs to your torch, or name the folder of a CLIP or DINOv2 "
            "model, which need neither"
        ) from error
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{file}: not weights that torch can read without running code: {error}") from error
    # torch-fidelity unpickles what it is given; it is given a copy of the tensors, written here.
    copy = io.BytesIO()
    torch.save(weights, copy)
    copy.seek(0)
    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], copy)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: not the weights of torch-fidelity's Inception-v3: {error}") from error
    network = network.eval().to(device)  # not every release of torch-fidelity does: statistics are the weights' own

    @torch.no_grad()
    def extract(pictures: Sequence[Image.Image]) -> Tensor:
        # One by one, for their sizes may differ; the network resizes them itself, as TensorFlow 1 did.
        pixels = (torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] for picture in pictures)
        return torch.cat([network(one.to(device))[0] for one in pixels]).float().cpu()

    identity = {"class": "Inception-v3 (torch-fidelity)", "name": str(file), "fingerprint": fingerprint([file])}
    return Extractor(identity, INCEPTION_WIDTH, extract)
