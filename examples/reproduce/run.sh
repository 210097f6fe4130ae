#!/usr/bin/env bash
# Does expert choice beat a dense network and token choice at equal compute? Trains all three with three seeds on scenes
# of shapes, judges their pictures, and writes a report with intervals.
#
#   bash examples/reproduce/run.sh [STUDY.yaml] [--out FOLDER] [--workers N]
#
# STUDY.yaml: examples/reproduce/cpu.yaml by default; ablations.yaml and gpu.yaml are beside it. Stopped or killed, the
# same command goes on; finished trials are not repeated. Trials run side by side, one for each GPU or CPU core. What it
# writes is in FOLDER, by default runs/reproduce/NAME: report.md with its figures, records/, and a folder for each trial.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

study=examples/reproduce/cpu.yaml
if [[ ${1:-} == *.yaml ]]; then
    study=$1
    shift
fi

# shellcheck source=examples/setup.sh
REQUIREMENTS=requirements.txt source examples/setup.sh

records=$(python tools/reproduce.py run "$study" "$@") # its progress goes to stderr
cp examples/reproduce/report.md "${records%/records}/report.md"
python tools/reproduce.py report "${records%/records}/report.md"
