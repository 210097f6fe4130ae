"""Imported once by the process that the ranks of a test are forked from."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed.runtime.zero.stage_1_and_2  # noqa: E402, F401
import sklearn.datasets  # noqa: F401
