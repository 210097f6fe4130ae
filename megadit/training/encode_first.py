"""Images that are encoded at a run's start, into its own folder: for fine-tunes on few of them.

From then on the run is one on an encoded data set. A start after a kill goes on encoding where it was, and one after
the end needs no encoder any more.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from tqdm import tqdm

from megadit.data.manifest import MANIFEST_FILE
from megadit.runtime.agreement import of_main, together
from megadit.runtime.launch import Process
from megadit.runtime.status import LOST
from megadit.runtime.stopping import StopRequests
from megadit.training.config import RunConfig
from megadit.training.encoded import open_text_encoders
from megadit.training.loop import Ending, Stopped

ENCODED_FOLDER = "encoded"  # in a run's folder


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
    if not of_main(lambda: (out / MANIFEST_FILE).exists()):
        from megadit.data import encode as encoding
        from megadit.data.buckets import BucketRule
        from megadit.data.encode_unit import EncodeConfig
        from megadit.data.frozen import Frozen
        from megadit.encoders.autoencoder import Autoencoder

        data, device = config.data, process.device
        with together():
            autoencoder = Autoencoder.load(data.autoencoder, device, torch.float32, data.autoencoder_revision)
            by_class = config.model.conditioning == "class"
            encoders = {encoder.kind: encoder for encoder in ([] if by_class else open_text_encoders(config, device))}
        settings = EncodeConfig(
            BucketRule((data.resolution,), autoencoder.downscale * config.model.patch),
            dtype=torch.bfloat16 if config.run.dtype == "bfloat16" else torch.float32,
            min_size=max(1, data.resolution // 2),
        )
        bar = tqdm(desc="encode", unit=" images", dynamic_ncols=True, disable=None if process.is_main else True)

        def show(done: int, total: int, before: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        try:
            frozen = Frozen(autoencoder, encoders.get("t5"), encoders.get("clip"))
            encoding.encode(process, [data.path], out, settings, frozen, stops, show)
        except encoding.Stopped as error:
            raise Stopped(f"stopped while encoding: {error}; start again to go on") from error
        except (encoding.Lost, OSError) as error:
            raise Unencoded(f"while encoding: {error}; start again to go on") from error
        finally:
            bar.close()
    return replace(config, data=replace(config.data, kind="shards", path=str(out)))
