"""Encodings on several ranks, as a launcher would start them; stopped and killed."""

import contextlib
import io
import os
import signal

from tests.ranks import TIME_LIMIT, _Ranks, launcher_environ


def _encode(rank, environ, argv):
    import runpy

    os.environ.update({key: value.format(rank=rank) for key, value in environ.items()})
    main = runpy.run_path("tools/encode_dataset.py")["main"]
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        status = main(argv)
    return status, output.getvalue(), errors.getvalue()


def encode_on(world_size, *argv):
    """(exit status, stdout, stderr) of each rank."""
    ranks = _Ranks()
    try:
        ranks.ask(world_size, _encode, launcher_environ(world_size), [str(each) for each in argv])
        return ranks.gather(world_size, TIME_LIMIT)
    finally:
        ranks.kill()


def encode_and_signal(world_size, when, *argv, number=signal.SIGKILL, victims=None):
    """Send a signal to the victims (default: every rank) as soon as `when()` is true; what `encode_on` returns, unless
    they were killed.
    """
    ranks = _Ranks()
    try:
        ranks.ask(world_size, _encode, launcher_environ(world_size), [str(each) for each in argv])
        ranks.wait_for(world_size, when)
        for rank in range(world_size) if victims is None else victims:
            os.kill(ranks.processes[rank].pid, number)
        if number == signal.SIGKILL:
            return None
        return ranks.gather(world_size, TIME_LIMIT)
    finally:
        ranks.kill()


def units_done(out):
    """How many units are finished."""
    folder = out / "units"
    return sum(path.suffix == ".json" for path in folder.iterdir()) if folder.exists() else 0


def files_of(out):
    """Every file's content by name."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
