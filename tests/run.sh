#!/usr/bin/env bash
# Runs the checks and the tests, in three tiers. Sets up its own environment. `bash tests/run.sh --help` explains.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
    cat <<'EOF'
usage: bash tests/run.sh [--all | --drills | --rest K] [pytest arguments]

  bash tests/run.sh             lint, types, import directions, shell scripts, and the quick tests: before each commit
  bash tests/run.sh --all       the same checks, and all tests but the drills
  bash tests/run.sh --drills    only the drills
  bash tests/run.sh --rest K    only a tenth of the slow tests and drills, K from 1 to 10: what continuous integration
                                adds to the quick tests. With MEGADIT_CI_MINUTES=M it starts no test that would
                                not end within M minutes, and lists what it left out

What follows goes to pytest: `bash tests/run.sh tests/zero -k footprint`, `bash tests/run.sh -n 0 -x`.

A test belongs to one of three tiers:
  quick    no marker. Every module, every mechanism once, every error path, one parity case for each mechanism and each
           pair of them that interacts. A second, so that the tier stays at minutes; no test takes 10.
  slow     @pytest.mark.slow. Further combinations of what a quick test shows once; real launchers, daemons, browsers
           and whole documentation pages. Seconds to a minute.
  drill    @pytest.mark.drill. Minutes: whole sweeps, trainings that are killed again and again, the tests of the tests.
When in doubt: a test that alone notices some fault is quick if it can be made fast, and slow if it cannot.
EOF
}

tier=quick
case ${1:-} in
    --help | -h) usage && exit ;;
    --all | --drills) tier=${1#--} && shift ;;
    --rest) tier=rest && share=${2:?--rest needs a number from 1 to 10} && shift 2 ;;
esac

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
    unset PYTHONDONTWRITEBYTECODE # each interpreter that a test starts would compile the package again
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

check() {
    stage ruff ruff check .
    stage mypy mypy
    stage imports lint-imports --no-logo
    stage shell check_shell
}

# Two processes run the tests, file by file: many tests wait for most of their time.
run_tests() {
    local status=0
    python -m pytest --numprocesses 2 --dist loadfile --durations 15 "$@" || status=$?
    if [[ $status == 5 ]]; then # pytest's "no tests collected"
        echo "no tests of this tier among these"
        status=0
    fi
    return "$status"
}

run_rest() {
    if [[ -n ${MEGADIT_CI_MINUTES:-} ]]; then
        MEGADIT_TEST_DEADLINE=$(($(date +%s) + 60 * MEGADIT_CI_MINUTES))
        export MEGADIT_TEST_DEADLINE
    fi
    # durations.json: what the tenths are balanced by. `--store-durations` writes it. A tenth may lie within one file, so
    # tests are handed out one by one.
    run_tests -m "slow or drill" --dist load --timeout 1800 --durations-path tests/durations.json \
        --splits 10 --group "$share" "$@"
}

stage set-up set_up
case $tier in
    quick)
        check # not `check &&`, which would let its first stages fail unnoticed
        stage pytest run_tests "$@"
        ;;
    all)
        check
        stage pytest run_tests -m "not drill" "$@"
        ;;
    drills) stage drills run_tests -m drill --timeout 1800 "$@" ;;
    rest) stage "rest, share $share of 10" run_rest "$@" ;;
esac
