"""GPUs by name and from files: what is read is what was written, and what is wrong is named."""

import dataclasses

import pytest
import yaml

from megadit.planning.hardware import GPUS, Efficiency, Gpu, load_gpu


def written(tmp_path, change=None, text=None):
    """The path of a file that describes a GPU: the H100's with some keys changed, or any text."""
    path = tmp_path / "mine.yaml"
    plain = yaml.safe_load(GPUS["h100"].to_yaml()) | (change or {})
    path.write_text(text if text is not None else yaml.safe_dump(plain))
    return path


@pytest.mark.parametrize("name", ["a100", "h100", "h200", "b200"])
def test_a_known_gpu_comes_back_from_its_own_file(name, tmp_path):
    path = tmp_path / "copy.yml"
    path.write_text(load_gpu(name).to_yaml())
    assert load_gpu(str(path)) == load_gpu(name) == GPUS[name]
    assert load_gpu(name).name == name


def test_newer_gpus_are_faster():
    for older, newer in (("a100", "h100"), ("h100", "b200")):
        for key in ("matrix_rate", "memory_bandwidth", "link_bandwidth", "network_bandwidth"):
            before, after = getattr(GPUS[older], key), getattr(GPUS[newer], key)
            if key == "matrix_rate":
                before, after = before["bfloat16"], after["bfloat16"]
            assert before <= after, (older, newer, key)
    # The same processor with more memory.
    assert (
        dataclasses.replace(
            GPUS["h200"],
            name="h100",
            memory_bytes=GPUS["h100"].memory_bytes,
            memory_bandwidth=GPUS["h100"].memory_bandwidth,
        )
        == (GPUS["h100"])
    )


def test_an_unknown_gpu_is_told_the_nearest():
    with pytest.raises(ValueError, match=r"unknown GPU h10; the nearest is h100"):
        load_gpu("h10")


def test_what_a_file_leaves_out_has_its_default(tmp_path):
    plain = yaml.safe_load(GPUS["a100"].to_yaml())
    for key in ("gpus_per_node", "cores"):
        del plain[key]
    plain["efficiency"] = {"matrix": "5e-1"}  # YAML takes a number without a point for a string
    gpu = load_gpu(str(written(tmp_path, text=yaml.safe_dump(plain))))
    assert gpu == dataclasses.replace(GPUS["a100"], efficiency=Efficiency(matrix=0.5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory": 1}, "unknown key memory; the nearest is memory_bytes"),
        ({"efficiency": {"matrices": 0.5}}, "unknown key efficiency.matrices; the nearest is efficiency.matrix"),
        ({"matrix_rate": {"bfloat": 1e12}}, "unknown key matrix_rate.bfloat; the nearest is matrix_rate.bfloat16"),
        ({"memory_bandwidth": "fast"}, "memory_bandwidth='fast': input should be a valid number"),
        ({"link_bandwidth": 0.0}, "link_bandwidth=0.0 must be more than 0"),
        ({"network_bandwidth": float("nan")}, "network_bandwidth=nan must be more than 0"),
        ({"matrix_rate": {"float32": float("inf")}}, "matrix_rate.float32=inf must be more than 0"),
        ({"efficiency": {"link": 1.5}}, "efficiency.link=1.5 must be more than 0 and at most 1"),
        ({"efficiency": {"matrix": 0.0}}, "efficiency.matrix=0.0 must be more than 0 and at most 1"),
        ({"efficiency": {"launch_seconds": -1.0}}, "efficiency.launch_seconds=-1.0 must be 0 or more"),
        ({"cores": -1}, "cores=-1 must be 0 or more"),
    ],
)
def test_a_wrong_key_is_named_with_its_file(change, message, tmp_path):
    path = written(tmp_path, change)
    with pytest.raises(ValueError) as caught:
        load_gpu(str(path))
    assert str(caught.value).startswith(f"GPU {path}: {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "expected keys (name, memory_bytes"),
        ("", "expected keys (name, memory_bytes"),
        ("name: [", "not valid YAML"),
        ("name: mine", "memory_bytes: field required"),
    ],
)
def test_a_file_that_describes_no_gpu_is_refused(text, message, tmp_path):
    path = written(tmp_path, text=text)
    with pytest.raises(ValueError) as caught:
        load_gpu(str(path))
    assert str(caught.value).startswith(f"GPU {path}: {message}")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere.yaml: No such file or directory"):
        load_gpu(str(tmp_path / "nowhere.yaml"))


def test_a_rate_that_nobody_gave_is_refused():
    gpu = dataclasses.replace(GPUS["h100"], matrix_rate={"float32": 1e12})
    assert gpu.rate("float32") == 1e12
    with pytest.raises(ValueError, match="GPU h100 has no matrix_rate for bfloat16, only for float32"):
        gpu.rate("bfloat16")


def test_ranks_share_cores_but_not_gpus():
    cpu = dataclasses.replace(GPUS["h100"], name="cpu", cores=4)
    assert [cpu.slowdown(ranks) for ranks in (1, 4, 6, 16)] == [1.0, 1.0, 1.5, 4.0]
    assert GPUS["h100"].slowdown(8) == 1.0
    assert isinstance(cpu, Gpu)
