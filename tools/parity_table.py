"""Train the same few steps in several layouts and print how far each is from one process.

Each layout is a real torchrun of the same configuration; what is compared are the losses and gradient norms in
metrics.jsonl. float64 runs use zero.stage=0, float32 runs ZeRO; all are compared with one float64 process.

    python tools/parity_table.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from functools import partial
from itertools import product
from pathlib import Path

from tqdm import tqdm

from megadit.runtime.tool import refuse_early
from megadit.training.config import load_config
from megadit.training.metrics import METRICS_FILE, read_metrics

TENSOR, PIPELINE, EXPERT = "parallel.tensor=2", "parallel.pipeline=2", "parallel.expert=2"
SEQUENCE, INTERLEAVED, ZBV = "parallel.sequence=true", "parallel.schedule=interleaved", "parallel.schedule=zbv"
LAYOUTS: dict[str, tuple[int, list[str]]] = {  # processes, overrides
    "one process": (1, []),
    "data 2": (2, []),
    "tensor 2": (2, [TENSOR]),
    "pipeline 2": (2, [PIPELINE]),
    "expert 2": (2, [EXPERT]),
    "tensor 2, sequence": (2, [TENSOR, SEQUENCE]),
    "tensor 2 x expert 2": (4, [TENSOR, EXPERT]),
    "pipeline 2 x expert 2": (4, [PIPELINE, EXPERT]),
    "pipeline 2 x expert 2, interleaved": (4, [PIPELINE, EXPERT, INTERLEAVED]),
    "pipeline 2 x expert 2, zbv": (4, [PIPELINE, EXPERT, ZBV]),
    "tensor 2 x pipeline 2, sequence": (4, [TENSOR, PIPELINE, SEQUENCE]),
    "tensor 2 x pipeline 2, sequence, zbv": (4, [TENSOR, PIPELINE, SEQUENCE, ZBV]),
}
PRECISIONS = {
    "float64": ["run.dtype=float64", "zero.stage=0"],
    "float32, ZeRO-1": ["run.dtype=float32", "zero.stage=1"],
    "float32, ZeRO-2": ["run.dtype=float32", "zero.stage=2"],
}


def is_offered(layout: str, precision: str) -> bool:
    """Whether the two go together."""
    return not ("zbv" in layout and "ZeRO-2" in precision)


def losses_and_norms(layout: str, precision: str, config: str, steps: int) -> list[float]:
    """Every step's loss, then every step's gradient norm, of one training."""
    processes, overrides = LAYOUTS[layout]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)),
            *("-m", "megadit.train", "--config", config, f"run.dir={folder}/run", f"run.steps={steps}"),
            *overrides,
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
    refuse_early("parity_table", partial(load_config, args.config))
    cases = [case for case in product(LAYOUTS, PRECISIONS) if is_offered(*case)]
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
    for layout, (processes, _) in LAYOUTS.items():
        cells = []
        for precision in PRECISIONS:
            if is_offered(layout, precision):
                pairs = zip(found[layout, precision], oracle, strict=True)
                cells.append(f"{max(abs(value / exact - 1) for value, exact in pairs):.1e}")
            else:
                cells.append("not offered")
        print(f"| {layout} | {processes} | " + " | ".join(cells) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
