"""How well pictures fit their captions: torchmetrics' CLIPScore (arXiv 2104.08718) with a CLIP from this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from megadit.encoders.frozen_text import FAMILIES, check_fit, quiet, read_network, read_tokenizer, tokenizer_files
from megadit.encoders.pretrained import fingerprint, weight_files
from megadit.evaluation.features import architecture, open_image_processor


class _Tensors(nn.Module):
    """A CLIPModel as torchmetrics knows it: features are tensors, not part of an output."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network, self.config = network, network.config

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        return self.network.get_image_features(pixel_values=pixel_values).pooler_output

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.network.get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output


class _Reader:
    """CLIP's processor as torchmetrics calls it. Captions are cut here: torchmetrics would cut off the end token, where
    the text's vector is read.
    """

    def __init__(self, images: Any, tokenizer: Any, length: int) -> None:
        self._images, self._tokenizer, self._length = images, tokenizer, length

    def __call__(
        self, text: Sequence[str] | None = None, images: Sequence[Tensor] | None = None, **_: object
    ) -> Mapping[str, Tensor]:
        if text is not None:
            cut = {"truncation": True, "max_length": self._length}
            return self._tokenizer(list(text), padding=True, return_tensors="pt", **cut)
        assert images is not None
        pictures = [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in images]
        return self._images(images=pictures, return_tensors="pt")


class ClipScore:
    """100 times the mean cosine between pictures and their captions, 0 at least.

    identity: what reads them, for a result; length: tokens of a caption that are read.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        """`folder`: of a CLIPModel with its tokenizer. Raises ValueError naming the file that lacks or does not fit."""
        from torchmetrics.multimodal.clip_score import CLIPScore

        if not folder.is_dir():
            raise ValueError(
                f"{folder}: not the folder of a CLIP model; copy one to this machine: nothing is downloaded"
            )
        architecture(folder, ("CLIPModel",))
        tokenizer_files(folder, FAMILIES["clip"])
        with quiet():
            network = read_network(folder, "CLIPModel", torch.float32).eval().requires_grad_(False).to(device)
            self._tokenizer = read_tokenizer(folder, FAMILIES["clip"])
        self.length = int(network.config.text_config.max_position_embeddings)
        check_fit(network.config.text_config, self._tokenizer, self.length, str(folder))
        reader = _Reader(open_image_processor(folder), self._tokenizer, self.length)
        self.identity = {
            "class": "CLIPModel",
            "name": str(folder),
            "fingerprint": fingerprint(weight_files(folder, "model")),
        }
        self._device = device
        self._metric = CLIPScore(model_name_or_path=lambda: (_Tensors(network), reader), sync_on_compute=False)
        self._metric.to(device)

    @torch.no_grad()
    def add(self, pictures: Sequence[Image.Image], captions: Sequence[str]) -> None:
        """Take in RGB pictures, each with its caption; a longer one is cut."""
        if pictures:
            tensors = [torch.from_numpy(np.array(picture)).permute(2, 0, 1).to(self._device) for picture in pictures]
            self._metric.update(tensors, list(captions))

    def sums(self) -> tuple[float, int]:
        """(100 times the cosines' sum, pictures) of what was added."""
        return float(self._metric.score), int(self._metric.n_samples)

    def too_long(self, captions: Sequence[str]) -> int:
        """How many captions are cut."""
        return sum(len(ids) > self.length for ids in self._tokenizer(list(captions)).input_ids) if captions else 0


def mean_score(parts: Sequence[tuple[float, int]]) -> float:
    """The score of all that several ranks added. Raises ValueError if that is nothing."""
    total, count = sum(part[0] for part in parts), sum(part[1] for part in parts)
    if not count:
        raise ValueError("no pictures to score")
    return max(total / count, 0.0)
