"""CLIP and DINOv2, small and random, in the format of the published ones."""

import json

import torch
import transformers

from tools import tiny_encoders as tiny

VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
PROCESSOR = {
    "crop_size": {"height": 16, "width": 16},
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 16},
}


def randomise(network, seed=0):
    """Other weights than transformers' own start, at which all pictures look alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            spread = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(spread * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1 + 0.15 * spread)
    return network


def make_clip(folder, length=77):
    """A CLIPModel with its tokenizer and its image processor's settings."""
    tiny.make_clip(folder, projection=True, length=length)
    text = transformers.CLIPTextConfig.from_pretrained(folder)
    vision = transformers.CLIPVisionConfig(**VISION, image_size=16, patch_size=4, projection_dim=24)
    config = transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24)
    randomise(transformers.CLIPModel(config)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


def make_dinov2(folder):
    """A Dinov2Model with its image processor's settings."""
    config = transformers.Dinov2Config(**{**VISION, "image_size": 16, "patch_size": 4, "mlp_ratio": 1})
    randomise(transformers.Dinov2Model(config)).save_pretrained(folder)
    settings = {**PROCESSOR, "image_processor_type": "BitImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder
