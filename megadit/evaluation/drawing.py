"""Benchmarks' prompts to folders of pictures, by all ranks; the same command goes on where an earlier one ended.

Beside the folder DIR, DIR.json says what its pictures depend on: a folder never holds those of two settings. Ranks
write into one folder, so all machines must see it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from megadit.evaluation import dpg, geneval
from megadit.evaluation.images import open_rgb, sheet
from megadit.evaluation.painter import Painter
from megadit.evaluation.results import beside, read_text, versions, write_json
from megadit.runtime.agreement import of_main, together
from megadit.runtime.disk import replace_file
from megadit.sampling.folder import check_writable, writing
from megadit.sampling.picture import write_png


def save_png(picture: Image.Image, path: Path) -> None:
    """Write a picture, whole whenever it is there; its folder is made."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(picture, path)


def settings_path(out: Path) -> Path:
    """Where it is said what a folder's pictures depend on.

    >>> str(settings_path(Path("drawn/geneval")))
    'drawn/geneval.json'
    """
    return beside(out, "json")


def check_out(out: Path) -> None:
    """Raises ValueError unless a folder of pictures, and what is said of it, could be written there."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    for path in (out, settings_path(out)):
        check_writable(path)


def begin(out: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder and say what it will hold, or go on in it.

    Raises ValueError for pictures of other settings, or of settings that are not known, and as `check_out`.
    """
    check_out(out)
    path = settings_path(out)
    again = "choose another --out, or remove the folder"
    with writing(out):
        holds = out.exists() and any(out.iterdir())
    if path.exists():
        try:
            before = json.loads(read_text(path))["settings"]
            differing = [key for key in {**before, **settings} if before.get(key) != settings.get(key)]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} does not say what {out} holds ({error}); {again}") from error
        if differing and out.exists():
            key = differing[0]
            raise ValueError(
                f"{out} holds pictures of other settings: {key} was {before.get(key)!r} and is {settings.get(key)!r} "
                f"now; {again}"
            )
    elif holds:
        raise ValueError(f"{out} is not empty, and there is no {path} that says what it holds; {again}")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    write_json(path, {"settings": dict(settings), "versions": versions()})


def draw_prompts(
    painter: Painter,
    texts: Sequence[str],
    samples: int,
    complete: Callable[[int], bool],
    write: Callable[[int, int, Image.Image], None],
    finish: Callable[[int], None],
) -> int:
    """Draw `samples` pictures of each text; how many texts were not complete before. Collective.

    complete: whether a text's pictures are all there already. write: of a text's number, a sample's number and its
    picture. finish: called once for each text, on one rank, when all of its pictures are written.
    """
    done = set(of_main(lambda: [i for i in range(len(texts)) if complete(i)]))
    there = {i * samples + k for i in done for k in range(samples)}
    left, world, finished, end = len(texts) - len(done), painter.sampler.grid["world"], 0, 0

    def drawn(pictures: range) -> None:
        nonlocal end
        end = pictures.stop

    repeated = [text for text in texts for _ in range(samples)]
    with tqdm(total=left, desc="prompts", unit="prompt", dynamic_ncols=True, disable=world.rank > 0) as bar:
        for indices, pictures in painter.turns(repeated, there, drawn):
            with together():  # a disk may be full on one rank
                for index, picture in zip(indices, pictures, strict=True):
                    if index not in there:
                        write(index // samples, index % samples, picture)
            ready = [i for i in range(finished, end // samples) if i not in done]
            with together():
                for i in ready:
                    if i % world.size == world.rank:
                        finish(i)
            finished = end // samples
            bar.update(len(ready))
    return left


def draw_geneval(painter: Painter, prompt_file: Path, out: Path, samples: int = geneval.SAMPLES) -> dict[str, Any]:
    """Draw GenEval's folder; what was done, for JSON. Collective.

    Raises ValueError for a file that holds no such prompts, a run that does not read text, and a folder of other
    settings.
    """
    prompts = of_main(lambda: geneval.read_prompts(prompt_file))
    painter.check_reads_text("GenEval")
    settings = _settings("geneval", painter, [prompt.line for prompt in prompts], samples)
    of_main(lambda: begin(out, settings))

    def complete(i: int) -> bool:
        path = geneval.prompt_folder(out, i) / geneval.METADATA_FILE  # written last
        whole = path.exists() and path.read_text(encoding="utf-8").strip() == prompts[i].line
        return whole and all(geneval.sample_path(out, i, k).exists() for k in range(samples))

    def finish(i: int) -> None:
        folder = geneval.prompt_folder(out, i)
        pictures = [open_rgb(geneval.sample_path(out, i, k)) for k in range(samples)]
        save_png(sheet(pictures, columns=2 if samples > 1 else 1), folder / geneval.GRID_FILE)
        with writing(folder):
            replace_file(folder / geneval.METADATA_FILE, f"{prompts[i].line}\n".encode())

    texts = [prompt.text for prompt in prompts]
    left = draw_prompts(
        painter, texts, samples, complete, lambda i, k, one: save_png(one, geneval.sample_path(out, i, k)), finish
    )
    told = geneval.tally(prompts)
    return _result(settings, len(prompts), left, f"{out}: {told}, {samples} pictures each")


def draw_dpg(painter: Painter, prompt_folder: Path, out: Path) -> dict[str, Any]:
    """Draw DPG-Bench's folder of grids; what was done, for JSON. Collective. Raises ValueError as `draw_geneval`."""
    prompts = of_main(lambda: dpg.read_prompts(prompt_folder))
    painter.check_reads_text("DPG-Bench")
    names, texts = list(prompts), list(prompts.values())
    settings = _settings("dpg", painter, [f"{name} {text}" for name, text in prompts.items()], dpg.SAMPLES)
    of_main(lambda: begin(out, settings))
    parts = beside(out, "parts")  # the scorer reads every file of the folder itself

    def part(i: int, k: int) -> Path:
        return parts / f"{names[i]}_{k}.png"

    def finish(i: int) -> None:
        own = [part(i, k) for k in range(dpg.SAMPLES)]
        save_png(sheet([open_rgb(path) for path in own], dpg.COLUMNS), dpg.grid_path(out, names[i]))
        for path in own:
            path.unlink(missing_ok=True)

    left = draw_prompts(
        painter,
        texts,
        dpg.SAMPLES,
        lambda i: dpg.grid_path(out, names[i]).exists(),
        lambda i, k, one: save_png(one, part(i, k)),
        finish,
    )
    of_main(lambda: shutil.rmtree(parts, ignore_errors=True))
    height, width = painter.identity()["size"]
    sides = f"2 x 2 pictures of {height} x {width} pixels"
    return _result(settings, len(prompts), left, f"{out}: {len(prompts)} grids of {sides}; the published set has 1065")


def _settings(benchmark: str, painter: Painter, lines: Sequence[str], samples: int) -> dict[str, Any]:
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
    return {"benchmark": benchmark, **painter.identity(), "samples": samples, "prompts_sha256": digest}


def _result(settings: Mapping[str, Any], prompts: int, left: int, line: str) -> dict[str, Any]:
    counts = {"prompts": prompts, "images": prompts * settings["samples"], "drawn_now": left * settings["samples"]}
    return {"settings": dict(settings), **counts, "versions": versions(), "line": line}
