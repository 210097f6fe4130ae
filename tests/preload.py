"""Imported once by the process that the ranks of a test are forked from."""

import os

# The ranks of a test are more than most machines have GPUs: they meet over gloo.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed.runtime.zero.stage_1_and_2  # noqa: E402, F401
import sklearn.datasets  # noqa: F401
from diffusers import AutoencoderKL  # noqa: F401
from transformers import AutoTokenizer, CLIPTextModelWithProjection, T5EncoderModel  # noqa: F401

import megadit.training.start  # noqa: F401
