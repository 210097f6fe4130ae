"""What a call of the pipeline asks for, checked before anything is drawn."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from megadit.pipeline.folder import Parts, Size
from megadit.sampling.config import SampleConfig, check_installed
from megadit.training.config import check_sizes, numbers_make_sense, parse, sampling_of
from megadit.training.trained_sizes import not_among

logger = logging.getLogger("megadit")

OutputType = Literal["pil", "pt", "np", "latent"]
OUTPUT_TYPES = ("pil", "pt", "np", "latent")


def prompts_of(prompt: Any, repeats: int) -> list[str]:
    """Each prompt as often as it is to be drawn. A class may be an int. Raises ValueError for what is no prompt."""
    if type(repeats) is not int or repeats < 1:
        raise ValueError(f"num_images_per_prompt={repeats!r} must be a whole number of 1 or more")
    prompts = list(prompt) if isinstance(prompt, list | tuple) else [prompt]
    return [said for each in prompts for said in [text_of(each, "prompt")] * repeats]


def text_of(value: Any, name: str) -> str:
    if isinstance(value, str):
        return value
    if type(value) is int:
        return str(value)
    raise ValueError(f"{name} is {type(value).__name__}; give a str, or a list of them; a class may be an int")


def negatives_of(negative: Any, prompts: int, repeats: int) -> list[str] | None:
    """For each picture what guidance steers away from. Raises ValueError for another number of them than of prompts."""
    if negative is None:
        return None
    if not isinstance(negative, list | tuple):
        return [text_of(negative, "negative_prompt")] * (prompts * repeats)
    if len(negative) != prompts:
        raise ValueError(f"{len(negative)} negative prompts for {prompts} prompts; give one for each, or one for all")
    return [said for each in negative for said in [text_of(each, "negative_prompt")] * repeats]


def size_of(parts: Parts, height: int | None, width: int | None) -> Size:
    """(height, width) of the latents of pictures of so many pixels, by default the model's square.

    Warns of a size that the network was not trained on. Raises ValueError for one without whole patches.
    """
    model = parts.config.model
    cell = parts.decoder.cell
    sides = {"height": height, "width": width}
    step = cell * model.patch
    for name, side in sides.items():
        if side is not None and (type(side) is not int or side < 1 or side % step):
            raise ValueError(
                f"{name}={side!r} must be a multiple of {step} pixels: a patch is {model.patch} cells of {cell}"
            )
    tall, wide = (model.image_size if side is None else side // cell for side in (height, width))
    size = tall, wide
    check_sizes(parts.config, [size])
    if warning := not_among(parts.sizes, size, cell):
        logger.warning("%s", warning)
    return size


def settings_of(parts: Parts, default: SampleConfig, size: Size, **changes: Any) -> SampleConfig:
    """How pictures of a size are drawn: the pipeline's own settings but for what a call says.

    Raises ValueError naming the setting that makes no sense.
    """
    said = {key: value for key, value in changes.items() if value is not None}
    names = {"steps": "num_inference_steps", "guidance": "guidance_scale", "guidance_rescale": "guidance_rescale"}
    plain = dataclasses.asdict(default) | said
    try:
        settings = parse({"sample": plain}, CALL).sample
        faults = list(numbers_make_sense(replace(parts.config, sample=settings), 1))
        if faults:
            raise ValueError("; ".join(faults))
        check_installed(settings.sampler)
    except ValueError as error:
        raise ValueError(_in_words_of_the_call(str(error), names)) from error
    return sampling_of(parts.config, settings, size)


CALL = "ECDiTPipeline"


def _in_words_of_the_call(message: str, names: dict[str, str]) -> str:
    for key, name in sorted(names.items(), reverse=True):  # guidance_rescale before guidance
        message = message.replace(f"sample.{key}=", f"{name}=")
    return message


def check_output_type(output_type: str, channels: int) -> None:
    """Raises ValueError. channels: of a picture."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type={output_type!r} must be one of {', '.join(OUTPUT_TYPES)}")
    if output_type == "pil" and channels not in (1, 3):
        raise ValueError(f"pictures of {channels} channels are no PIL images; use output_type='pt', 'np' or 'latent'")


def check_tensor_inputs(names: Sequence[str]) -> None:
    """Raises ValueError naming what a callback cannot have."""
    others = [name for name in names if name != "latents"]
    if others:
        raise ValueError(
            f"callback_on_step_end_tensor_inputs names {', '.join(map(repr, others))}; a callback can have 'latents'"
        )
