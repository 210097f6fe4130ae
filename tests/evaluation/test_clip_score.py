"""The CLIP score of a small CLIP against cosines by hand, and what is refused."""

import numpy as np
import pytest
import torch
import transformers

from megadit.evaluation.clip_score import ClipScore, mean_score
from tests.evaluation.judges import make_clip, make_dinov2
from tests.evaluation.test_features import CPU, as_pixels, pictures
from tools import tiny_encoders as tiny

# Longer than CLIP reads: what decides is where it is cut, and that it still ends.
CAPTIONS = [*tiny.captions(5, seed=4), " ".join(["coffee rocket"] * 60)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip"))


def cosines(folder, shown, captions):
    network = transformers.CLIPModel.from_pretrained(folder).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    found = []
    with torch.no_grad():
        for picture, caption in zip(shown, captions, strict=True):
            ids = tokenizer([caption], truncation=True, max_length=77, return_tensors="pt").input_ids
            text = network.text_projection(network.text_model(input_ids=ids).pooler_output)[0].double()
            image = network.visual_projection(network.vision_model(pixel_values=as_pixels(picture)).pooler_output)
            image = image[0].double()
            found.append(float(text @ image / (text.norm() * image.norm())))
    return found


def test_the_score_is_100_times_the_mean_cosine(folder):
    shown, score = pictures(len(CAPTIONS)), ClipScore(folder, CPU)
    score.add(shown[:2], CAPTIONS[:2])
    score.add(shown[2:], CAPTIONS[2:])
    score.add([], [])
    expected = cosines(folder, shown, CAPTIONS)
    assert np.std(expected) > 1e-3, "all pairs are alike"
    total, count = score.sums()
    assert count == len(CAPTIONS)
    assert total == pytest.approx(100 * sum(expected), rel=1e-4, abs=1e-3)
    assert mean_score([score.sums()]) == max(total / count, 0)
    assert score.too_long(CAPTIONS) == 1


def test_ranks_are_averaged_over_their_pictures():
    assert mean_score([(30.0, 1), (10.0, 3), (0.0, 0)]) == pytest.approx(10)
    assert mean_score([(-3.0, 1)]) == 0
    with pytest.raises(ValueError, match="no pictures"):
        mean_score([(0.0, 0)])


def test_a_model_that_does_not_read_text_is_refused(tmp_path, folder):
    with pytest.raises(ValueError, match="not the folder of a CLIP model"):
        ClipScore(tmp_path / "none", CPU)
    with pytest.raises(ValueError, match="is of Dinov2Model; it must be of CLIPModel"):
        ClipScore(make_dinov2(tmp_path / "dino"), CPU)
    make_clip(tmp_path / "clip")
    (tmp_path / "clip" / "merges.txt").unlink()
    with pytest.raises(ValueError, match="has no tokenizer"):
        ClipScore(tmp_path / "clip", CPU)
