"""Installs megadit: `pip install -e .`; the pins of requirements.txt are its dependencies."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_requirements(name: str) -> list[str]:
    """The requirement lines of a file beside this one, without comments and without `-r` lines."""
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("-")]


VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "megadit/__init__.py").read_text(encoding="utf-8"))
# What a training does not need: pictures of loss curves; frozen encoders, which data is encoded with; what judges
# pictures.
OPTIONAL = {
    "plots": ["matplotlib"],
    "encoders": ["diffusers", "pyarrow", "transformers"],
    "evaluation": ["matplotlib", "torchmetrics", "transformers"],
}
pins = {line.split("==")[0]: line for line in read_requirements("requirements.txt")}

setup(
    name="megadit",
    version=VERSION[1],
    description="Trains and samples EC-DiT, a text-to-image diffusion transformer with expert-choice routing",
    license="Apache-2.0",
    packages=find_packages(include=["megadit", "megadit.*"]),
    package_data={"megadit": ["py.typed"], "megadit.playground": ["page.js"]},
    python_requires=">=3.11",  # what the pinned numpy needs
    install_requires=[pin for name, pin in pins.items() if name not in sum(OPTIONAL.values(), [])],
    extras_require={
        **{extra: [pins[name] for name in names] for extra, names in OPTIONAL.items()},
        "test": [*pins.values(), *read_requirements("requirements-test.txt")],
    },
    entry_points={"console_scripts": ["megadit-train = megadit.train:command"]},
)
