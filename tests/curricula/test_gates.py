import pytest

from whorl.curricula.gates import (
    Above,
    After,
    AllOf,
    AnyOf,
    Below,
    Gate,
    NearLimit,
    NoBest,
    Plateau,
    record,
)

NAN = float("nan")


@pytest.mark.parametrize(
    ("gate", "values", "is_open"),
    [
        (Above("x", 0.45, times=3), [0.5, 0.45, 0.6], True),
        (Above("x", 0.45, times=3), [0.9, 0.5, 0.44], False),
        (Above("x", 0.45, times=3), [0.9, 0.9], False),  # too few
        (Above("x", 0.45), [0.9, NAN], False),
        (Below("x", 0.1, times=2), [0.5, 0.1, 0.05], True),
        (Below("x", 0.1, times=2), [0.05, 0.2], False),
        (NearLimit("x", limit=100, frac=0.95), [95.0], True),
        (NearLimit("x", limit=100, frac=0.95), [94.9], False),
        (Plateau("x", window=2, tolerance=0.25), [9, 1.0, 2.0, 1.25, 2.25], True),  # 1.5 and 1.75
        (Plateau("x", window=2, tolerance=0.24), [9, 1.0, 2.0, 1.25, 2.25], False),
        (Plateau("x", window=2, tolerance=0.1), [3.0, 2.0, 1.0, 0.5], False),  # still falling
        (Plateau("x", window=2, tolerance=9), [1.0, 1.0, 1.0], False),
        (Plateau("x", window=1, tolerance=9), [NAN, 1.0], False),
        (NoBest("x", patience=2), [0.1, 0.7, 0.6, 0.7], True),
        (NoBest("x", patience=2), [0.1, 0.7, 0.6, 0.8], False),
        (NoBest("x", patience=2), [0.7, 0.6], False),
        (After("x", 2), [NAN, 1.0], True),
        (After("x", 2), [1.0], False),
        (AllOf((After("x", 1), Above("x", 2))), [1.0], False),
        (AllOf((After("x", 1), Above("x", 1))), [1.0], True),
        (AnyOf((After("x", 2), Above("x", 1))), [1.0], True),
        (AnyOf((After("x", 2), Above("x", 2))), [1.0], False),
    ],
)
def test_a_gate_opens_when_its_sentence_is_true(gate: Gate, values: list[float], is_open: bool) -> None:
    assert gate({"x": values}) is is_open


def test_a_gate_on_a_metric_that_nobody_recorded_is_closed() -> None:
    for gate in (
        Above("x", 0),
        Below("x", 0),
        NearLimit("x", 1),
        Plateau("x", 1, 1),
        NoBest("x", 1),
        After("x", 1),
    ):
        assert gate({}) is False


def test_a_gate_must_look_at_something() -> None:
    with pytest.raises(ValueError, match="one value or more; got 0"):
        Above("x", 0.5, times=0)


def test_a_history_keeps_the_last_thousand_values() -> None:
    history: dict[str, list[float]] = {}
    for step in range(1_200):
        record(history, {"x": step})
    assert (len(history["x"]), history["x"][0], history["x"][-1]) == (1_000, 200.0, 1_199.0)
