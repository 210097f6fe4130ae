"""Encodings for tests: encoders that cost nothing, and ranks that are stopped and killed."""

import contextlib
import importlib.util
import io
import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

import tests.ranks
from megadit.data.buckets import BucketRule
from megadit.data.encode import encode
from megadit.data.encode_unit import EncodeConfig
from megadit.data.frozen import Frozen
from megadit.data.manifest import SHARDS_FOLDER, open_manifest
from megadit.data.shards import ShardReader
from megadit.encoders.frozen_text import TextStates
from megadit.runtime.launch import Meeting, Process
from tests.ranks import _Ranks, launcher_environ, run_ranks


class Pooled:
    """Latents are the colours of 8 x 8 pixels, with noise if asked to; of a black image they are not finite."""

    identity = {"name": "pooled", "fingerprint": "0"}
    downscale = 8

    def encode(self, pixels_BCHW, generators=None):
        latents_BCHW = torch.nn.functional.avg_pool2d(pixels_BCHW, 8)
        latents_BCHW[pixels_BCHW.flatten(1).amax(1) == -1] = torch.nan
        if generators is not None:
            noise = [torch.randn(latents_BCHW.shape[1:], generator=generator) for generator in generators]
            latents_BCHW = latents_BCHW + torch.stack(noise)
        return latents_BCHW


class Letters:
    """A state is a letter's number, in two channels; the pooled vector is the number of letters."""

    def __init__(self, kind="clip", length=12):
        self.kind, self.length = kind, length
        self.identity = {"kind": kind, "name": "letters", "length": length}

    def encode(self, texts):
        states_BLC, mask_BL = torch.zeros(len(texts), self.length, 2), torch.zeros(len(texts), self.length).bool()
        for row, text in enumerate(texts):
            codes = [*map(ord, text[: self.length - 1]), 0]  # and an end
            states_BLC[row, : len(codes)] = torch.tensor(codes)[:, None].float()
            mask_BL[row, : len(codes)] = True
        pooled_BP = torch.tensor([[float(len(text))] for text in texts]) if self.kind == "clip" else None
        return TextStates(states_BLC, mask_BL, pooled_BP)

    def too_long(self, texts):
        return [text for text in texts if len(text) >= self.length]


def stand_ins(text=("clip",)):
    return Frozen(Pooled(), *(Letters(kind) if kind in text else None for kind in ("t5", "clip")))


CONFIG = EncodeConfig(BucketRule((64,), 16), dtype=torch.float32, unit=25, batch=4, min_size=48)


@dataclass
class Never:
    """Nobody asks to stop."""

    reason: str | None = None

    def begin(self):
        pass


def encode_here(rank, world_size, store, sources, out, config, text, threads, stops=None):
    process = Process(rank, world_size, rank, torch.device("cpu"), Meeting(lambda: dist.FileStore(store, world_size)))
    shown = []

    def show(*counts):
        shown.append(counts)

    report = encode(process, sources, Path(out), config, stand_ins(text), stops or Never(), show, threads, patience_s=0)
    return report, shown


def encode_with(out, *sources, config=CONFIG, text=("clip",), world_size=1, threads=2):
    """(report, what was shown) of each of the ranks, with stand-ins for encoders."""
    # A store of its own for each, beside the folder.
    count = len(list(out.parent.glob("store_*")))
    store = str(out.parent / f"store_{count}")
    names = [str(source) for source in sources]
    return run_ranks(encode_here, world_size, store, names, str(out), config, text, threads)


def _tool(rank, environ, argv, with_stand_ins):
    """The command on one rank."""
    os.environ.update({key: value.format(rank=rank) for key, value in environ.items()})
    spec = importlib.util.spec_from_file_location("encode_dataset", "tools/encode_dataset.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    if with_stand_ins:
        tool.load = lambda args, device: stand_ins()
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        status = tool.main(argv)
    return status, output.getvalue(), errors.getvalue()


def tool_on(world_size, *argv, when=None, number=signal.SIGKILL, victims=None, with_stand_ins=True):
    """(exit status, stdout, stderr) of the command on each rank. `when`: send the victims (default: every rank) a
    signal as soon as it is true; of those that are killed nothing is known.
    """
    ranks = _Ranks()
    try:
        ranks.ask(world_size, _tool, launcher_environ(world_size), [str(each) for each in argv], with_stand_ins)
        if when is not None:
            ranks.wait_for(world_size, when)
            for rank in range(world_size) if victims is None else victims:
                os.kill(ranks.processes[rank].pid, number)
            if number == signal.SIGKILL:
                return None
        return ranks.gather(world_size, tests.ranks.TIME_LIMIT)
    finally:
        ranks.kill()


def units_done(out):
    """How many units are finished."""
    folder = out / "units"
    return sum(path.suffix == ".json" for path in folder.iterdir()) if folder.exists() else 0


def files_of(out):
    """Every file's content by name."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def samples_of(out):
    """Every sample of a finished data set, in the manifest's order."""
    manifest = open_manifest(out, verify=True)
    for bucket in manifest.buckets:
        for shard in bucket.shards:
            reader = ShardReader(out / SHARDS_FOLDER / shard.file)
            for index in range(len(reader)):
                sample = reader.sample(index)
                assert tuple(sample.latents_CHW.shape) == bucket.latent
                yield sample


def quarantine_of(out):
    """Reasons by key; a key is there once."""
    lines = [json.loads(line) for line in (out / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()]
    reasons = {line["key"]: line["reason"] for line in lines}
    assert len(reasons) == len(lines)
    return reasons
