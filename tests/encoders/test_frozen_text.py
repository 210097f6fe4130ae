"""States, masks and pooled vectors against transformers' classes called directly, and what is refused."""

import copy
import json
from pathlib import Path

import pytest
import sentencepiece
import torch
import transformers
from safetensors.torch import load_file, save_file

from megadit.encoders.frozen_text import FrozenText, load_encoders
from tools import tiny_encoders as tiny

LENGTH = 77
# From one token to more than are read, so that widths differ; case, spaces and letters that no tokenizer has seen.
TEXTS = [
    "",
    "a cat",
    "a large bright painting of the two horses in the street with a dog and a camera on the river",
    " ".join(["red stone"] * 50),
    "  A  PHOTO\n of a Café — 七! ",
    " ".join(["coffee"] * 31),
    "a cat",
]
MODELS = {
    "T5EncoderModel": ("t5", tiny.make_t5, {}),
    "CLIPTextModel": ("clip", tiny.make_clip, {"projection": False}),
    "CLIPTextModelWithProjection": ("clip", tiny.make_clip, {"projection": True}),
}
# Of networks in float64, whose outputs are rounded to float32. T5 takes variances and the softmax in float32 in every
# precision; its states reach 4, where float32 has steps of 5e-7.
CLOSE = {"clip": {"rtol": 0, "atol": 1e-6}, "t5": {"rtol": 0, "atol": 1e-5}}


def load(kind, folder, length=LENGTH, dtype=torch.float64):
    return FrozenText.load(kind, str(folder), length, "cpu", dtype)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The class of transformers -> a folder with such a model."""
    return {name: make(tmp_path_factory.mktemp(name), **options) for name, (_, make, options) in MODELS.items()}


@pytest.fixture(scope="module", params=MODELS)
def ours(request, folders):
    return load(MODELS[request.param][0], folders[request.param])


def direct(ours, texts, length=LENGTH):
    """(the tokens, the output) of transformers' own classes."""
    folder = Path(ours.identity["name"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    network = getattr(transformers, ours.identity["class"]).from_pretrained(folder).double().eval()
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    with torch.no_grad():
        return tokens, network(**tokens)


@pytest.mark.parametrize("length", [8, 40, LENGTH])
def test_states_and_pooled_are_theirs(ours, length):
    mine = load(ours.kind, ours.identity["name"], length)
    tokens, theirs = direct(ours, TEXTS, length)
    said = mine.encode(TEXTS)
    mask_BL = tokens.attention_mask.bool()
    assert torch.equal(said.mask_BL, mask_BL)
    assert said.states_BLC.shape == (len(TEXTS), length, ours.channels)
    states_NC = theirs.last_hidden_state[mask_BL].float()
    assert states_NC.std() > 0.3, "or anything is close"
    torch.testing.assert_close(said.states_BLC[mask_BL], states_NC, **CLOSE[ours.kind])
    if ours.kind == "t5":
        assert said.pooled_BP is None and ours.pooled == 0
        return
    pooled_BP = theirs.text_embeds if "Projection" in ours.identity["class"] else theirs.pooler_output
    torch.testing.assert_close(said.pooled_BP, pooled_BP.float(), **CLOSE[ours.kind])
    assert said.pooled_BP.shape == (len(TEXTS), ours.pooled) and pooled_BP.std(dim=0).mean() > 0.1


def test_padding_is_masked_and_zero(ours):
    said = ours.encode(TEXTS)
    assert said.mask_BL.dtype == torch.bool
    assert torch.all(said.mask_BL[:, :-1] >= said.mask_BL[:, 1:]), "tokens first, then padding"
    assert said.mask_BL[0].sum() == (1 if ours.kind == "t5" else 2) and said.mask_BL[3].all()
    assert torch.all(said.states_BLC[~said.mask_BL] == 0)
    assert torch.all(said.states_BLC[said.mask_BL].abs().amax(-1) > 0)


def test_a_text_says_the_same_alone_in_any_order_and_at_any_length(ours):
    together, backwards = ours.encode(TEXTS), ours.encode(TEXTS[::-1])
    longer, close = load(ours.kind, ours.identity["name"], LENGTH - 5), CLOSE[ours.kind]
    for i, text in enumerate(TEXTS):
        alone, other = ours.encode([text]), longer.encode([text])
        torch.testing.assert_close(alone.states_BLC[0], together.states_BLC[i], **close)
        torch.testing.assert_close(backwards.states_BLC[-1 - i], together.states_BLC[i], **close)
        if not longer.too_long([text]):
            torch.testing.assert_close(other.states_BLC[0], together.states_BLC[i, : LENGTH - 5], **close)
        if ours.pooled:
            torch.testing.assert_close(alone.pooled_BP[0], together.pooled_BP[i], **close)
    torch.testing.assert_close(together.states_BLC[1], together.states_BLC[6], **close)


def test_a_long_text_is_cut_and_still_ends(ours):
    tokens, _ = direct(ours, TEXTS)
    whole = [len(ids) for ids in ours.tokenizer(TEXTS).input_ids]
    assert whole[3] > LENGTH and ours.too_long(TEXTS) == [TEXTS[3]]
    assert tokens.input_ids[3, -1] == ours.tokenizer.eos_token_id
    fitting = load(ours.kind, ours.identity["name"], whole[2])
    assert fitting.too_long([TEXTS[2], "a cat"]) == []
    assert load(ours.kind, ours.identity["name"], whole[2] - 1).too_long([TEXTS[2], "a cat"]) == [TEXTS[2]]
    assert ours.too_long([]) == []


def test_identity_says_what_it_is(ours):
    identity = dict(ours.identity)
    assert len(identity.pop("fingerprint")) == 16 and identity.pop("name")
    pooled = {"T5EncoderModel": 0, "CLIPTextModel": 32, "CLIPTextModelWithProjection": 24}[identity["class"]]
    assert identity == {
        "kind": ours.kind,
        "revision": "",
        "class": identity["class"],
        "channels": 32,
        "pooled": pooled,
        "length": LENGTH,
    }
    assert (ours.channels, ours.pooled, ours.length) == (32, pooled, LENGTH)
    assert json.loads(json.dumps(ours.identity)) == ours.identity


def test_nothing_trains(ours):
    """Nor where the network was about to: T5 would drop a tenth of what it computes."""
    training = copy.deepcopy(ours.network).train().requires_grad_(True)
    frozen = FrozenText(ours.kind, training, ours.tokenizer, LENGTH, {"name": "copy"})
    assert not frozen.network.training and same_words(frozen, ours)
    assert not any(parameter.requires_grad for parameter in frozen.network.parameters())
    assert not ours.encode(["a cat"]).states_BLC.requires_grad


def test_t5s_tokens_are_sentencepieces_own(folders):
    folder = folders["T5EncoderModel"]
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    tokenizer = load("t5", folder).tokenizer
    texts = [*TEXTS, *tiny.captions(50, seed=1), "ｆｕｌｌ width", "…", "\u200bzero", "tab\there", "x" * 40]
    assert tokenizer(texts).input_ids == [[*pieces.encode(text), 1] for text in texts]
    assert tokenizer.pad_token_id == 0 and len(tokenizer) == pieces.get_piece_size() + 100


def test_clips_tokens_are_those_of_its_merges(folders):
    """Words of the vocabulary are one token each, in any case; others fall apart into bytes, never into unknown."""
    tokenizer = load("clip", folders["CLIPTextModel"]).tokenizer
    begin, end = tokenizer.convert_tokens_to_ids(["<|startoftext|>", "<|endoftext|>"])
    vocabulary = json.loads((folders["CLIPTextModel"] / "vocab.json").read_text(encoding="utf-8"))
    assert tokenizer("A Cat  on\nTHE house").input_ids == [
        begin, *(vocabulary[f"{word}</w>"] for word in ("a", "cat", "on", "the", "house")), end
    ]  # fmt: skip
    assert tokenizer.convert_ids_to_tokens(tokenizer("é七").input_ids)[1:-1] == ["Ã", "©", "ä", "¸", "ĥ</w>"]
    assert tokenizer.pad_token_id == end == len(tokenizer) - 1


@pytest.mark.parametrize("name", MODELS)
def test_another_weight_or_vocabulary_is_another_fingerprint(tmp_path, folders, name):
    kind, make, options = MODELS[name]
    make(tmp_path, **options)
    before = load(kind, folders[name]).identity["fingerprint"]
    assert load(kind, tmp_path).identity["fingerprint"] == before, "of content, not of place"
    vocabulary = tmp_path / ("spiece.model" if kind == "t5" else "merges.txt")
    content = vocabulary.read_bytes()
    if kind == "t5":
        vocabulary.write_bytes(tiny.train_sentencepiece(tiny.captions(seed=9)))
    else:
        vocabulary.write_bytes(content.rpartition(b"\n")[0].rpartition(b"\n")[0] + b"\n")
    assert load(kind, tmp_path).identity["fingerprint"] != before
    vocabulary.write_bytes(content)
    weights = load_file(tmp_path / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1e-3
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert load(kind, tmp_path).identity["fingerprint"] != before


def test_states_of_bfloat16_are_float32_and_near(ours):
    half = load(ours.kind, ours.identity["name"], dtype=torch.bfloat16)
    assert half.network.dtype == torch.bfloat16
    said, exact = half.encode(TEXTS), ours.encode(TEXTS)
    assert said.states_BLC.dtype == torch.float32
    error = (said.states_BLC - exact.states_BLC).norm() / exact.states_BLC.norm()
    assert 0 < error < 0.05
    if ours.pooled:
        assert said.pooled_BP.dtype == torch.float32


def same_words(one, other):
    """Whether two encoders have the same weights, bit for bit, and read texts alike.

    Their states are the same but for rounding: kernels round by how a tensor is aligned, and a tensor is used where its
    file has it.
    """
    mine, theirs = one.network.state_dict(), other.network.state_dict()
    has_same_weights = mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in theirs)
    said, expected = one.encode(TEXTS), other.encode(TEXTS)
    has_same_tokens = torch.equal(said.mask_BL, expected.mask_BL)
    is_close = torch.allclose(said.states_BLC, expected.states_BLC, **CLOSE[one.kind])
    return has_same_weights and has_same_tokens and is_close


def copy_tokenizer(source, target):
    for name in ("spiece.model", "vocab.json", "merges.txt"):
        if (source / name).exists():
            (target / name).write_bytes((source / name).read_bytes())


def test_the_encoder_of_a_whole_t5(tmp_path, folders):
    """As google/t5-v1_1-xxl's: T5ForConditionalGeneration, whose decoder is left out."""
    folder = folders["T5EncoderModel"]
    encoder = transformers.T5EncoderModel.from_pretrained(folder)
    config = transformers.T5Config(**(encoder.config.to_dict() | {"is_encoder_decoder": True}))
    whole = transformers.T5ForConditionalGeneration(config)
    whole.encoder.load_state_dict(encoder.encoder.state_dict(), strict=False)
    whole.shared.load_state_dict(encoder.shared.state_dict())
    whole.save_pretrained(tmp_path)
    copy_tokenizer(folder, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["T5ForConditionalGeneration"]
    loaded = load("t5", tmp_path)
    assert loaded.identity["class"] == "T5EncoderModel" and same_words(loaded, load("t5", folder))


def test_the_text_encoder_of_a_whole_clip(tmp_path, folders):
    """As openai/clip-vit-large-patch14's: CLIPModel, whose image encoder and projections are left out."""
    folder = folders["CLIPTextModel"]
    text = transformers.CLIPTextModel.from_pretrained(folder)
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = transformers.CLIPConfig(text_config=text.config.to_dict(), vision_config=vision.to_dict())
    whole = transformers.CLIPModel(config)
    whole.text_model.load_state_dict(text.state_dict())
    whole.save_pretrained(tmp_path)
    copy_tokenizer(folder, tmp_path)
    loaded = load("clip", tmp_path)
    assert (loaded.identity["class"], loaded.pooled) == ("CLIPTextModel", 32)
    assert same_words(loaded, load("clip", folder))


def test_names_of_published_files_are_understood(tmp_path):
    """A published CLIPTextModel's weights begin with text_model. and have positions among them."""
    tiny.make_clip(tmp_path, projection=False)
    before = load("clip", tmp_path).encode(TEXTS)
    weights = load_file(tmp_path / "model.safetensors")
    published = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in weights.items()}
    published["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(published, tmp_path / "model.safetensors", {"format": "pt"})
    after = load("clip", tmp_path).encode(TEXTS)
    torch.testing.assert_close(after.states_BLC, before.states_BLC, **CLOSE["clip"])
    torch.testing.assert_close(after.pooled_BP, before.pooled_BP, **CLOSE["clip"])


@pytest.mark.parametrize("name", MODELS)
def test_a_tokenizer_as_transformers_saves_it_now(tmp_path, folders, name):
    """tokenizer.json alone, without spiece.model or vocab.json."""
    kind = MODELS[name][0]
    ours = load(kind, folders[name])
    ours.network.save_pretrained(tmp_path)
    ours.tokenizer.save_pretrained(tmp_path)
    assert not {"spiece.model", "vocab.json"} & {path.name for path in tmp_path.iterdir()}
    assert same_words(load(kind, tmp_path), ours)


def test_weights_may_be_in_several_files(tmp_path, folders):
    ours = load("t5", folders["T5EncoderModel"])
    ours.network.save_pretrained(tmp_path, max_shard_size="20KB")
    copy_tokenizer(folders["T5EncoderModel"], tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert same_words(load("t5", tmp_path), ours)


@pytest.mark.parametrize("name", MODELS)
def test_a_tokenizer_needs_no_config(tmp_path, folders, name):
    kind, make, options = MODELS[name]
    make(tmp_path, **options)
    (tmp_path / "tokenizer_config.json").unlink()
    assert same_words(load(kind, tmp_path), load(kind, folders[name]))


def test_what_pads_a_text_does_not_matter(tmp_path, folders):
    """The second tokenizer of Stable Diffusion XL pads with "!", the vocabulary's first character."""
    tiny.make_clip(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tiny.CLIP_TOKENIZER | {"pad_token": "!"}))
    other, ours = load("clip", tmp_path), load("clip", folders["CLIPTextModelWithProjection"])
    assert other.tokenizer.pad_token_id == 0 != ours.tokenizer.pad_token_id
    texts = [text.replace("!", "?") for text in TEXTS]
    said, expected = other.encode(texts), ours.encode(texts)
    assert torch.equal(said.mask_BL, expected.mask_BL)
    torch.testing.assert_close(said.states_BLC, expected.states_BLC, **CLOSE["clip"])
    torch.testing.assert_close(said.pooled_BP, expected.pooled_BP, **CLOSE["clip"])


def test_clip_reads_as_many_as_it_can(folders):
    assert load("clip", folders["CLIPTextModel"], length=None).length == 77
    with pytest.raises(ValueError, match="t5 encoder .* reads texts of any length; set a length"):
        load("t5", folders["T5EncoderModel"], length=None)
    assert load("t5", folders["T5EncoderModel"], length=300).encode(TEXTS).mask_BL[3].sum() > 77


@pytest.mark.parametrize("length", [78, 256])
def test_a_length_that_clip_cannot_read_is_refused(folders, length):
    with pytest.raises(ValueError, match=f"reads at most 77 tokens, not {length}; set a length of 77 or less"):
        load("clip", folders["CLIPTextModel"], length=length)


@pytest.mark.parametrize("length", [1, 0, -3])
def test_a_length_without_room_is_refused(folders, length):
    with pytest.raises(ValueError, match=f"a length of {length} leaves no room for a text; set 2 tokens or more"):
        load("t5", folders["T5EncoderModel"], length=length)


def test_another_kinds_encoder_is_refused(folders):
    with pytest.raises(ValueError) as refused:
        load("clip", folders["T5EncoderModel"])
    assert "holds no clip encoder: " in str(refused.value) and "config.json is of T5EncoderModel" in str(refused.value)
    assert "one of CLIPTextModelWithProjection, CLIPTextModel, CLIPModel" in str(refused.value)
    with pytest.raises(ValueError, match="holds no t5 encoder: .*config.json is of CLIPTextModel; a t5 encoder is one"):
        load("t5", folders["CLIPTextModel"])


@pytest.mark.parametrize("architectures", [None, [], ["BertModel"], "T5EncoderModel"])
def test_another_class_is_refused(tmp_path, architectures):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": architectures, "model_type": "bert"}))
    with pytest.raises(ValueError, match="config.json is of (an unnamed architecture|BertModel); a t5 encoder is one"):
        load("t5", tmp_path)


@pytest.mark.parametrize(
    ("kind", "make", "lost", "message"),
    [
        ("t5", tiny.make_t5, "spiece.model", "has no tokenizer: neither spiece.model, nor tokenizer.json"),
        (
            "clip",
            tiny.make_clip,
            "vocab.json",
            "has no tokenizer: neither vocab.json with merges.txt, nor",
        ),
        (
            "clip",
            tiny.make_clip,
            "merges.txt",
            "has no tokenizer: neither vocab.json with merges.txt, nor",
        ),
        ("t5", tiny.make_t5, "model.safetensors", "has no model.safetensors"),
        ("clip", tiny.make_clip, "config.json", "has neither config.json nor text_encoder/config.json"),
    ],
)
def test_a_file_that_lacks_is_named(tmp_path, kind, make, lost, message):
    make(tmp_path)
    (tmp_path / lost).unlink()
    with pytest.raises(ValueError, match=f"{tmp_path} {message}"):
        load(kind, tmp_path)


@pytest.mark.parametrize(
    ("kind", "make", "file", "message"),
    [
        ("t5", tiny.make_t5, "spiece.model", "the tokenizer in .* cannot be loaded"),
        ("clip", tiny.make_clip, "vocab.json", "the tokenizer in .* cannot be loaded"),
        ("t5", tiny.make_t5, "model.safetensors", "cannot be loaded as T5EncoderModel"),
        ("clip", tiny.make_clip, "config.json", "config.json is not JSON"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, kind, make, file, message):
    make(tmp_path)
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=message):
        load(kind, tmp_path)


def test_weights_that_lack_are_not_drawn(tmp_path):
    tiny.make_clip(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"the weights in .* lack text_projection\.weight"):
        load("clip", tmp_path)


def test_weights_of_another_size_are_refused(tmp_path):
    tiny.make_t5(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"d_ff": 80}))
    with pytest.raises(ValueError, match="cannot be loaded as T5EncoderModel"):
        load("t5", tmp_path)


def test_a_tokenizer_of_another_model_is_refused(tmp_path, folders):
    tiny.make_t5(tmp_path, vocab_size=50)
    with pytest.raises(ValueError, match="the tokenizer has [0-9]+ tokens and the network 50; they are not of one mod"):
        load("t5", tmp_path)
    tiny.make_t5(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(ValueError, match="tokenizer_config.json is of LlamaTokenizer; the encoder's own is a T5Tok"):
        load("t5", tmp_path)


def test_the_encoders_of_each_kind(folders):
    sources = {"t5": str(folders["T5EncoderModel"]), "clip": str(folders["CLIPTextModelWithProjection"])}
    for kind in ("t5", "clip", "t5+clip"):
        encoders = load_encoders(kind, sources, {}, 20, "cpu", torch.float32)
        assert [encoder.kind for encoder in encoders] == kind.split("+")
        assert [encoder.length for encoder in encoders] == [20, 77][: len(encoders)]
    with pytest.raises(ValueError, match=r"text\.kind=t5\+clip needs text\.clip: name a folder or a model on the Hub"):
        load_encoders("t5+clip", {"t5": sources["t5"], "clip": ""}, {}, 20, "cpu", torch.float32)


def test_transformers_stays_as_talkative_as_it_was(folders, capfd):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load("t5", folders["T5EncoderModel"])
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")
