"""Images that are encoded at a run's start, into its own folder: for fine-tunes on few of them.

From then on the run is one on an encoded data set. A start after a kill goes on encoding where it was, and one after
the end needs neither images nor encoders any more.
"""

from __future__ import annotations

import gc
import json
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from megadit.data.manifest import MANIFEST_FILE
from megadit.runtime.agreement import of_main, together
from megadit.runtime.disk import replace_file
from megadit.runtime.launch import Process
from megadit.runtime.status import LOST
from megadit.runtime.stopping import StopRequests
from megadit.training.config import RunConfig
from megadit.training.encoded import open_text_encoders
from megadit.training.loop import Ending, Stopped

if TYPE_CHECKING:
    from megadit.data.frozen import Frozen

logger = logging.getLogger("megadit")

ENCODED_FOLDER = "encoded"  # in a run's folder
ASKED_FILE = "encoded_from.json"  # beside it: what was asked for


class Unencoded(Ending):
    """A rank or the disk failed while images were encoded."""

    status = LOST


def encode_first(config: RunConfig, process: Process, stops: StopRequests) -> RunConfig:
    """The configuration with data.kind=shards in place of images, which are encoded by then. Collective.

    Raises ValueError for what a user can mend, the same on every rank, and an `Ending` when stopped, or when a rank or
    the disk fails.
    """
    if config.data.kind != "images":
        return config
    out = config.directory / ENCODED_FOLDER
    of_main(lambda: check_asked(config))
    if not of_main(lambda: (out / MANIFEST_FILE).exists()):
        encode_images(config, process, stops)
        gc.collect()  # the encoders
        if process.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(process.device)
    return replace(config, data=replace(config.data, kind="shards", path=str(out)))


def asked(config: RunConfig) -> dict[str, Any]:
    """What the encoding depends on, by key."""
    data, text = config.data, config.text
    found = {f"data.{key}": getattr(data, key) for key in ("path", "resolution", "autoencoder", "autoencoder_revision")}
    keys = ("kind", "t5", "t5_revision", "clip", "clip_revision", "length")
    found |= {f"text.{key}": getattr(text, key) for key in keys if config.model.conditioning == "text"}
    return found | {"model.patch": config.model.patch}


def check_asked(config: RunConfig) -> None:
    """Note what is asked for. Raises ValueError where the run's folder has images that were encoded in another way."""
    path, now = config.directory / ASKED_FILE, asked(config)
    try:
        if path.exists():
            before = json.loads(path.read_text())
            differences = [f"{key}={before.get(key)} is now {now[key]}" for key in now if before.get(key) != now[key]]
            if differences:
                raise ValueError(
                    f"the images in {config.directory / ENCODED_FOLDER} were encoded with other settings: "
                    f"{', '.join(differences)}; choose another run.dir, or remove that folder and {path.name}"
                )
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(now, indent=1).encode())
    except OSError as error:
        raise ValueError(f"run.dir={config.directory} cannot be written: {error.strerror}") from error


def encode_images(config: RunConfig, process: Process, stops: StopRequests) -> None:
    """Collective; raises as `encode_first`."""
    from megadit.data import encode as encoding
    from megadit.data.buckets import BucketRule
    from megadit.data.encode_unit import EncodeConfig

    data, out = config.data, config.directory / ENCODED_FOLDER
    with together():
        frozen = load_frozen(config, process.device)
    settings = EncodeConfig(
        BucketRule((data.resolution,), frozen.autoencoder.downscale * config.model.patch),
        dtype=torch.bfloat16 if config.run.dtype == "bfloat16" else torch.float32,
        min_size=max(1, data.resolution // 2),
    )
    bar = tqdm(desc="encode", unit=" images", dynamic_ncols=True, disable=None if process.is_main else True)

    def show(done: int, total: int, before: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    try:
        report = encoding.encode(process, [data.path], out, settings, frozen, stops, show)
    except encoding.Stopped as error:
        raise Stopped(f"stopped while encoding: {error}; start again to go on") from error
    except (encoding.Lost, OSError, dist.DistError) as error:
        raise Unencoded(f"while encoding: {error}; start again to go on") from error
    finally:
        bar.close()
    if process.is_main:
        logger.info("%d images are encoded", report.samples)
        if report.bad:
            bad = ", ".join(f"{count} {reason}" for reason, count in report.bad.items())
            logger.warning("images that are left out: %s; see %s", bad, out / "quarantine.jsonl")
        for kind, count in report.cut.items():
            if count:
                logger.warning("%d captions are cut to the tokens that %s reads", count, kind)


def load_frozen(config: RunConfig, device: torch.device) -> Frozen:
    """The encoders. Raises ValueError for one that is not there, or whose widths are not the network's."""
    from megadit.data.frozen import Frozen
    from megadit.encoders.autoencoder import Autoencoder

    data, model, text = config.data, config.model, config.text
    autoencoder = Autoencoder.load(data.autoencoder, device, torch.float32, data.autoencoder_revision)
    if autoencoder.channels != model.channels:
        raise ValueError(
            f"{data.autoencoder} makes latents of {autoencoder.channels} channels; set "
            f"model.channels={autoencoder.channels}"
        )
    if model.conditioning == "class":
        return Frozen(autoencoder)
    encoders = open_text_encoders(config, device)
    if encoders[0].channels != text.channels:
        raise ValueError(
            f"{encoders[0].identity['name']} makes states of {encoders[0].channels} channels; set "
            f"text.channels={encoders[0].channels}"
        )
    if text.pooled not in (0, encoders[-1].pooled):
        raise ValueError(
            f"{encoders[-1].identity['name']} makes pooled vectors of {encoders[-1].pooled}, 0 is none; set "
            f"text.pooled={encoders[-1].pooled}"
        )
    by_kind = {encoder.kind: encoder for encoder in encoders}
    return Frozen(autoencoder, by_kind.get("t5"), by_kind.get("clip"))
