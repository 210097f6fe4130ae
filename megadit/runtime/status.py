"""Exit statuses of a training: what a launcher, a batch script or a scheduler is told.

STOPPED and LOST say that the same command goes on from the newest checkpoint: a job that ends with one of them should
be queued again.
"""

from __future__ import annotations

FINISHED = 0
DIVERGED = 1  # too many bad numbers; starting again would meet them again
BAD_INPUT = 2  # refused before anything was written
UNSAVED = 3  # done, but the last checkpoint could not be written
STOPPED = 75  # asked to stop by a signal or by its time limit, with a checkpoint of its last step (EX_TEMPFAIL)
LOST = 76  # a rank died, hung or raised, or its memory differs from its replicas'; the newest checkpoint is older
