"""Results on disk."""

import json

import pytest

from megadit.evaluation.results import write_json


def test_a_result_that_json_does_not_know_is_refused_and_the_one_before_stays(tmp_path):
    path = tmp_path / "new/fid.json"
    write_json(path, {"fid": 1.5})
    with pytest.raises(ValueError, match="fid.json is not written: Out of range float values are not JSON compliant"):
        write_json(path, {"fid": float("nan")})
    assert json.loads(path.read_text()) == {"fid": 1.5}
