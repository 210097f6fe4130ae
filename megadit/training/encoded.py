"""Encoded data sets as a run's configuration asks for them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megadit.data.manifest import MANIFEST_FILE, Manifest, read_manifest
from megadit.data.mixture import Mixture, Wanted, check_encoders, open_sources
from megadit.encoders.frozen_text import FrozenText, load_encoders
from megadit.encoders.pretrained import COMMIT
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
        asked = _said({"name": data.autoencoder, "revision": _commit(data.autoencoder_revision)})
        for source in sources:
            check_encoders([source], source.manifest.text, asked)
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
        yield _said({"kind": kind, "name": name, "revision": _commit(revision)})


def _said(values: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in values.items() if value}


def _commit(revision: str) -> str:
    """The revision if it is a commit, as manifests have it: what a branch or tag was, only the Hub can tell."""
    return revision if COMMIT.fullmatch(revision) else ""


class Named(NamedTuple):
    """An encoder, as it can be loaded."""

    name: str
    revision: str

    @classmethod
    def of(cls, identity: Mapping[str, Any]) -> Named:
        """That of a manifest."""
        return cls(str(identity["name"]), str(identity.get("revision", "")))


def _first_manifest(config: RunConfig) -> Manifest:
    first, *_ = config.data.sets or [config.data.path]
    return read_manifest(Path(first).expanduser())


def open_text_encoders(config: RunConfig, device: torch.device, online: bool = False) -> list[FrozenText]:
    """The text encoders of text.kind=t5, clip or t5+clip: those of section text, else those that made the data.

    Raises ValueError for one that is not named or not there.
    """
    text = config.text
    assert text.kind != "builtin" and text.kind != "precomputed"
    named = {"t5": Named(text.t5, text.t5_revision), "clip": Named(text.clip, text.clip_revision)}
    if config.data.kind == "shards" and not all(named[kind].name for kind in text.kind.split("+")):
        made = {identity["kind"]: Named.of(identity) for identity in _first_manifest(config).text}
        named = {kind: one if one.name else made.get(kind, one) for kind, one in named.items()}
    names, revisions = ({kind: one[i] for kind, one in named.items()} for i in range(2))
    return load_encoders(text.kind, names, revisions, text.length, device, torch.float32, online)


def autoencoder_of(config: RunConfig) -> Named | None:
    """The autoencoder that pictures are decoded with: that of the configuration, else the data's.

    None where latents are pixels.
    """
    data = config.data
    if data.autoencoder:
        return Named(data.autoencoder, data.autoencoder_revision)
    made = _first_manifest(config).autoencoder if data.kind == "shards" else None
    return None if made is None else Named.of(made)


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
