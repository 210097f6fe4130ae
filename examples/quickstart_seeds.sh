#!/usr/bin/env bash
# Measures how much the quickstart's result varies: trains and judges it with seeds 0 to 4, on one process and on four,
# and its dense twin with seeds 0 to 2. Prints the table of the README.
#
#   bash examples/quickstart_seeds.sh [--groups experts_4 experts_1 dense_4] [--seeds 0 1 ...] [--table]
#
# Takes about an hour on two CPU cores. What has a record in docs/results/quickstart is not run again: remove a record to
# repeat its run. Stopped or killed, the same command goes on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck source=examples/setup.sh
REQUIREMENTS=requirements.txt source examples/setup.sh
python tools/quickstart_seeds.py "$@"
