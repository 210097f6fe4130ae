#!/usr/bin/env bash
# Checks everything: style, types, directions of import, shell scripts, tests. Sets up its own environment.
#
#   bash tests/run.sh [pytest arguments]            all checks and the tests
#   bash tests/run.sh --drills [pytest arguments]   only the long tests, those marked `drill`
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

drills=false
if [[ ${1:-} == --drills ]]; then
    drills=true
    shift
fi

# Runs a command under a name; prints the name, and the seconds that it took.
stage() {
    local name=$1 start=$SECONDS
    shift
    echo "== $name"
    "$@"
    echo "== $name: $((SECONDS - start)) s"
}

set_up() {
    # shellcheck source=examples/setup.sh
    REQUIREMENTS=requirements-test.txt source examples/setup.sh
    export OMP_NUM_THREADS=1 # the ranks of a test share the cores
    if [[ $(python -c 'import torch; print(torch.cuda.is_available())') == False ]]; then
        export DS_ACCELERATOR=cpu
    fi
}

# Shell scripts that git knows or would add; without git, those in the tree.
list_shell_scripts() {
    if git rev-parse --is-inside-work-tree >/dev/null 2>&1; then
        git ls-files --cached --others --exclude-standard -- '*.sh' '*.sbatch' .ci/run
    else
        find . \( -name .venv -o -name runs -o -name build \) -prune -o \
            -type f \( -name '*.sh' -o -name '*.sbatch' -o -path ./.ci/run \) -print
    fi
}

check_shell() {
    local scripts=() script
    while IFS= read -r script; do
        [[ -f $script ]] || continue # deleted, but not yet from git's index
        bash -n "$script"
        scripts+=("$script")
    done < <(list_shell_scripts)
    shellcheck --external-sources "${scripts[@]}"
}

run_drills() {
    local status=0
    python -m pytest -m drill --timeout 1800 "$@" || status=$?
    if [[ $status == 5 ]]; then # pytest's "no tests collected"
        echo "no drills among these"
        status=0
    fi
    return "$status"
}

stage set-up set_up
if $drills; then
    stage drills run_drills "$@"
else
    stage ruff ruff check .
    stage mypy mypy
    stage imports lint-imports --no-logo
    stage shell check_shell
    stage pytest python -m pytest "$@"
fi
