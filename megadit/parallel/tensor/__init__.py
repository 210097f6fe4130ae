"""Tensor parallelism: the autograd pairs between replicated and cut tensors, and the two linear layers."""
