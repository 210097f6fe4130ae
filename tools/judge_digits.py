"""Does a run draw the digits it is asked for? A support-vector classifier trained on real scans reads its pictures.

The classifier learns from the training scans and is itself checked on the held-out ones. Prompts come from the
held-out templates; a run that is conditioned on classes is told the digits themselves. Copying would show: each
picture's distance to the nearest training scan is compared with the same distance of the held-out scans, which nobody
can have copied.

    python tools/judge_digits.py runs/digits --samples 500 --out runs/digits/result.json
"""

# ruff: noqa: E402 (the command line comes first)
from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from megadit.runtime.tool import refuse_early, run_tool
from megadit.sampling import options
from megadit.training.drawn import read_asked


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--samples", type=options.positive, default=500, help="pictures to draw (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the noise (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="the JSON to write; default: result.json in the run's folder")
    parser.add_argument("--show", action="store_true", help="print an earlier result instead of judging again")
    return parser.parse_args()


if __name__ == "__main__":  # before the imports below, which take seconds
    args = arguments()
    if not args.show:
        refuse_early("judge_digits", partial(read_asked, args, 1))

import numpy as np
from sklearn.neighbors import NearestNeighbors
from sklearn.svm import SVC
from torch import Tensor
from tqdm import tqdm

from megadit.data.digits import Digits
from megadit.evaluation.results import show, write_json
from megadit.runtime.agreement import of_main
from megadit.runtime.launch import Process
from megadit.sampling.folder import check_writable
from megadit.training.restore import open_sampler

PICTURES_PER_CALL = 125


def to_ink(images_BCHW: Tensor) -> np.ndarray:
    """Images in [-1, 1] -> the scans' own scale, ink from 0 to 16, [B, 64]."""
    return ((images_BCHW.double().cpu().clamp(-1, 1) + 1) * 8).flatten(1).numpy()


def judge(images_BCHW: Tensor, wanted_B: np.ndarray) -> dict[str, object]:
    """Accuracy of the classifier on the pictures and on the held-out scans, and both nearest-neighbour distances."""
    train, heldout = Digits("train"), Digits("heldout")
    scans, pictures, unseen = to_ink(train.images_NCHW), to_ink(images_BCHW), to_ink(heldout.images_NCHW)
    reader = SVC(gamma=0.001, C=10).fit(scans, train.labels_N.numpy())
    read = reader.predict(pictures)
    neighbours = NearestNeighbors(n_neighbors=1).fit(scans)
    own = float(np.median(neighbours.kneighbors(pictures)[0]))
    others = float(np.median(neighbours.kneighbors(unseen)[0]))
    return {
        "read_as_prompted": float((read == wanted_B).mean()),
        "samples": len(wanted_B),
        "per_digit": {str(d): float((read[wanted_B == d] == d).mean()) for d in range(10) if (wanted_B == d).any()},
        "reader_accuracy_on_heldout_scans": float(reader.score(unseen, heldout.labels_N.numpy())),
        "median_distance_to_training_scans": own,
        "median_distance_of_heldout_scans": others,
        "distance_ratio": own / others,
    }


def summary(result: dict[str, object]) -> list[str]:
    """What to print; the last line is the verdict."""
    return [
        f"the reader's own accuracy on held-out scans: {result['reader_accuracy_on_heldout_scans']:.3f}",
        f"median distance to the nearest training scan: {result['median_distance_to_training_scans']:.2f} "
        f"(held-out scans: {result['median_distance_of_heldout_scans']:.2f}; ratio {result['distance_ratio']:.2f})",
        str(result["line"]),
    ]


def run(args: argparse.Namespace, out: Path, process: Process) -> None:
    """Draw, judge, write and print. Collective; raises ValueError on all ranks."""
    of_main(partial(check_writable, out))
    sampler = open_sampler(args.run, process)
    if (kind := sampler.config.data.kind) != "digits":
        raise ValueError(f"{args.run} is a run on data.kind={kind}, and this judge reads digits alone")
    prompts = Digits("heldout", sampler.config.model.conditioning).prompts(args.samples)
    wanted = np.arange(args.samples) % 10  # the digit of each prompt, as `prompts` turns through them
    with tqdm(total=args.samples, desc="pictures", dynamic_ncols=True, disable=not process.is_main) as bar:
        images_NCHW = sampler.draw_all(
            prompts,
            sampler.config.sample,
            args.seed,
            batch=PICTURES_PER_CALL,
            drawn=lambda pictures: bar.update(len(pictures)),
        )

    def judged() -> None:
        result = judge(images_NCHW, wanted) | {"step": sampler.step}
        result["line"] = f"read as prompted: {result['read_as_prompted']:.3f} (n={args.samples})"
        write_json(out, result)
        print("\n".join(summary(result)))

    of_main(judged)


def main() -> int:
    args = arguments()
    out = args.out or args.run / "result.json"
    if args.show:
        return show("judge_digits", out, summary)
    return run_tool("judge_digits", partial(run, args, out))


if __name__ == "__main__":
    sys.exit(main())
