"""How far two trainings are apart."""


def errors(found, expected):
    """{name: relative error} of tensors by name."""
    assert found.keys() == expected.keys()
    return {name: float((found[name] - tensor).norm() / tensor.norm()) for name, tensor in expected.items()}


def assert_small(found, tolerance, what):
    # NaN is not below any tolerance.
    wrong = {name: error for name, error in found.items() if not error < tolerance}
    worst = ", ".join(f"{name}: {error:.1e}" for name, error in sorted(wrong.items(), key=lambda item: -item[1])[:8])
    assert not wrong, f"{len(wrong)} of {len(found)} {what} differ by more than {tolerance:.0e}: {worst}"
