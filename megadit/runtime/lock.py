"""One training, or one encoding, at a time in a folder: the second waits for the first to end, however it ends."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
from pathlib import Path
from typing import IO

logger = logging.getLogger("megadit")


def hold(path: Path, patience_s: float) -> IO[str]:
    """Lock the file at `path`, creating it; the lock lasts until what is returned is closed, or the process ends.

    While another process holds it, waits up to `patience_s` seconds: a requeued job may overlap the job before it.
    Raises ValueError naming the holder when that is not enough, and OSError when the file cannot be opened.
    """
    file = path.open("a+")
    deadline, waiting = time.monotonic() + patience_s, False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            if time.monotonic() >= deadline:
                file.close()
                raise ValueError(f"{path.parent} is in use by {holder}; stop that, or choose another folder") from None
            if not waiting:
                logger.info("%s is in use by %s: waiting for it to end", path.parent, holder)
                waiting = True
            time.sleep(0.5)
        except OSError as error:  # a file system without locks
            logger.warning("%s: no lock (%s); take care that nothing else works there", path.parent, error.strerror)
            break
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
