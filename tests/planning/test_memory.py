"""What a plan adds up to the bytes of a rank."""

from dataclasses import replace

from megadit.planning.memory import Memory


def test_the_peak_is_the_state_the_buffers_and_the_most_of_a_step():
    memory = Memory(weights=1, masters=2, moments=4, ema=8, buffers=16, gradients=32, activations=64, updating=95)
    assert memory.state == 1 + 2 + 4 + 8
    assert memory.peak == memory.state + 16 + 32 + 64
    assert replace(memory, updating=97).peak == memory.state + 16 + 97
