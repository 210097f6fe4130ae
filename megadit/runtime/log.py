"""One voice: the main process logs at INFO, the others errors only."""

from __future__ import annotations

import logging
import sys


def setup_logging(rank: int) -> logging.Logger:
    """The project's logger, writing to stderr; ranks other than 0 say errors only, for what is true of all."""
    logger = logging.getLogger("megadit")
    logger.handlers.clear()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    logger.propagate = False
    # Libraries that we build on chat at INFO and WARNING on every rank.
    for noisy in ("DeepSpeed", "torch.distributed.pipelining"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    return logger
