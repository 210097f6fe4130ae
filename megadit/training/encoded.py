"""Encoded data sets as a run's configuration asks for them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from megadit.data.manifest import MANIFEST_FILE
from megadit.data.mixture import Mixture, Wanted, check_encoders, open_sources
from megadit.encoders.frozen_text import FrozenText, load_encoders
from megadit.training.config import RunConfig, check_sizes

logger = logging.getLogger("megadit")


def open_mixture(config: RunConfig) -> Mixture:
    """The data sets of `data.path` or `data.sets`. Raises ValueError naming the folder or key at fault."""
    data, text, model = config.data, config.text, config.model
    folders = data.sets or {data.path: 1.0}
    sources = open_sources(list(folders), data.verify)
    by_class = model.conditioning == "class"
    if not by_class and text.kind != "precomputed":
        check_encoders(sources, list(asked_encoders(config)))
    if data.autoencoder:
        asked = _named({"name": data.autoencoder, "revision": data.autoencoder_revision})
        check_encoders(sources, sources[0].manifest.text, asked)
    mixture = Mixture(
        sources,
        Wanted(
            data.global_batch,
            length=0 if by_class else text.length,
            classes=model.classes if by_class else 0,
            weights=list(data.sets.values()),
            heldout=data.heldout,
            small_buckets=data.small_buckets,
            too_long=text.too_long,
        ),
    )
    faults = list(misfits(config, mixture))
    if faults:
        raise ValueError("; ".join(faults))
    check_sizes(config, [bucket.latent[1:] for bucket in mixture.buckets])
    if mixture.dropped:
        logger.warning("left out, for they do not fill a batch: buckets %s", ", ".join(mixture.dropped))
    return mixture


def asked_encoders(config: RunConfig) -> Iterator[Mapping[str, Any]]:
    """What section text says of each text encoder."""
    text = config.text
    named = {"t5": (text.t5, text.t5_revision), "clip": (text.clip, text.clip_revision)}
    for kind in text.kind.split("+"):
        name, revision = named[kind]
        yield _named({"kind": kind, "name": name, "revision": revision})


def encoder_names(config: RunConfig) -> dict[str, str]:
    """{"t5": name, "clip": name} of the text encoders: those of section text, else those that made the data."""
    names = {"t5": config.text.t5, "clip": config.text.clip}
    if not all(names[kind] for kind in config.text.kind.split("+")):
        source, *_ = open_sources(list(config.data.sets) or [config.data.path])
        names = {**{identity["kind"]: identity["name"] for identity in source.manifest.text}, **_named(names)}
    return names


def open_text_encoders(config: RunConfig, device: torch.device, online: bool = False) -> list[FrozenText]:
    """The text encoders of text.kind=t5, clip or t5+clip. Raises ValueError for one that is not named or not there."""
    text = config.text
    assert text.kind != "builtin" and text.kind != "precomputed"
    # Those of images are to be named: there is no data set yet.
    names = encoder_names(config) if config.data.kind == "shards" else {"t5": text.t5, "clip": text.clip}
    revisions = {"t5": text.t5_revision, "clip": text.clip_revision}
    return load_encoders(text.kind, names, revisions, text.length, device, torch.float32, online)


def autoencoder_name(config: RunConfig) -> str:
    """The autoencoder that pictures are decoded with, by name or folder: that of the configuration, else the data's.

    Empty where latents are pixels.
    """
    if config.data.kind != "shards" or config.data.autoencoder:
        return config.data.autoencoder
    source, *_ = open_sources(list(config.data.sets) or [config.data.path])
    return str((source.manifest.autoencoder or {}).get("name", ""))


def _named(values: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in values.items() if value}


def misfits(config: RunConfig, mixture: Mixture) -> Iterator[str]:
    """How the network that is configured does not fit the data."""
    model, text = config.model, config.text
    where = " and ".join(f"{source.folder / MANIFEST_FILE}" for source in mixture.sources)
    channels = mixture.buckets[0].latent[0]
    if channels != model.channels:
        yield f"{where}: latents have {channels} channels; set model.channels={channels}"
    if model.conditioning == "text":
        if mixture.text_channels != text.channels:
            yield f"{where}: text states are {mixture.text_channels} wide; set text.channels={mixture.text_channels}"
        if text.pooled not in (0, mixture.pooled_channels):
            pooled = mixture.pooled_channels
            yield f"{where}: pooled vectors are {pooled} wide, 0 is none; set text.pooled={pooled}"
