"""The process and its machine: launch, log, seed, clock. Knows nothing of models."""
