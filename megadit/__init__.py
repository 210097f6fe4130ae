"""megadit: train, convert and sample EC-DiT over tensor, pipeline, expert and data parallelism."""

__version__ = "0.1.0"
