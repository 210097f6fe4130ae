#!/usr/bin/env bash
# Does expert choice beat a dense network and token choice at equal compute? Trains all three with three seeds on scenes
# of shapes, judges their pictures, and writes a report with intervals.
#
#   bash examples/reproduce/run.sh [STUDY.yaml] [options of tools/reproduce.py run]
#
# STUDY.yaml: examples/reproduce/cpu.yaml by default; ablations.yaml and gpu.yaml are beside it. Stopped or killed, the
# same command goes on; finished trials are not repeated. Trials run side by side, one for each GPU or CPU core. What it
# writes is in runs/reproduce/NAME: report.md with its figures, records/, and a folder for each trial.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

study=examples/reproduce/cpu.yaml
if [[ ${1:-} == *.yaml ]]; then
    study=$1
    shift
fi
out=runs/reproduce/$(basename "$study" .yaml)

# shellcheck source=examples/setup.sh
REQUIREMENTS=requirements.txt source examples/setup.sh

python tools/reproduce.py run "$study" --out "$out" "$@" >&2
cp examples/reproduce/report.md "$out/report.md"
python tools/reproduce.py report "$out/report.md"
