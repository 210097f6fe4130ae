"""Texts to the states of a frozen encoder of transformers: T5's, or CLIP's with its pooled vector."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from megadit.encoders.pretrained import (
    Source,
    fingerprint,
    missing_package,
    read_json,
    weight_files,
    weight_patterns,
)

Kind = Literal["t5", "clip"]
STEM = "model"
# A repository of its own, or the encoders of a pipeline, each with the tokenizer of the same number.
SUBFOLDERS = {
    "": "",
    "text_encoder": "tokenizer",
    "text_encoder_2": "tokenizer_2",
    "text_encoder_3": "tokenizer_3",
}
WIDTH_STEP = 32  # a text is run at the next multiple of so many tokens


class Family(NamedTuple):
    """What a kind of encoder is called in files: architecture in config.json -> class to load, tokenizer's files."""

    classes: Mapping[str, str]
    tokenizers: Sequence[str]
    vocabularies: Sequence[Sequence[str]]  # any of these groups of files will do


# T5ForConditionalGeneration and CLIPModel hold the encoder beside what is not needed. A CLIPModel's text encoder is
# taken without its projection, as Stable Diffusion and FLUX take it.
FAMILIES: dict[str, Family] = {
    "t5": Family(
        {
            "T5EncoderModel": "T5EncoderModel",
            "T5ForConditionalGeneration": "T5EncoderModel",
            "T5Model": "T5EncoderModel",
        },
        ("T5Tokenizer", "T5TokenizerFast"),
        (("spiece.model",), ("tokenizer.json",)),
    ),
    "clip": Family(
        {
            "CLIPTextModelWithProjection": "CLIPTextModelWithProjection",
            "CLIPTextModel": "CLIPTextModel",
            "CLIPModel": "CLIPTextModel",
        },
        ("CLIPTokenizer", "CLIPTokenizerFast"),
        (("vocab.json", "merges.txt"), ("tokenizer.json",)),
    ),
}
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True)
class TextStates:
    """What an encoder says of B texts: states [B, L, C], 0 at padding, mask [B, L], True at tokens, pooled [B, P].

    float32, on the encoder's device. pooled is None where the encoder has no such vector.
    """

    states_BLC: Tensor
    mask_BL: Tensor
    pooled_BP: Tensor | None


class FrozenText:
    """A T5EncoderModel, CLIPTextModel or CLIPTextModelWithProjection with its own tokenizer.

    identity: what it is, for a manifest; channels: of a state; pooled: of the pooled vector, 0 without one;
    length: tokens that are read of a text.
    """

    def __init__(self, kind: Kind, network: Any, tokenizer: Any, length: int, identity: Mapping[str, Any]) -> None:
        """`network` and `tokenizer` are transformers'; both are set up here. Raises ValueError if they do not fit."""
        self.kind, self.length = kind, length
        check_fit(network.config, tokenizer, length, f"{kind} encoder {identity.get('name', '')}".strip())
        self.network = network.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.tokenizer.padding_side = self.tokenizer.truncation_side = "right"
        self.channels = int(network.config.hidden_size)  # T5's d_model, too
        self._projects = hasattr(network, "text_projection")
        width = network.config.projection_dim if self._projects else self.channels
        self.pooled = int(width) if kind == "clip" else 0
        self.identity = {
            "kind": kind,
            **identity,
            "class": type(network).__name__,
            "channels": self.channels,
            "pooled": self.pooled,
            "length": length,
        }

    @classmethod
    def load(
        cls,
        kind: Kind,
        source: str,
        length: int | None,
        device: torch.device | str,
        dtype: torch.dtype,
        revision: str = "",
        online: bool = False,
    ) -> FrozenText:
        """The encoder that `source` names: a folder, or a model on the Hub; either may be a whole pipeline.

        Of a pipeline's text encoders the first of this `kind` is taken. `length`: tokens to read of a text; None: as
        many as CLIP can. Without `online` only what is on this machine is looked at. Raises ValueError that says what
        to change: not found, another class, a tokenizer that lacks or does not fit, a length that CLIP cannot read.
        """
        family, named = FAMILIES[kind], Source(source, revision, online)
        root = named.fetch([f"{name}/config.json".lstrip("/") for name in SUBFOLDERS])
        subfolder, class_name = find_encoder(root, kind, source)
        names = {file for group in family.vocabularies for file in group} | set(TOKENIZER_FILES)
        vocabulary = SUBFOLDERS[subfolder]
        wanted = [f"{vocabulary}/{name}".lstrip("/") for name in sorted(names)]
        root = named.fetch([*weight_patterns(subfolder, STEM), *wanted])
        paths = [*weight_files(root / subfolder, STEM), *tokenizer_files(root / vocabulary, family)]
        identity = {"name": source, "revision": named.commit(root), "fingerprint": fingerprint(paths)}
        with quiet():
            tokenizer = read_tokenizer(root / vocabulary, family)
            network = read_network(root / subfolder, class_name, dtype)
        if length is None:
            length = getattr(network.config, "max_position_embeddings", None)
            if length is None:
                raise ValueError(f"{kind} encoder {source} reads texts of any length; set a length")
        return cls(kind, network.to(device), tokenizer, length, identity)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> TextStates:
        """B texts as states, padded to `length` tokens. A longer text is cut; it still ends in the end token.

        pooled is CLIP's text_embeds where it has a projection, else its pooler_output. Padding is masked, and a text
        runs at a width that depends on nothing but its own tokens: short ones do not pay for `length`.
        """
        tokens = self.tokenizer(
            list(texts), truncation=True, max_length=self.length, padding="max_length", return_tensors="pt"
        )
        ids_BL, mask_BL = tokens.input_ids, tokens.attention_mask.bool()
        widths_B = mask_BL.sum(1).add(WIDTH_STEP - 1).div(WIDTH_STEP, rounding_mode="floor").mul(WIDTH_STEP)
        device = self.network.device
        states_BLC = torch.zeros(*ids_BL.shape, self.channels, device=device)
        pooled_BP = torch.zeros(len(ids_BL), self.pooled, device=device) if self.pooled else None
        for width in widths_B.clamp(max=self.length).unique().tolist():
            rows_N = (widths_B.clamp(max=self.length) == width).nonzero()[:, 0]
            ids_NW, mask_NW = ids_BL[rows_N, :width].to(device), mask_BL[rows_N, :width].to(device)
            said = self.network(input_ids=ids_NW, attention_mask=mask_NW.long())
            # where, not a product: what attention makes of padding may be anything.
            states_NWC = torch.where(mask_NW[..., None], said.last_hidden_state.float(), 0.0)
            states_BLC[rows_N.to(device), :width] = states_NWC
            if pooled_BP is not None:
                pooled_NP = said.text_embeds if self._projects else said.pooler_output
                pooled_BP[rows_N.to(device)] = pooled_NP.float()
        return TextStates(states_BLC, mask_BL.to(device), pooled_BP)

    def too_long(self, texts: Sequence[str]) -> list[str]:
        """Those of the texts that `encode` cuts."""
        ids = self.tokenizer(list(texts), verbose=False).input_ids if texts else []
        return [text for text, tokens in zip(texts, ids, strict=True) if len(tokens) > self.length]


def load_encoders(
    kind: Literal["t5", "clip", "t5+clip"],
    sources: Mapping[str, str],
    revisions: Mapping[str, str],
    length: int,
    device: torch.device | str,
    dtype: torch.dtype,
    online: bool = False,
) -> list[FrozenText]:
    """The encoders of a kind of captions: [T5], [CLIP] or [T5, CLIP], `sources` and `revisions` of "t5" and "clip".

    `length`: tokens of a text whose states are read. Beside T5, CLIP's pooled vector is of as many as CLIP can read.
    Raises ValueError as FrozenText.load, and when a source is not named.
    """
    encoders: list[FrozenText] = []
    for family in kind.split("+"):
        if not sources.get(family):
            raise ValueError(f"text.kind={kind} needs text.{family}: name a folder or a model on the Hub")
        encoders.append(
            FrozenText.load(
                "t5" if family == "t5" else "clip",
                sources[family],
                None if encoders else length,
                device,
                dtype,
                revisions.get(family, ""),
                online,
            )
        )
    return encoders


def find_encoder(root: Path, kind: Kind, source: str) -> tuple[str, str]:
    """(the subfolder of `root`, the class of transformers) of the first encoder of a kind.

    Raises ValueError that says what is there instead.
    """
    family, found = FAMILIES[kind], {}
    for subfolder in SUBFOLDERS:
        path = root / subfolder / "config.json"
        if not path.is_file():
            continue
        architectures = read_json(path).get("architectures")
        names = architectures if isinstance(architectures, list) else []
        for name in names:
            if name in family.classes:
                return subfolder, family.classes[name]
        found[path] = " or ".join(map(str, names)) or "an unnamed architecture"
    takes = f"a {kind} encoder is one of {', '.join(family.classes)}"
    if found:
        others = ", ".join(f"{path} is of {name}" for path, name in found.items())
        raise ValueError(f"{source} holds no {kind} encoder: {others}; {takes}")
    raise ValueError(f"{source} has neither config.json nor text_encoder/config.json; {takes}")


def tokenizer_files(folder: Path, family: Family) -> list[Path]:
    """The files that decide how a text is cut into tokens. Raises ValueError naming what lacks."""
    for group in family.vocabularies:
        if all((folder / name).is_file() for name in group):
            return [folder / name for name in group]
    wanted = ", nor ".join(" with ".join(group) for group in family.vocabularies)
    raise ValueError(f"{folder} has no tokenizer: neither {wanted}; copy or download the encoder's own")


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without its bars and its table of weights that the encoder does not need."""
    try:
        import transformers  # noqa: F401 (the package first: what it lacks is said here)
        from transformers.utils import logging
    except ImportError as error:
        raise missing_package(error) from error
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def read_tokenizer(folder: Path, family: Family) -> Any:
    """transformers' own tokenizer. Raises ValueError naming the folder when it is another kind's or damaged."""
    import transformers

    config = folder / "tokenizer_config.json"
    named = read_json(config).get("tokenizer_class") if config.is_file() else None
    if named is not None and named not in family.tokenizers:
        raise ValueError(f"{config} is of {named}; the encoder's own is a {family.tokenizers[0]}")
    try:
        return getattr(transformers, family.tokenizers[0]).from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises nothing more special
        raise ValueError(f"the tokenizer in {folder} cannot be loaded: {type(error).__name__}: {error}") from error


def read_network(folder: Path, class_name: str, dtype: torch.dtype) -> Any:
    """transformers' own class with the weights of `folder`. Raises ValueError naming what does not fit."""
    import transformers
    from safetensors import SafetensorError

    try:
        network, report = getattr(transformers, class_name).from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be loaded as {class_name}: {type(error).__name__}: {error}") from error
    if report["missing_keys"]:  # they would be random
        raise ValueError(f"the weights in {folder} lack {', '.join(sorted(report['missing_keys'])[:3])}")
    return network


def check_fit(config: Any, tokenizer: Any, length: int, name: str) -> None:
    """Raises ValueError unless the network can read what the tokenizer gives it."""
    if length < 2:
        raise ValueError(f"a length of {length} leaves no room for a text; set 2 tokens or more")
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise ValueError(f"{name} reads at most {longest} tokens, not {length}; set a length of {longest} or less")
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens and the network {config.vocab_size}; "
            "they are not of one model"
        )
