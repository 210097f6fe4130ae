"""Write an autoencoder, a T5 and a CLIP text encoder that are small and random, in the format of published ones.

    python tools/tiny_encoders.py data/encoders         # data/encoders/vae, t5, clip
    python tools/tiny_encoders.py data/encoders --channels 16

For trying the path from images to samples where no weights can be downloaded: what loads them is not told. Latents are
of 8 x 8 pixels, T5's states 32 wide, CLIP's pooled vectors 24. Nothing that they make means anything.
"""

# ruff: noqa: E402 (the command line comes first)
from __future__ import annotations

import argparse
import io
import json
import random
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from megadit.runtime.tool import refuse_early


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--channels", type=int, default=4, help="of the latents (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":  # before the imports below, which take seconds
    refuse_early("tiny_encoders", partial(arguments().folder.mkdir, parents=True, exist_ok=True))

import sentencepiece
import torch

# As published beside T5's spiece.model and CLIP's vocab.json.
T5_TOKENIZER = {
    "additional_special_tokens": [f"<extra_id_{i}>" for i in range(100)],
    "eos_token": "</s>",
    "extra_ids": 100,
    "model_max_length": 512,
    "pad_token": "<pad>",
    "sp_model_kwargs": {},
    "tokenizer_class": "T5Tokenizer",
    "unk_token": "<unk>",
}
CLIP_TOKENIZER = {
    "add_prefix_space": False,
    "bos_token": "<|startoftext|>",
    "do_lower_case": True,
    "eos_token": "<|endoftext|>",
    "errors": "replace",
    "model_max_length": 77,
    "name_or_path": "openai/clip-vit-large-patch14",
    "pad_token": "<|endoftext|>",
    "special_tokens_map_file": "./special_tokens_map.json",
    "tokenizer_class": "CLIPTokenizer",
    "unk_token": "<|endoftext|>",
}
TEXT = """
a the of with and in on two three red green blue small large bright dark photo painting drawing cat dog bird
horse flower tree house street mountain river sky sea stone coffee cup rocket camera man woman child astronaut
"""
WORDS = TEXT.split()


def captions(count: int = 400, seed: int = 0) -> list[str]:
    """Sentences of the words that the tokenizers below are trained on."""
    draw = random.Random(seed)
    return [" ".join(draw.choice(WORDS) for _ in range(draw.randint(3, 12))) for _ in range(count)]


def make_autoencoder(
    folder: Path,
    channels: int = 4,
    downscale: int = 2,
    width: int = 8,
    layers: int = 1,
    attention: bool = False,
    seed: int = 0,
    **config: Any,
) -> Path:
    """An AutoencoderKL of `channels` latent channels; `downscale` is a power of two.

    `width` channels at full resolution, twice as many below; with `layers` 0 as many everywhere and no residual blocks
    but the middle's, a tenth of the time (`width` 4: a few ms for 256 x 256 pixels). Attention in the middle, as
    published ones have it, costs the square of a latent's cells. `config` goes into AutoencoderKL's own.
    """
    from diffusers import AutoencoderKL

    levels = downscale.bit_length()
    assert 2 ** (levels - 1) == downscale, "a power of two"
    settings: dict[str, Any] = {
        "block_out_channels": (width, *[2 * width if layers else width] * (levels - 1)),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": layers,
        "norm_num_groups": min(4, width),
        "latent_channels": channels,
        "sample_size": 32,
        "mid_block_add_attention": attention,
        "force_upcast": False,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network: Any = AutoencoderKL(**(settings | config))
        network.save_pretrained(folder)
    return folder


def make_t5(
    folder: Path,
    tokenizer: Path | None = None,
    width: int = 32,
    sentences: Iterable[str] | None = None,
    seed: int = 0,
    **config: Any,
) -> Path:
    """A T5EncoderModel of width `width` and, in `tokenizer` (by default the same folder), its spiece.model."""
    from transformers import T5Config, T5EncoderModel

    model = train_sentencepiece(captions() if sentences is None else sentences)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
    settings: dict[str, Any] = {
        "vocab_size": pieces + 100,  # and T5's hundred sentinels
        "d_model": width,
        "d_kv": 8,
        "d_ff": 2 * width,
        "num_heads": 4,
        "num_layers": 2,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "is_encoder_decoder": False,
    }
    save_text_model(folder, T5EncoderModel, T5Config(**(settings | config)), seed)
    files = tokenizer or folder
    files.mkdir(parents=True, exist_ok=True)
    (files / "spiece.model").write_bytes(model)
    (files / "tokenizer_config.json").write_text(json.dumps(T5_TOKENIZER))
    return folder


def make_clip(
    folder: Path,
    projection: bool = True,
    tokenizer: Path | None = None,
    width: int = 32,
    pooled: int = 24,
    length: int = 77,
    sentences: Iterable[str] | None = None,
    seed: int = 0,
    **config: Any,
) -> Path:
    """A CLIPTextModelWithProjection, or a CLIPTextModel, and, in `tokenizer` (by default the same folder), its files.

    The pooled vector is `pooled` wide with a projection and `width` without; `length` tokens are the most it reads.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    vocabulary, merges = train_byte_pairs(captions() if sentences is None else sentences, 200)
    settings: dict[str, Any] = {
        "vocab_size": len(vocabulary),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "projection_dim": pooled,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": length,
        "bos_token_id": vocabulary["<|startoftext|>"],
        "eos_token_id": vocabulary["<|endoftext|>"],
        "pad_token_id": vocabulary["<|endoftext|>"],
    }
    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    save_text_model(folder, kind, CLIPTextConfig(**(settings | config)), seed)
    files = tokenizer or folder
    files.mkdir(parents=True, exist_ok=True)
    (files / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (files / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    (files / "tokenizer_config.json").write_text(json.dumps(CLIP_TOKENIZER))
    return folder


def save_text_model(folder: Path, kind: Any, config: Any, seed: int) -> None:
    """Saves a model whose every weight is random: transformers would start biases at 0, norms at 1 and most too small.

    States that hardly depend on the text would agree with anything.
    """
    generator = torch.Generator().manual_seed(seed)
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = torch.randn(parameter.shape, generator=generator)
            matrix = parameter.ndim > 1
            parameter.copy_(spread * parameter.shape[-1] ** -0.5 if matrix else 1 + 0.15 * spread)
    model.save_pretrained(folder)


def train_sentencepiece(sentences: Iterable[str]) -> bytes:
    """A model whose special pieces are T5's: padding 0, end 1, unknown 2, no begin."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=120,
        hard_vocab_limit=False,
        num_threads=1,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def train_byte_pairs(sentences: Iterable[str], count: int) -> tuple[dict[str, int], list[str]]:
    """(the vocabulary, at most `count` merges) of CLIP's byte-level byte-pair encoding.

    A word's last piece ends in </w>. Order: bytes, bytes that end a word, merges, begin and end, as in the published
    vocabulary.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    words = Counter(word for sentence in sentences for word in sentence.lower().split())
    # Of the words that are trained on every byte is its own character.
    pieces = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs = Counter[tuple[str, str]]()
        for word, parts in pieces.items():
            for pair in zip(parts, parts[1:], strict=False):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        pieces = {word: merge(parts, best) for word, parts in pieces.items()}
    characters = sorted(ByteLevel.alphabet())
    tokens = [*characters, *(f"{character}</w>" for character in characters), *("".join(pair) for pair in merges)]
    tokens = list(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))
    return {token: number for number, token in enumerate(tokens)}, [" ".join(pair) for pair in merges]


def merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """The parts with each occurrence of the pair as one."""
    out: list[str] = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return out


def main() -> None:
    args = arguments()
    made = (
        make_autoencoder(args.folder / "vae", args.channels, downscale=8, scaling_factor=4.0),  # to about unit variance
        make_t5(args.folder / "t5"),
        make_clip(args.folder / "clip"),
    )
    print("\n".join(map(str, made)))


if __name__ == "__main__":
    main()
