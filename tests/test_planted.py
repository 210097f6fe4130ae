"""Planted faults: each patch in tests/planted makes one small mistake, which the quick tests must notice.

A patch's first line describes the fault. The drill applies each to a copy of the tree and runs the quick tests there
until the first failure, those nearest to the patched file first:

    python -m pytest -m drill tests/test_planted.py -k parallel-row-bias
"""

import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]
PATCHES = sorted((ROOT / "tests" / "planted").glob("*.patch"))
PACKAGES = (
    *("parallel", "model", "zero", "checkpoint", "training"),
    *("diffusion", "sampling", "data", "conversion", "planning"),
)
# In a patched copy the patches no longer apply.
LEFT_OUT = ("tests/planted/", "tests/test_planted.py")


class Killer(NamedTuple):
    test: str
    seconds: float


def patched_file(patch: Path) -> str:
    """The file that a patch changes, relative to the root."""
    (header,) = [line for line in patch.read_text().splitlines() if line.startswith("+++ b/")]
    return header.removeprefix("+++ b/")


def apply(patch: Path, tree: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """`git apply` in a folder, which need not be a repository, and does not look for one above."""
    env = os.environ | {"GIT_CEILING_DIRECTORIES": str(tree.parent)}
    return subprocess.run(["git", "apply", *options, patch], cwd=tree, env=env, capture_output=True, text=True)


def test_every_patch_applies_in_one_hunk_and_says_what_it_breaks():
    for patch in PATCHES:
        description, *lines = patch.read_text().splitlines()
        assert description.endswith(".") and 20 <= len(description) <= 120, patch
        assert sum(line.startswith("@@ ") for line in lines) == 1, patch
        assert patch.stem.split("-")[0] == patched_file(patch).split("/")[1], f"{patch} is named by another package"
        assert not (failure := apply(patch, ROOT, "--check").stderr), failure


def test_every_package_has_its_share_of_faults():
    counts = Counter(patch.stem.split("-")[0] for patch in PATCHES)
    assert len(PATCHES) >= 60
    assert all(counts[package] >= 5 for package in PACKAGES), counts


def tracked_files() -> list[str]:
    """The files that git knows or would add; without a repository, all but what tools leave behind."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
        return [name for name in listed if name and (ROOT / name).is_file()]
    made = {".venv", "runs", "build", "__pycache__"}
    paths = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    return [str(path) for path in paths if not made & set(path.parts)]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The tree without the patches, in a folder that is no repository."""
    tree = tmp_path / "tree"
    for name in tracked_files():
        if not name.startswith(LEFT_OUT):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    return tree


def stages(file: str, tree: Path) -> Iterator[list[str]]:
    """Arguments for pytest that together run everything, the tests nearest to the file first."""
    package, stem = file.split("/")[1], Path(file).stem
    tests, done = f"tests/{package}", list[str]()
    nearest = sorted(str(path.relative_to(tree)) for path in (tree / tests).rglob(f"test_{stem}*.py"))
    following = [[tests], [file], [path for path in ("tests/parity", "tests/training") if path != tests], []]
    for paths in [nearest, *following] if nearest else following:
        yield [*paths, *(f"--ignore={path}" for path in done)]
        done += paths


def run_pytest(tree: Path, arguments: list[str], report: Path) -> list[Killer]:
    """Run the quick tests of `tree` until the first failure: the test that failed, if one did."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += ["-o", "junit_family=xunit1", f"--junitxml={report}", *arguments]
    env = os.environ | {"PYTHONPATH": str(tree)}
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    assert done.returncode in (0, 1, 5), done.stdout + done.stderr  # 5: no test is selected
    cases = ElementTree.parse(report).iter("testcase")
    failed = [case for case in cases if {"failure", "error"} & {child.tag for child in case}]
    assert (done.returncode == 1) == bool(failed), done.stdout + done.stderr
    return [Killer(f"{case.get('file')}::{case.get('name')}", float(case.get("time", 0))) for case in failed[:1]]


def find_killer(file: str, tree: Path, report: Path) -> Killer | None:
    for arguments in stages(file, tree):
        if failed := run_pytest(tree, arguments, report):
            return failed[0]
    return None


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """What became of each fault, which is printed at the end."""
    found: dict[str, str] = {}
    yield found
    survivors = [name for name, line in found.items() if line.startswith("SURVIVED")]
    lines = [f"{name}: {line}" for name, line in found.items()]
    lines.append(f"{len(found) - len(survivors)} of {len(found)} faults killed; survivors: {survivors}")
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        request.config.get_terminal_writer().write("\n" + "\n".join(lines) + "\n")


@pytest.mark.drill
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_the_quick_tests_kill_a_fault(patch, copy, tmp_path, results):
    where = [sys.executable, "-c", "import megadit; print(megadit.__file__)"]
    env = os.environ | {"PYTHONPATH": str(copy)}
    tested = subprocess.run(where, cwd=tmp_path, env=env, check=True, capture_output=True, text=True).stdout.strip()
    assert Path(tested) == copy / "megadit" / "__init__.py", "another tree is tested"
    assert not (failure := apply(patch, copy).stderr), failure
    begin = time.monotonic()
    killer = find_killer(patched_file(patch), copy, tmp_path / "report.xml")
    fate = "SURVIVED" if killer is None else f"killed by {killer.test} ({killer.seconds:.1f} s)"
    results[patch.stem] = f"{fate}, {time.monotonic() - begin:.0f} s in all"
    assert killer is not None, patch.read_text()
    assert not apply(patch, copy, "--reverse").stderr
    assert not run_pytest(copy, [killer.test], tmp_path / "report.xml"), f"{killer.test} fails without the fault too"
