"""Features against the networks called by hand, and what is refused."""

import importlib.util
import json
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from megadit.evaluation.features import open_extractor
from tests.evaluation.judges import make_clip, make_dinov2

MEAN = np.array([0.48145466, 0.4578275, 0.40821073])  # CLIP's, which both small models have
STD = np.array([0.26862954, 0.26130258, 0.27577711])
CPU = torch.device("cpu")
HAS_INCEPTION = importlib.util.find_spec("torch_fidelity") and importlib.util.find_spec("torchvision")


def pictures(count=4, sizes=((16, 16),)):
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 256, (*sizes[i % len(sizes)], 3), np.uint8)) for i in range(count)]


def as_pixels(picture):
    """What a 16 x 16 picture is to a network: nothing to resize or to crop."""
    return torch.from_numpy(((np.asarray(picture) / 255 - MEAN) / STD).transpose(2, 0, 1)).float()[None]


def by_hand(folder, picture):
    config = json.loads((folder / "config.json").read_text())
    with torch.no_grad():
        if config["architectures"] == ["Dinov2Model"]:
            network = transformers.Dinov2Model.from_pretrained(folder).eval()
            return network(pixel_values=as_pixels(picture)).last_hidden_state[:, 0]
        network = transformers.CLIPModel.from_pretrained(folder).eval()
        return network.visual_projection(network.vision_model(pixel_values=as_pixels(picture)).pooler_output)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {make.__name__: make(tmp_path_factory.mktemp(make.__name__)) for make in (make_clip, make_dinov2)}


@pytest.mark.parametrize(("make", "width"), [("make_clip", 24), ("make_dinov2", 32)])
def test_features_are_the_networks_own(folders, make, width):
    extractor = open_extractor(folders[make], CPU)
    shown = pictures()
    found = extractor.extract(shown)
    assert found.shape == (4, width) and extractor.width == width and found.dtype == torch.float32
    for picture, row in zip(shown, found, strict=True):
        torch.testing.assert_close(row[None], by_hand(folders[make], picture), rtol=1e-4, atol=1e-5)
    assert (found - found[:1]).abs()[1:].max() > 0.1, "all pictures look alike"
    assert len(extractor.identity["fingerprint"]) == 16


@pytest.mark.parametrize("make", ["make_clip", "make_dinov2"])
def test_pictures_of_any_size_are_resized_each_by_itself(folders, make):
    extractor = open_extractor(folders[make], CPU)
    shown = pictures(3, sizes=((16, 16), (40, 20), (9, 30)))
    together, alone = extractor.extract(shown), torch.cat([extractor.extract([picture]) for picture in shown])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_what_is_not_there_is_named(tmp_path, folders):
    with pytest.raises(ValueError, match="none: neither the folder of a CLIP or DINOv2 model nor the file"):
        open_extractor(tmp_path / "none", CPU)
    with pytest.raises(ValueError, match="config.json: No such file"):
        open_extractor(tmp_path, CPU)
    (tmp_path / "config.json").write_text('{"architectures": ["ResNet"]}')
    with pytest.raises(ValueError, match="is of ResNet; it must be of CLIPModel"):
        open_extractor(tmp_path, CPU)


def test_a_folder_without_its_processor_or_weights_is_refused(tmp_path):
    folder = make_dinov2(tmp_path)
    settings = (folder / "preprocessor_config.json").read_text()
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="preprocessor_config.json: No such file"):
        open_extractor(folder, CPU)
    (folder / "preprocessor_config.json").write_text(settings.replace("BitImageProcessor", "ViTImageProcessor"))
    with pytest.raises(ValueError, match="is of ViTImageProcessor"):
        open_extractor(folder, CPU)
    (folder / "preprocessor_config.json").write_text(settings)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot be loaded as Dinov2Model"):
        open_extractor(folder, CPU)


@pytest.mark.skipif(bool(HAS_INCEPTION), reason="torch-fidelity and torchvision are installed")
def test_inception_names_the_packages_that_it_needs(tmp_path):
    (tmp_path / "inception.pth").write_bytes(b"")
    with pytest.raises(ValueError, match="need the packages torch-fidelity and torchvision"):
        open_extractor(tmp_path / "inception.pth", CPU)


class Normalised(torch.nn.Module):
    """In place of torch-fidelity's network: like some of its releases, it is in training mode when it is made."""

    def __init__(self, name, layers, weights):
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(3)

    def forward(self, pixels_BCHW):
        return (self.norm(pixels_BCHW.float()).mean((2, 3)),)


def test_inception_is_not_in_training_mode(tmp_path, monkeypatch):
    stand_in = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    stand_in.FeatureExtractorInceptionV3 = Normalised
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    torch.save({}, tmp_path / "inception.pth")
    extractor, shown = open_extractor(tmp_path / "inception.pth", CPU), pictures(2)
    # Statistics as at the start, mean 0 and variance 1: those of a picture itself would make its means 0.
    means = torch.tensor(np.stack([np.asarray(one).mean((0, 1)) for one in shown])).float()
    for _ in range(2):
        torch.testing.assert_close(extractor.extract(shown), means, rtol=1e-4, atol=0)


@pytest.mark.skipif(not HAS_INCEPTION, reason="needs torch-fidelity and torchvision")
def test_inceptions_features_are_torch_fidelitys_and_nothing_is_unpickled(tmp_path, capfd):
    import io
    import pickle

    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Shouts:
        def __reduce__(self):
            return print, ("code ran",)

    made = FeatureExtractorInceptionV3.__new__(FeatureExtractorInceptionV3)
    with pytest.MonkeyPatch.context() as patch:  # its own start needs a file of weights
        patch.setattr(torch, "load", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        made.__init__("inception-v3-compat", ["2048"], io.BytesIO())
    made.eval()
    torch.save(made.state_dict(), tmp_path / "inception.pth")
    extractor = open_extractor(tmp_path / "inception.pth", CPU)
    shown = pictures(2, sizes=((16, 16), (40, 20)))
    expected = [made(torch.from_numpy(np.array(one)).permute(2, 0, 1)[None])[0] for one in shown]
    for _ in range(2):
        torch.testing.assert_close(extractor.extract(shown), torch.cat(expected))
    (tmp_path / "inception.pth").write_bytes(pickle.dumps(Shouts()))
    with pytest.raises(ValueError, match="not weights that torch can read without running code"):
        open_extractor(tmp_path / "inception.pth", CPU)
    assert "code ran" not in capfd.readouterr().out
