"""Where a run is survives its checkpoint, also one of a version that knew less."""

import json

from megadit.training.progress import Progress


def test_it_comes_back_from_the_metadata_of_a_checkpoint():
    progress = Progress(step=9, updates=7, passed_over=3, rewinds=1, skipped=(4, 8))
    metadata = json.loads(json.dumps({"progress": progress.to_dict()}))
    assert Progress.of(9, metadata) == progress
    assert Progress.of(9, {}) == Progress(step=9, updates=9)


def test_only_the_last_skips_are_remembered():
    progress = Progress()
    for applied in (True, False, True, False, False, True):
        progress = progress.after(applied, window=3)
    assert progress == Progress(step=6, updates=3, skipped=(4, 5))
    assert progress.batch == 6
