"""One unit of an encoding: its samples decoded in threads, encoded in batches of one bucket, and written as shards.

A unit's bytes depend on its samples and on the settings alone: batches never mix units, and hold samples in order.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from megadit.data.buckets import Bucket, BucketRule, choose, fit
from megadit.data.frozen import Frozen, Latents
from megadit.data.images import MAX_PIXELS, allow, decode
from megadit.data.quarantine import Bad, Unusable
from megadit.data.shards import Caption, Sample
from megadit.data.tables import Columns
from megadit.data.told import Told
from megadit.data.units import Raw, Read


@dataclass(frozen=True)
class EncodeConfig:
    """What an encoding's bytes depend on, beside sources and encoders.

    unit: samples that are finished together. batch: images, and captions, of one call of an encoder. min_size: of the
    shorter side. max_pixels: of an image before it is scaled. seed: of the posterior's samples.
    """

    rule: BucketRule
    latents: Latents = "mean"
    dtype: torch.dtype = torch.bfloat16
    computed: torch.dtype = torch.float32  # what the encoders were loaded in
    unit: int = 1000
    batch: int = 32
    min_size: int = 128
    max_pixels: int = MAX_PIXELS
    seed: int = 0
    columns: Columns = Columns()


@dataclass(frozen=True)
class _Prepared:
    """A good sample before it is encoded: its place in the unit, and its pixels [H, W, 3], uint8."""

    place: int
    key: str
    bucket: Bucket
    pixels_HWC: np.ndarray
    told: Told


@dataclass(frozen=True)
class EncodedUnit:
    """samples by bucket, in their order. bad: in theirs. cut: captions that were too long, by encoder."""

    samples: Mapping[Bucket, Sequence[Sample]]
    bad: Sequence[Bad]
    cut: Mapping[str, int]


class UnitEncoder:
    """Encodes units, one at a time. `with` it, since it has threads."""

    def __init__(self, frozen: Frozen, config: EncodeConfig, device: torch.device, threads: int) -> None:
        allow(config.max_pixels)
        self.frozen, self.config, self.device = frozen, config, device
        self.buckets = config.rule.buckets()
        self.ahead = 2 * config.batch + threads  # images that wait for the encoders
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def __enter__(self) -> UnitEncoder:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def encode(self, samples: Iterable[Read], tick: Callable[[int], None]) -> EncodedUnit:
        """`tick` is told of so many more samples, good or bad, and may raise what ends the unit."""
        waiting: defaultdict[Bucket, list[_Prepared]] = defaultdict(list)
        encoded: defaultdict[Bucket, list[Sample]] = defaultdict(list)
        bad: list[tuple[int, Bad]] = []
        cut: Counter[str] = Counter(dict.fromkeys((encoder.kind for encoder in self.frozen.text), 0))

        def flush(bucket: Bucket) -> None:
            batch = waiting.pop(bucket)
            for prepared, sample in zip(batch, self._encode_batch(batch, cut), strict=True):
                if isinstance(sample, Bad):
                    bad.append((prepared.place, sample))
                else:
                    encoded[bucket].append(sample)
            tick(len(batch))

        for place, prepared in enumerate(self._prepared(samples)):
            if isinstance(prepared, Bad):
                bad.append((place, prepared))
                tick(1)
                continue
            waiting[prepared.bucket].append(prepared)
            if len(waiting[prepared.bucket]) == self.config.batch:
                flush(prepared.bucket)
        for bucket in sorted(waiting):
            flush(bucket)
        bad.sort(key=lambda each: each[0])
        return EncodedUnit(
            {bucket: encoded[bucket] for bucket in sorted(encoded)}, [each for _, each in bad], dict(cut)
        )

    def _prepared(self, samples: Iterable[Read]) -> Iterator[_Prepared | Bad]:
        """In order, and some ahead."""
        waiting: deque[Future[_Prepared | Bad]] = deque()
        try:
            for place, sample in enumerate(samples):
                waiting.append(self._pool.submit(self._prepare, place, sample))
                if len(waiting) > self.ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def _prepare(self, place: int, sample: Read) -> _Prepared | Bad:
        if isinstance(sample, Bad):
            return sample
        assert isinstance(sample, Raw)
        try:
            told = sample.told
            if self.frozen.text:
                told = told.cleaned()
            elif told.label is None:
                raise Unusable("no label", "without a text encoder a sample needs the number of its class")
            image = decode(sample.image, self.config.min_size, self.config.max_pixels)
            bucket = choose(self.buckets, image.height, image.width)
            return _Prepared(place, sample.key, bucket, np.asarray(fit(image, bucket)), told)
        except Unusable as bad:
            return bad.of(sample.key)

    def _encode_batch(self, batch: Sequence[_Prepared], cut: Counter[str]) -> list[Sample | Bad]:
        config = self.config
        pixels_BHWC = torch.from_numpy(np.stack([each.pixels_HWC for each in batch])).to(self.device)
        # As contiguous as any other images: the layout decides the order of sums, and so the last digit.
        pixels_BCHW = pixels_BHWC.permute(0, 3, 1, 2).float().contiguous() / 127.5 - 1
        keys = [each.key for each in batch]
        latents = self.frozen.latents(pixels_BCHW, keys, config.latents, config.seed, config.dtype)
        captions = self._captions(batch, cut)
        made: list[Sample | Bad] = []
        for each, latents_CHW, told in zip(batch, latents, captions, strict=True):
            if not latents_CHW.isfinite().all():
                made.append(Bad(each.key, "not finite latents"))
            elif not all(caption.states_LC.isfinite().all() for caption in told):
                made.append(Bad(each.key, "not finite text states"))
            elif not all(caption.pooled_P is None or caption.pooled_P.isfinite().all() for caption in told):
                made.append(Bad(each.key, "not finite text states", "the pooled vector"))
            else:
                label = None if self.frozen.text else each.told.label
                made.append(Sample(each.key, latents_CHW, told, label))
        return made

    def _captions(self, batch: Sequence[_Prepared], cut: Counter[str]) -> list[list[Caption]]:
        """Of each sample."""
        if not self.frozen.text:
            return [[] for _ in batch]
        texts = [text for each in batch for text in each.told.captions]
        weights = [weight for each in batch for weight in each.told.weights]
        encoded: list[Caption] = []
        for begin in range(0, len(texts), self.config.batch):
            end = begin + self.config.batch
            encoded += self.frozen.captions(texts[begin:end], weights[begin:end], self.config.dtype)
        cut.update(self.frozen.cut(texts))
        rest = iter(encoded)
        return [[next(rest) for _ in each.told.captions] for each in batch]
