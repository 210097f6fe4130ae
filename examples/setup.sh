# shellcheck shell=bash
# Sourced from the repository root by tests/run.sh and the scripts in examples/: makes an environment ready.
#
# Uses the active virtual environment, else .venv in the repository root. Installs what REQUIREMENTS names, and
# megadit itself in place, only when the requirement files, setup.py or the repository's location have changed since
# the last time. Everything is printed to stderr.
#
#   REQUIREMENTS   the requirements file to install (needed)
#   PYTHON         the interpreter that .venv is made with (default python3; 3.11 or newer)

: "${REQUIREMENTS:?name the requirements file before sourcing examples/setup.sh}"

if [[ -z ${VIRTUAL_ENV:-} ]]; then
    [[ -x .venv/bin/python ]] || "${PYTHON:-python3}" -m venv .venv >&2
    export VIRTUAL_ENV=$PWD/.venv
fi
export PATH=$VIRTUAL_ENV/bin:$PATH
hash -r

stamp_file=$VIRTUAL_ENV/.megadit-$REQUIREMENTS.stamp
stamp="$(cat requirements*.txt setup.py | cksum) $PWD"
if [[ ! -f $stamp_file || $(<"$stamp_file") != "$stamp" ]]; then
    echo "installing $REQUIREMENTS into $VIRTUAL_ENV" >&2
    python -m pip install --quiet --requirement "$REQUIREMENTS" >&2
    # torch has just brought a setuptools that can build; an isolated build would download another one.
    python -m pip install --quiet --no-deps --no-build-isolation --editable . >&2
    echo "$stamp" >"$stamp_file"
fi
unset stamp stamp_file
