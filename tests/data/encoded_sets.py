"""Data sets of random numbers in the real format, for tests."""

import torch

from megadit.data.manifest import SHARDS_FOLDER, Bucket, Manifest, shard_path, write_manifest
from megadit.data.shards import Caption, Sample, write_empty, write_shard
from megadit.runtime.seed import stream

CHANNELS, POOLED = 6, 5
T5 = {"kind": "t5", "name": "small", "revision": "", "channels": CHANNELS, "pooled": 0, "fingerprint": "a"}
VAE = {"name": "vae", "channels": 2, "fingerprint": "b"}
BUCKETS = {(64, 64): (2, 4, 4), (64, 96): (2, 4, 6), (96, 64): (2, 6, 4)}  # pixels: latents


def make_sample(number, latent, dtype=torch.float32, captions=2, pooled=False, classes=0):
    """A sample whose tensors and numbers of tokens are random, and its first latent and states are its number."""
    generator = stream(7, "sample", number)

    def caption(place):
        length = int(torch.randint(1, 6, (), generator=generator))
        states = torch.randn(length, CHANNELS, generator=generator)
        states[0, 0], states[0, 1] = number, place
        vector = torch.randn(POOLED, generator=generator).to(dtype) if pooled else None
        return Caption(states.to(dtype), vector, weight=1.0 + place)

    latents = torch.randn(latent, generator=generator)
    latents[0, 0, 0] = number
    told = [caption(place) for place in range(captions)]
    return Sample(f"sample {number} ü", latents.to(dtype), told, number % classes if classes else None)


def write_set(folder, counts, dtype="float32", captions=2, pooled=False, classes=0, shard=5, first=0, **manifest):
    """A data set of so many samples for each size in pixels, numbered from `first` on; its samples by number."""
    (folder / SHARDS_FOLDER).mkdir(parents=True)
    buckets, samples, number = [], {}, first
    for (height, width), count in counts.items():
        latent, shards = BUCKETS[height, width], []
        for begin in range(0, count, shard):
            of_shard = []
            for _ in range(min(shard, count - begin)):
                made = make_sample(number, latent, getattr(torch, dtype), captions, pooled, classes)
                of_shard.append(made)
                samples[number] = made
                number += 1
            shards.append(write_shard(shard_path(folder, f"{height}x{width}_{begin:06d}.safetensors"), of_shard))
        buckets.append(Bucket(height, width, latent, tuple(shards)))
    text = ()
    if captions:
        text = (T5 | {"pooled": POOLED},) if pooled else (T5,)
        empty = make_sample(10**6, BUCKETS[64, 64], getattr(torch, dtype), 1, pooled).captions[0]
        write_empty(folder, empty)
    kind = "t5" if captions else "none"
    settings = {"dtype": dtype, "autoencoder": VAE, "latents": "mean", "text_kind": kind, "text": text} | manifest
    write_manifest(folder, Manifest(buckets=tuple(buckets), **settings))
    return samples
