"""A pipeline on disk, laid out as diffusers lays them out, and what a run's folder has of one.

model_index.json                     which parts there are; latent sizes that the network was trained on
transformer/                         an export: config.json, model.safetensors, and tokenizer.model of a text encoder
                                     that is trained with the network
scheduler/scheduler_config.json      section `sample`, and what its shift is meant for
text_encoder/ tokenizer/ ..._2/      frozen text encoders, in the format of transformers
vae/                                 the autoencoder, in that of diffusers
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import megadit
from megadit.checkpoint.source import CheckpointSource, read_json
from megadit.checkpoint.stream import Outgoing, appearing, write_folder
from megadit.conversion.export import export_config
from megadit.conversion.weights import Bar, Weights, differences, listing, open_weights, parameters_of
from megadit.encoders.autoencoder import Autoencoder
from megadit.encoders.condition import Captions, Condition, FrozenCaptions, Labels
from megadit.encoders.frozen_text import FrozenText, load_encoders
from megadit.encoders.tokenizer import Tokenizer
from megadit.model.ecdit import ECDiT
from megadit.parallel.layout import ParallelConfig
from megadit.runtime.disk import write_synced
from megadit.training.build import TOKENIZER_FILE
from megadit.training.config import CONFIG_FILE, RunConfig, check, parse
from megadit.training.decoder import Decoder
from megadit.training.drawn import as_drawn, read_drawn
from megadit.training.encoded import autoencoder_of
from megadit.training.restore import newest_checkpoint, open_condition, warn_of_weights
from megadit.training.trained_sizes import trained_sizes

INDEX_FILE = "model_index.json"
CLASS = "ECDiTPipeline"
SCHEDULER_FILE = "scheduler_config.json"
NUMBERED = ("", "_2")  # text encoders and their tokenizers

Size = tuple[int, int]


@dataclass(frozen=True)
class Parts:
    """What a pipeline is made of, but for the network itself.

    config: of one process that draws. kind, step: of the weights. sizes: (height, width) of latents that it was
    trained on. autoencoder: None where latents are pixels.
    """

    config: RunConfig
    kind: str
    step: int
    sizes: tuple[Size, ...]
    condition: Condition
    autoencoder: Autoencoder | None

    @property
    def text_encoders(self) -> list[FrozenText]:
        return self.condition.encoders if isinstance(self.condition, FrozenCaptions) else []

    @property
    def decoder(self) -> Decoder:
        return Decoder() if self.autoencoder is None else Decoder.of(self.autoencoder)


# --- a run ------------------------------------------------------------------------------------------------------------


def read_run(folder: Path, device: torch.device, online: bool) -> tuple[Parts, Weights]:
    """The averages of a run's newest checkpoint and what they are drawn with.

    Raises ValueError naming what is not there or does not fit.
    """
    config = read_drawn(folder, 1)
    path = newest_checkpoint(folder)
    weights = open_weights(path)
    wanted = {name: parameter.shape for name, parameter in parameters_of(config).items()}
    found = {name: weights.spec(name).shape for name in weights.tensors}
    if faults := differences(wanted, found, str(folder / CONFIG_FILE), str(path)):
        raise ValueError(listing(f"{path} does not fit the network of {folder / CONFIG_FILE}", faults))
    assert isinstance(weights.source, CheckpointSource)
    weights.source.check_bytes()
    if weights.kind != "ema":
        warn_of_weights(path)
    condition = open_condition(config, folder, device, online)
    named = autoencoder_of(config)
    autoencoder = named and Autoencoder.load(named.name, device, torch.float32, named.revision, online)
    return Parts(config, weights.kind, weights.step, sizes_of(config), condition, autoencoder), weights


def sizes_of(config: RunConfig) -> tuple[Size, ...]:
    """Of the latents of the run's data sets, where these are here; the model's square."""
    square = (config.model.image_size, config.model.image_size)
    try:
        return tuple(trained_sizes(config)) or (square,)
    except ValueError:
        return (square,)


# --- a folder of its own ----------------------------------------------------------------------------------------------


def write_pipeline(folder: Path, parts: Parts, network: ECDiT, bar: Bar, overwrite: bool) -> None:
    """Write a folder that `read_pipeline` reads. It appears when all of it is there.

    Raises ValueError for one that is in use, unless it holds a pipeline of ours and `overwrite` says that it may go,
    and for captions that no encoder here can read.
    """
    check_readable(parts.config)
    tensors = [
        Outgoing(name, tuple(p.shape), p.dtype, lambda p=p: iter([p.detach().cpu().contiguous()]))  # type: ignore[misc]
        for name, p in network.named_parameters()
    ]
    with appearing(folder, is_pipeline if overwrite else None) as partial:
        progress = bar(sum(tensor.spec.num_bytes for tensor in tensors))
        exported = export_config(parts.config, parts.step, parts.kind)
        write_folder(partial / "transformer", tensors, exported, progress)
        (partial / "scheduler").mkdir()
        scheduler = {
            "_class_name": "SampleConfig",
            **dataclasses.asdict(parts.config.sample),
            "shift_tokens": parts.config.objective.shift_tokens,
        }
        write_synced(partial / "scheduler" / SCHEDULER_FILE, pretty(scheduler))
        if isinstance(parts.condition, Captions):
            write_synced(partial / "transformer" / TOKENIZER_FILE, parts.condition.tokenizer.serialized)
        for number, encoder in zip(NUMBERED, parts.text_encoders, strict=False):
            encoder.network.save_pretrained(partial / f"text_encoder{number}")
            encoder.tokenizer.save_pretrained(partial / f"tokenizer{number}")
        if parts.autoencoder is not None:
            parts.autoencoder.network.save_pretrained(partial / "vae")
        write_synced(partial / INDEX_FILE, pretty(index_of(parts)))


def check_readable(config: RunConfig) -> None:
    if config.model.conditioning == "text" and config.text.kind == "precomputed":
        raise ValueError(
            "text.kind=precomputed does not say which encoder reads captions, so a pipeline cannot be saved with it; "
            "set text.kind and text.t5 or text.clip in the run's config.yaml"
        )


def index_of(parts: Parts) -> dict[str, Any]:
    """model_index.json: each part's package and class, as diffusers has it."""
    index: dict[str, Any] = {
        "_class_name": CLASS,
        "_megadit_version": megadit.__version__,
        "transformer": ["megadit", "ECDiT"],
        "scheduler": ["megadit", "SampleConfig"],
    }
    for number, encoder in zip(NUMBERED, parts.text_encoders, strict=False):
        index[f"text_encoder{number}"] = ["transformers", type(encoder.network).__name__]
        index[f"tokenizer{number}"] = ["transformers", type(encoder.tokenizer).__name__]
    index["vae"] = None if parts.autoencoder is None else ["diffusers", type(parts.autoencoder.network).__name__]
    return index | {"sizes": [list(size) for size in parts.sizes]}


def pretty(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def is_pipeline(folder: Path) -> bool:
    """Whether a folder holds a pipeline of ours and nothing beside it."""
    try:
        index = read_json(folder / INDEX_FILE)
    except ValueError:
        return False
    known = {*index, INDEX_FILE}
    return index.get("_class_name") == CLASS and all(entry.name in known for entry in folder.iterdir())


def read_pipeline(folder: Path, device: torch.device, encoder_dtype: torch.dtype) -> tuple[Parts, Weights]:
    """What `write_pipeline` wrote. Raises ValueError naming the file that lacks, or is damaged."""
    index = read_index(folder)
    weights = open_weights(folder / "transformer")
    config = pipeline_config(folder, weights)
    condition = read_condition(folder, config, device, encoder_dtype)
    autoencoder = Autoencoder.load(str(folder), device, encoder_dtype) if index.get("vae") else None
    if autoencoder is not None and autoencoder.channels != config.model.channels:
        raise ValueError(
            f"{folder / 'vae'} has latents of {autoencoder.channels} channels, the network of {config.model.channels}; "
            "they are not of one pipeline"
        )
    return Parts(config, weights.kind, weights.step, read_sizes(folder, index), condition, autoencoder), weights


def read_index(folder: Path) -> dict[str, Any]:
    """model_index.json. Raises ValueError saying what the folder is instead."""
    path = folder / INDEX_FILE
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder; name one that save_pretrained wrote")
    if not path.is_file():
        hint = "name a folder that save_pretrained wrote"
        if (folder / CONFIG_FILE).is_file():
            hint = f"it is a run: use {CLASS}.from_run({str(folder)!r})"
        raise ValueError(f"{folder} has no {INDEX_FILE}; {hint}")
    index = read_json(path)
    if index.get("_class_name") != CLASS:
        raise ValueError(f"{path} is of {index.get('_class_name')}, not of {CLASS}; load it with diffusers")
    return index


def read_sizes(folder: Path, index: Mapping[str, Any]) -> tuple[Size, ...]:
    sizes = index.get("sizes")
    if not isinstance(sizes, list) or not all(
        isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)
        for size in sizes
    ):
        raise ValueError(f"{folder / INDEX_FILE}: sizes={sizes!r} must be a list of [height, width] of latents")
    return tuple((height, width) for height, width in sizes)


def pipeline_config(folder: Path, weights: Weights) -> RunConfig:
    """That of a process that draws: sections model and text of the export, and how it samples."""
    path = folder / "scheduler" / SCHEDULER_FILE
    sample = {key: value for key, value in read_json(path).items() if not key.startswith("_")}
    objective = {"shift_tokens": sample.pop("shift_tokens", 0)}
    plain = weights.config.to_dict()
    sections = {"model": plain["model"], "text": plain["text"], "sample": sample, "objective": objective}
    try:
        config = as_drawn(parse(sections, str(path)), 1, ParallelConfig())
        check(config, 1)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return replace(config, text=replace(config.text, tokenizer=""))


def read_condition(folder: Path, config: RunConfig, device: torch.device, dtype: torch.dtype) -> Condition:
    """What reads prompts. Raises ValueError naming the encoder or tokenizer that lacks."""
    text = config.text
    if config.model.conditioning == "class":
        return Labels(config.model.classes)
    check_readable(config)
    if text.kind == "builtin":
        return Captions(Tokenizer.load(folder / "transformer" / TOKENIZER_FILE), text.length)
    assert text.kind != "precomputed"
    here = {kind: str(folder) for kind in text.kind.split("+")}
    return FrozenCaptions(load_encoders(text.kind, here, {}, text.length, device, dtype), text.too_long)
