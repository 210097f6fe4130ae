"""Runs' folders, made without training: every tensor of a network filled with random numbers of its own."""

import torch
import yaml

import megadit
from megadit.checkpoint.stream import Outgoing, write_checkpoint
from megadit.conversion.weights import parameters_of
from megadit.runtime.seed import stream
from megadit.training.config import CONFIG_FILE, load_config

CONFIG = "tests/configs/tiny.yaml"
TRAINING = ("weight", "ema", "exp_avg", "exp_avg_sq")


def silent(total):
    """A progress bar that nobody sees."""
    return lambda count: None


def random_tensor(kind, name, shape, dtype, seed=0):
    whole = 0.1 * torch.randn(shape, generator=stream(seed, kind, name), dtype=torch.float64)
    return (whole.square() if kind == "exp_avg_sq" else whole).to(dtype)


def make_run(folder, *overrides, step=3, kinds=TRAINING, dtypes=None, seed=0, file_bytes=1 << 30):
    """A run's folder with one checkpoint. `dtypes`: of kinds that are not float64. Returns its tensors by name."""
    config = load_config(CONFIG, [f"run.dir={folder}", *overrides])
    tensors = {
        f"{kind}.{name}": random_tensor(kind, name, parameter.shape, (dtypes or {}).get(kind, torch.float64), seed)
        for kind in kinds
        for name, parameter in parameters_of(config).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(config.to_yaml())
    (folder / "tokenizer.model").write_bytes(b"tokenizer")
    write_checkpoint(
        folder,
        step,
        [Outgoing(name, tuple(t.shape), t.dtype, lambda t=t: iter([t])) for name, t in tensors.items()],
        {"config": config.to_dict(), "megadit": megadit.__version__},
        lambda count: None,
        file_bytes,
    )
    return tensors


def read_config(folder):
    return yaml.safe_load((folder / CONFIG_FILE).read_text())


def files_in(folder):
    """Every file under a folder, with what is in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype), name
        assert torch.equal(found[name], tensor), name
