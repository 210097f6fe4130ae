"""`ECDiTPipeline`: prompts to pictures, called as pipelines of diffusers are; it imports diffusers for its parts only.

Pictures of a seed are those of tools/sample.py to rounding; bit for bit where both make the same calls, that is with as
many pictures at once, as many threads and the run's own files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from megadit.conversion.weights import Weights
from megadit.diffusion.sampler import OnStep, Progress, go_on
from megadit.diffusion.timesteps import sampling_times
from megadit.encoders.condition import FrozenCaptions
from megadit.model.ecdit import ECDiT
from megadit.pipeline.folder import Parts, read_pipeline, read_run, write_pipeline
from megadit.pipeline.network import Whole, build_network
from megadit.pipeline.noise import Generators, starting_point
from megadit.pipeline.request import (
    OutputType,
    check_output_type,
    check_tensor_inputs,
    negatives_of,
    prompts_of,
    settings_of,
    size_of,
)
from megadit.sampling.config import SampleConfig
from megadit.sampling.generate import generate
from megadit.sampling.picture import as_png, to_bytes
from megadit.sampling.routing import Recording, recorded
from megadit.training.config import images_per_group

Callback = Callable[["ECDiTPipeline", int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]


@dataclass(frozen=True)
class PipelineOutput:
    """What a call returns: PIL images, an array, or a tensor."""

    images: Any


class ECDiTPipeline:
    """A network, what reads its prompts, and what decodes its latents, on one device.

    scheduler: how pictures are drawn unless a call says otherwise; set it, or `sampler`, to draw differently.
    """

    def __init__(self, parts: Parts, transformer: ECDiT) -> None:
        """`from_pretrained` and `from_run` are the ways in."""
        self.parts, self.network = parts, Whole(transformer)
        self.scheduler = parts.config.sample
        self._bar: dict[str, Any] = {}
        self._recording: Recording | None = None

    # --- in and out ---------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        torch_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        encoder_dtype: torch.dtype = torch.float32,
    ) -> ECDiTPipeline:
        """The pipeline that `save_pretrained` wrote to `folder`.

        torch_dtype: of the network, by default as it was saved. encoder_dtype: of frozen text encoders and the
        autoencoder; a narrower one takes less memory, and draws slightly other pictures. Raises ValueError naming the
        file that lacks or is damaged.
        """
        place = torch.device(device)
        return cls.of(*read_pipeline(Path(folder).expanduser(), place, encoder_dtype), torch_dtype, place)

    @classmethod
    def from_run(
        cls,
        run: str | Path,
        torch_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        online: bool = False,
    ) -> ECDiTPipeline:
        """The averaged weights of the newest checkpoint of a run's folder.

        torch_dtype: of the network, by default the run's. online: text encoders and an autoencoder that are not on this
        machine are downloaded. Raises ValueError naming what is not there.
        """
        place = torch.device(device)
        parts, weights = read_run(Path(run).expanduser(), place, online)
        return cls.of(parts, weights, torch_dtype or parts.config.dtype, place)

    @classmethod
    def of(cls, parts: Parts, weights: Weights, dtype: torch.dtype | None, device: torch.device) -> ECDiTPipeline:
        """A pipeline of weights that lie on disk. dtype None: theirs."""
        if dtype is None:
            for name in weights.tensors:
                found = weights.spec(name).dtype
                dtype = found if dtype is None else torch.promote_types(dtype, found)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"torch_dtype={dtype!r} must be a floating-point torch.dtype, such as torch.bfloat16")
        return cls(parts, build_network(parts.config, weights, dtype, device))

    def save_pretrained(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write everything that `from_pretrained` needs; see `megadit.pipeline.folder` for the layout.

        overwrite: a pipeline of ours that lies there may go. Raises ValueError for a folder that is in use.
        """
        parts = replace(self.parts, config=replace(self.parts.config, sample=self.scheduler))
        settings: dict[str, Any] = {"desc": "saving", "unit": "B", "unit_scale": True, "dynamic_ncols": True}
        with tqdm(**settings | self._bar) as bar:

            def begin(total: int) -> Callable[[int], None]:
                bar.reset(total)
                return lambda count: (bar.update(count), None)[1]

            write_pipeline(Path(folder).expanduser(), parts, self.transformer, begin, overwrite)

    # --- what it is ---------------------------------------------------------------------------------------------------

    @property
    def transformer(self) -> ECDiT:
        """The network itself."""
        return self.network.network

    @property
    def group(self) -> int:
        """Pictures that are routed together: of the last such group some may be drawn and thrown away."""
        return images_per_group(self.parts.config)

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the network."""
        return self.network.parameter.dtype

    @property
    def sampler(self) -> str:
        """The name of the scheduler's sampler: euler, heun, dpm++ or unipc."""
        return self.scheduler.sampler

    @sampler.setter
    def sampler(self, name: str) -> None:
        self.scheduler = replace(self.scheduler, sampler=self._checked(sampler=name).sampler)

    @property
    def components(self) -> dict[str, Any]:
        """The parts by diffusers' names; of two text encoders the second one has `_2`."""
        condition, autoencoder = self.parts.condition, self.parts.autoencoder
        found: dict[str, Any] = {"transformer": self.transformer, "scheduler": self.scheduler}
        for number, encoder in zip(("", "_2"), self.parts.text_encoders, strict=False):
            found |= {f"text_encoder{number}": encoder.network, f"tokenizer{number}": encoder.tokenizer}
        if not self.parts.text_encoders and hasattr(condition, "tokenizer"):
            found["tokenizer"] = condition.tokenizer
        return found | {"vae": None if autoencoder is None else autoencoder.network}

    def to(self, *targets: torch.device | str | torch.dtype) -> ECDiTPipeline:
        """Move everything to a device, the network to a precision, or both; returns the pipeline itself."""
        for target in targets:
            if isinstance(target, torch.dtype):
                self.transformer.to(target)
                continue
            device = torch.device(target)
            self.transformer.to(device)
            condition = self.parts.condition
            if isinstance(condition, FrozenCaptions):
                for encoder in condition.encoders:
                    encoder.network.to(device)
                self.parts = replace(self.parts, condition=FrozenCaptions(condition.encoders, condition.too_long))
            if self.parts.autoencoder is not None:
                self.parts.autoencoder.network.to(device)
        return self

    def set_progress_bar_config(self, **settings: Any) -> None:
        """Arguments of tqdm, such as disable=True."""
        self._bar = settings

    def progress_bar(self, steps: Iterable[int]) -> Iterable[int]:
        """The steps, with a bar."""
        settings: dict[str, Any] = {"desc": "drawing", "unit": "step", "dynamic_ncols": True} | self._bar
        return tqdm(steps, **settings)

    # --- drawing ------------------------------------------------------------------------------------------------------

    def __call__(
        self,
        prompt: str | int | Sequence[str] | Sequence[int],
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> PipelineOutput | tuple[Any]:
        """Draw each prompt `num_images_per_prompt` times, in order. What is None is as `scheduler` has it.

        prompt: of a network of classes their numbers. negative_prompt: what guidance steers away from, one for all
        prompts or one for each. height, width: in pixels, by default the model's square. generator: a seed (picture i
        is that of tools/sample.py with it), a torch.Generator, which draws the pictures in turn, or a list with one of
        either for each picture. latents: noise [pictures, C, H, W] to start from instead. output_type: "pil"; "pt",
        [B, C, H, W] from 0 to 1; "np", [B, H, W, C] from 0 to 1; or "latent", as the network makes them, which without
        an autoencoder are pixels from -1 to 1. callback_on_step_end(pipeline, step, timestep, {"latents": ...}): after
        each step, whose timestep is from 1000 to 0; latents that it returns in a dict are gone on with. A solver of
        diffusers remembers the steps before as they were.

        Returns a PipelineOutput, or with return_dict=False the tuple of its images. Raises ValueError naming the
        argument, prompt or picture at fault.
        """
        parts = self.parts
        prompts = prompts_of(prompt, num_images_per_prompt)
        asked = len(prompts) // num_images_per_prompt
        negative = negatives_of(negative_prompt, asked, num_images_per_prompt)
        size = size_of(parts, height, width)
        changes = {"steps": num_inference_steps, "guidance": guidance_scale, "guidance_rescale": guidance_rescale}
        settings = settings_of(parts, self.scheduler, size, **changes)
        check_output_type(output_type, 3 if parts.autoencoder else parts.config.model.channels)
        check_tensor_inputs(callback_on_step_end_tensor_inputs)
        image_shape = (parts.config.model.channels, *size)
        seed = 0
        if latents is None:
            seed, latents = starting_point(generator, len(prompts), image_shape)
        drawn_BCHW = generate(
            self.network,
            parts.condition,
            prompts,
            image_shape,
            settings,
            seed,
            self.dtype,
            group=self.group,
            progress=self._steps,
            latents=latents,
            negative=negative,
            on_step=self._told(callback_on_step_end, settings, callback_on_step_end_tensor_inputs),
        )
        images = self._shown(drawn_BCHW, output_type)
        return PipelineOutput(images) if return_dict else (images,)

    @contextmanager
    def recorded(self) -> Iterator[Recording]:
        """Records which patches the experts take in what is drawn inside the block.

        One call: `Recording.trace` is of pictures that were drawn together, and wants their number with those that
        fill the last `group`. Raises ValueError for a network without experts.
        """
        with recorded(self.network) as recording:
            self._recording = recording
            try:
                yield recording
            finally:
                self._recording = None

    @property
    def _steps(self) -> Progress:
        """What the sampler's steps go through."""
        return self.progress_bar if self._recording is None else self._recording.steps(self.progress_bar)

    def _checked(self, **changes: Any) -> SampleConfig:
        square = self.parts.config.model.image_size
        return settings_of(self.parts, self.scheduler, (square, square), **changes)

    def _told(self, callback: Callback | None, settings: SampleConfig, names: Sequence[str]) -> OnStep:
        """A callback of diffusers' kind as one of ours."""
        if callback is None:
            return go_on
        timesteps = 1000 * sampling_times(settings.steps, settings.shift)

        def on_step(step: int, time: Tensor, x_BCHW: Tensor) -> Tensor | None:
            returned = callback(self, step, timesteps[step], {"latents": x_BCHW} if "latents" in names else {})
            return (returned or {}).get("latents")

        return on_step

    def _shown(self, latents_BCHW: Tensor, output_type: OutputType) -> Any:
        if output_type == "latent":
            return latents_BCHW
        pixels_BCHW = self.parts.decoder.decode(latents_BCHW)
        if output_type == "pil":
            return [as_png(image) for image in to_bytes(pixels_BCHW)]
        unit_BCHW = (pixels_BCHW / 2 + 0.5).clamp(0, 1)
        return unit_BCHW if output_type == "pt" else as_array(unit_BCHW)


def as_array(images_BCHW: Tensor) -> np.ndarray:
    """[B, H, W, C], float32 at least."""
    return images_BCHW.permute(0, 2, 3, 1).cpu().numpy()
