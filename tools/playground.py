"""A page on this machine: type a prompt, see its picture and which patches the experts picked.

    python tools/playground.py runs/digits                       # then open http://127.0.0.1:7860/
    python tools/playground.py runs/digits --port 0              # any port that is free; it is printed
    python tools/playground.py pipelines/digits --device cuda    # a folder that save_pretrained wrote

On another machine: forward the port, ssh -L 7860:127.0.0.1:7860 MACHINE, and open the same address here. There is no
password, so whoever reaches --host can draw: it is this machine alone unless you say otherwise.
"""

# ruff: noqa: E402 (the command line comes first)
from __future__ import annotations

import argparse
import sys
import threading
from functools import partial
from pathlib import Path

from megadit.runtime.tool import refuse_early


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a run's folder, or one that ECDiTPipeline.save_pretrained wrote")
    parser.add_argument("--port", type=int, default=7860, help="0: any that is free (default: %(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="the address that is listened at (default: %(default)s)")
    parser.add_argument("--device", help="that draws, such as cuda:1 or cpu; default: a GPU where there is one")
    parser.add_argument("--online", action="store_true", help="download a run's encoders that are not on this machine")
    return parser.parse_args()


def check_exists(folder: Path) -> None:
    """Raises ValueError for a folder that is not there."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder; name a run, or a pipeline that save_pretrained wrote")


if __name__ == "__main__":  # before the imports below, which take seconds
    refuse_early("playground", partial(check_exists, parsed().folder.expanduser()))

import torch

from megadit.pipeline import ECDiTPipeline
from megadit.pipeline.folder import INDEX_FILE
from megadit.playground.page import make_page
from megadit.playground.server import Server
from megadit.playground.studio import Studio
from megadit.runtime.log import setup_logging
from megadit.training.config import CONFIG_FILE


def check_folder(folder: Path, online: bool) -> None:
    """Raises ValueError for a folder that is neither a run nor a pipeline, and for --online with a pipeline."""
    check_exists(folder)
    if not (folder / CONFIG_FILE).is_file() and not (folder / INDEX_FILE).is_file():
        raise ValueError(
            f"{folder} is neither a run (it has no {CONFIG_FILE}) nor a pipeline (it has no {INDEX_FILE}); name a "
            "training's run.dir, or a folder that save_pretrained wrote"
        )
    if online and (folder / INDEX_FILE).is_file():
        raise ValueError(f"--online is for runs: {folder} is a pipeline, which has its encoders in it")


def device_of(name: str | None) -> torch.device:
    """The device of this name. Raises ValueError for one that is not here."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def open_pipeline(folder: Path, device: torch.device, online: bool) -> ECDiTPipeline:
    """Raises ValueError naming what lacks or is damaged."""
    if (folder / INDEX_FILE).is_file():
        pipe = ECDiTPipeline.from_pretrained(folder, device=device)
    else:
        pipe = ECDiTPipeline.from_run(folder, device=device, online=online)
    pipe.set_progress_bar_config(disable=True)  # the page has one
    return pipe


def main() -> int:
    args = parsed()
    setup_logging(0)
    folder = args.folder.expanduser()
    try:
        check_folder(folder, args.online)
        server = Server(args.host, args.port)
        pipe = open_pipeline(folder, device_of(args.device), args.online)
    except ValueError as error:
        print(f"playground: {error}", file=sys.stderr)
        return 2
    studio = Studio(pipe)
    page = make_page(pipe, folder.resolve().name)
    threading.Thread(target=server.serve, args=(studio, page), daemon=True).start()
    print(f"the playground is at {server.url} (Ctrl-C ends it)", flush=True)
    try:
        studio.work()
    except KeyboardInterrupt:
        print("the playground has ended")
    return 0


if __name__ == "__main__":
    sys.exit(main())
