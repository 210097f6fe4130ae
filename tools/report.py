"""Draws one or several runs as one HTML page that loads nothing: what became of them, their curves, their events.

python tools/report.py runs/digits --out report.html
python tools/report.py runs/digits runs/digits_dense --out both.html
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megadit.history.report import write_report
from megadit.history.story import read_story
from megadit.runtime.status import BAD_INPUT


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python tools/report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="folders of runs, going on or ended")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page to write (%(default)s)")
    args = parser.parse_args(argv)
    try:
        write_report(args.out, [read_story(run) for run in args.runs], time.time())
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return BAD_INPUT
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
