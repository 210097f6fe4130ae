"""Installs megadit: `pip install -e .`; the pins of requirements.txt are its dependencies."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_requirements(name: str) -> list[str]:
    """The requirement lines of a file beside this one, without comments and without `-r` lines."""
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("-")]


setup(
    name="megadit",
    version="0.1.0",
    description="Trains, converts and samples EC-DiT, a text-to-image diffusion transformer with expert-choice routing",
    license="Apache-2.0",
    packages=find_packages(include=["megadit", "megadit.*"]),
    package_data={"megadit": ["py.typed"]},
    python_requires=">=3.11",  # what the pinned numpy needs
    install_requires=read_requirements("requirements.txt"),
    extras_require={
        "test": read_requirements("requirements-test.txt"),
        "encoders": ["transformers>=4.50", "diffusers>=0.33"],  # frozen text encoders and VAEs
        "wandb": ["wandb>=0.19"],
    },
    entry_points={"console_scripts": ["megadit-train = megadit.train:main"]},
)
