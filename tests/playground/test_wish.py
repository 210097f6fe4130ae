"""Whatever is posted, it is a wish within the limits, or refused in one line."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megadit.playground.wish import MOST_GUIDANCE, MOST_SEED, MOST_STEPS, SAMPLERS, wish_of
from megadit.sampling.generate import SampleConfig

values = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just([]) | st.sampled_from(SAMPLERS)
names = st.sampled_from(["negative", "seed", "steps", "guidance", "sampler"])
wishes = st.fixed_dictionaries({"prompt": st.text(min_size=1)}, optional={"seed": st.integers(0, 9)}).flatmap(
    lambda said: st.dictionaries(names, values, max_size=2).map(lambda more: said | more)
)


@pytest.mark.parametrize("name", ["seed", "steps", "guidance"])
@pytest.mark.parametrize("digits", [20, 400, 5000])  # more than a float holds, more than Python prints
def test_a_huge_number_is_out_of_range(name, digits):
    body = b'{"prompt": "a", "%s": 1%s}' % (name.encode(), b"0" * digits)
    with pytest.raises(ValueError):
        wish_of(body, SampleConfig())


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e400"])
def test_guidance_is_finite(value):
    with pytest.raises(ValueError, match="guidance is .*; write a number from 0 to 100"):
        wish_of(b'{"prompt": "a", "guidance": %s}' % value.encode(), SampleConfig())


@settings(deadline=None)
@given(wishes.map(lambda said: json.dumps(said).encode()) | st.binary())
def test_a_wish_is_within_the_limits_or_refused(body):
    try:
        wish = wish_of(body, SampleConfig())
    except ValueError as error:
        assert "\n" not in str(error) and str(error)
        return
    assert wish.prompt.strip() == wish.prompt != "" and wish.sampler in SAMPLERS
    assert type(wish.seed) is type(wish.steps) is int and type(wish.guidance) is float
    assert 0 <= wish.seed <= MOST_SEED and 1 <= wish.steps <= MOST_STEPS and 0 <= wish.guidance <= MOST_GUIDANCE


def test_deep_and_long_json_is_refused_too():
    for body in (b"[" * 60000, b'{"prompt": "a", "steps": ' + b"9" * 60000 + b"}"):
        with pytest.raises(ValueError) as caught:
            wish_of(body, SampleConfig())
        assert len(str(caught.value)) < 300
