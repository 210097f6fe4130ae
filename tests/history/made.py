"""Folders of runs as a training writes them, without one."""

import json
import math
import random

import yaml

BEGAN = 1_790_000_000.0  # when, in seconds since 1970
LAYERS, EXPERTS = (1, 3), 4


def line(step, loss, chance=None, load=False, **more):
    """A line of metrics.jsonl."""
    noise = chance.gauss(0, 0.05) if chance else 0.0
    stats = {"picks": 2.0 + noise, "unpicked": 0.05, "busiest": 3.0, "entropy": 0.8 - 0.001 * step % 0.4}
    routing = {
        str(layer): {key: value + layer / 100 for key, value in stats.items()}
        | ({"load": [0.1 * layer, 1.0, 1.2, 2.7 - 0.1 * layer]} if load else {})
        for layer in LAYERS
    }
    measured = {"seconds": 0.5, "images_per_second": 32.0, "tflops_per_gpu": 0.25, "peak_memory_gb": 1.5}
    return {"step": step, "loss": loss, "grad_norm": 2 * loss, "lr": 1e-3, "routing": routing, **measured, **more}


def curve(steps, seed=0, **more):
    """Lines that fall as losses do, with noise and a held-out loss every ten steps."""
    chance = random.Random(seed)
    lines = []
    for step in range(1, steps + 1):
        loss = (0.4 + 1.5 / (1 + step / 20)) * math.exp(chance.gauss(0, 0.06))
        lines.append(line(step, loss, chance, **more))
        if step % 10 == 0:
            lines[-1]["heldout_loss"] = 0.42 + 1.5 / (1 + step / 20)
    return lines


def event(after, kind, step, reason="", **more):
    """A line of events.jsonl, `after` seconds from the beginning."""
    return {"time": BEGAN + after, "event": kind, "step": step, "reason": reason, **more}


EVERY_EVENT = [
    event(0, "start", 0, "a new run", world_size=4, hosts=["a"], layout={"tp": 2, "pp": 1, "ep": 2, "edp": 1}),
    event(10, "save", 20, "", saved=True, seconds=0.4),
    event(20, "save", 40, "", saved=True, seconds=0.4),
    event(25, "skip", 48, "loss nan, gradient norm nan: rank 1", ranks=[{"rank": 1, "sample_ids": [7, 9]}]),
    event(30, "save", 60, "No space left on device", saved=False, seconds=0.1),
    event(34, "spike", 67, "loss 3.1 is far from 0.9"),
    event(35, "rewind", 67, "to the checkpoint of step 40", to_step=40, batches=[41, 67]),
    event(60, "flip", 70, "replicas of blocks.1 differ", parameters=["blocks.1"], ranks=[3]),
    event(61, "lost", 70, "rank 3 is silent for 60 s", ranks=[3], collective="all_reduce"),
    event(62, "stop", 70, "rank 3 was lost", status=76),
    event(162, "layout", 40, "tensor 2 x pipeline 1 x expert 2 does not fit 2 processes"),
    event(163, "resume", 40, "from the checkpoint of step 40", world_size=2, hosts=["b"]),
    event(180, "save", 60, "", saved=True, seconds=0.4),
    event(190, "save", 80, "", saved=True, seconds=0.4),
    event(191, "signal", 81, "SIGTERM"),
    event(192, "save", 82, "", saved=True, seconds=0.4),
    event(193, "stop", 82, "asked by SIGTERM", status=75),
    event(293, "resume", 82, "from the checkpoint of step 82", world_size=2, hosts=["b"]),
    event(299, "eclipse", 90, "an event of another version", of="the moon"),
    event(310, "save", 100, "", saved=True, seconds=0.4),
    event(311, "finish", 100, "the last step is done and saved", status=0),
]


def folder(path, lines=(), events=None, config=None):
    """A run's folder. `events` and `config` are left out where they are None; config: {section: {key: value}}."""
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if events is not None:
        (path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if config is not None:
        (path / "config.yaml").write_text(yaml.safe_dump(config))
    return path


def settings(name, steps, **sections):
    """A configuration with what reports look at."""
    return {"run": {"name": name, "steps": steps}, "log": {"every": 10}, **sections}
