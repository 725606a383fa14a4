"""Early stopping: what counts as better, when it stops, and its state."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microlora.exceptions import ConfigError
from microlora.training import EarlyStopping

losses = st.lists(st.floats(-100.0, 100.0), min_size=1, max_size=40)


def feed(stopping, values):
    """Checks up to the stop; which of them improved."""
    improved = []
    for value in values:
        improved.append(stopping.update(value))
        if stopping.stop:
            break
    return improved


def reference(values, patience, min_delta):
    """The definition, written down without state."""
    best, at, stops = math.inf, 0, None
    for i, value in enumerate(values):
        if best == math.inf or best - value > min_delta * abs(best):
            best, at = value, i
        elif patience and i - at >= patience:
            stops = i
            break
    return best, stops


@given(losses, st.integers(0, 5), st.floats(0.0, 0.5))
def test_it_is_its_definition(values, patience, min_delta):
    stopping = EarlyStopping(patience, min_delta)
    seen = len(feed(stopping, values))
    best, stops = reference(values, patience, min_delta)
    assert stopping.best == best
    assert stopping.stop == (stops is not None)
    assert seen == (len(values) if stops is None else stops + 1)


@given(losses, st.integers(0, 5), st.integers(0, 40))
def test_a_state_goes_on_where_it_was(values, patience, cut):
    whole, first = EarlyStopping(patience), EarlyStopping(patience)
    second = EarlyStopping(patience)
    feed(first, values[:cut])
    second.restore(first.state())
    for value in values[:cut] if first.stop else values:
        whole.update(value)
    if not first.stop:
        for value in values[cut:]:
            second.update(value)
        assert second.state() == whole.state()


def test_small_gains_do_not_count():
    stopping = EarlyStopping(patience=2, min_delta=0.1)
    assert feed(stopping, [10.0, 9.5, 9.1, 8.9]) == [True, False, False]
    assert stopping.best == 10.0


def test_never_before_one_check_and_one_failure():
    stopping = EarlyStopping(patience=1)
    assert not stopping.stop
    stopping.update(1.0)
    assert not stopping.stop
    stopping.update(1.0)
    assert stopping.stop


def test_patience_zero_never_stops_for_lack_of_progress():
    stopping = EarlyStopping(patience=0)
    assert feed(stopping, [1.0] * 100) == [True] + [False] * 99


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("patience", [0, 3])
def test_a_loss_that_is_not_finite_stops_at_once(bad, patience):
    stopping = EarlyStopping(patience)
    assert feed(stopping, [3.0, bad, 1.0]) == [True, False]
    assert (stopping.stop, stopping.diverged, stopping.best) == (True, True, 3.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"patience": -1}, "patience: got -1"), ({"min_delta": 1.0}, r"min_delta: got 1\.0")],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        EarlyStopping(**settings)


@pytest.mark.parametrize("state", [{}, {"best": 1.0}, {**EarlyStopping().state(), "more": 1}])
def test_a_state_that_is_none_changes_nothing(state):
    stopping = EarlyStopping()
    stopping.update(2.0)
    before = stopping.state()
    with pytest.raises(ConfigError, match="early_stopping"):
        stopping.restore(state)
    assert stopping.state() == before
