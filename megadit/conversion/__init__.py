"""Weights in and out: checkpoints, plain safetensors, and the networks of diffusers."""
