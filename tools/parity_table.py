"""Train the same few steps in several layouts and print how far each is from one process.

Each layout is a real torchrun of the same configuration; what is compared are the losses and gradient norms in
metrics.jsonl. float64 runs use zero.stage=0 and float32 runs ZeRO-1; both are compared with one float64 process.

    python tools/parity_table.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from megadit.training.metrics import METRICS_FILE, read_metrics

LAYOUTS = {  # tensor, pipeline, expert, processes
    "one process": (1, 1, 1, 1),
    "data 2": (1, 1, 1, 2),
    "tensor 2": (2, 1, 1, 2),
    "pipeline 2": (1, 2, 1, 2),
    "expert 2": (1, 1, 2, 2),
    "tensor 2, sequence": (2, 1, 1, 2),
    "tensor 2 x expert 2": (2, 1, 2, 4),
    "pipeline 2 x expert 2": (1, 2, 2, 4),
    "tensor 2 x pipeline 2": (2, 2, 1, 4),
    "tensor 2 x pipeline 2, sequence": (2, 2, 1, 4),
}
PRECISIONS = {
    "float64": ["run.dtype=float64", "zero.stage=0"],
    "float32, ZeRO-1": ["run.dtype=float32", "zero.stage=1"],
}


def losses_and_norms(layout: str, precision: str, config: str, steps: int) -> list[float]:
    """Every step's loss, then every step's gradient norm, of one training."""
    tensor, pipeline, expert, processes = LAYOUTS[layout]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)),
            *("-m", "megadit.train", "--config", config, f"run.dir={folder}/run", f"run.steps={steps}"),
            *(f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}", f"parallel.expert={expert}"),
            f"parallel.sequence={'sequence' in layout}".lower(),
            *PRECISIONS[precision],
        ]
        subprocess.run(command, check=True, capture_output=True, text=True)
        lines = read_metrics(Path(folder) / "run" / METRICS_FILE)
    return [line["loss"] for line in lines] + [line["grad_norm"] for line in lines]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="tests/configs/tiny.yaml", help="what to train (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps (default: %(default)s)")
    args = parser.parse_args()
    cases = [(layout, precision) for layout in LAYOUTS for precision in PRECISIONS]
    found: dict[tuple[str, str], list[float]] = {}
    for case in tqdm(cases, unit="training", dynamic_ncols=True):
        try:
            found[case] = losses_and_norms(*case, args.config, args.steps)
        except subprocess.CalledProcessError as error:
            print(f"parity_table: {case[0]} in {case[1]} failed:\n{error.stderr[-2000:]}", file=sys.stderr)
            return 1
    oracle = found["one process", "float64"]
    print("| layout | processes | " + " | ".join(PRECISIONS) + " |")
    print("|---" * (2 + len(PRECISIONS)) + "|")
    for layout, (*_, processes) in LAYOUTS.items():
        errors = [
            max(abs(value / exact - 1) for value, exact in zip(found[layout, precision], oracle, strict=True))
            for precision in PRECISIONS
        ]
        print(f"| {layout} | {processes} | " + " | ".join(f"{error:.1e}" for error in errors) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
