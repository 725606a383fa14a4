import numpy as np
import pytest

from microlora._core import Preference, Reward, Target
from microlora.exceptions import FeedbackError
from microlora.feedback import Feedback

E = np.arange(1, 9, dtype=np.float32)
SCALARS = {
    "success": (Feedback.success, 0.0, 1.0),
    "failure": (Feedback.failure, -1.0, 0.0),
    "from_quality": (Feedback.from_quality, 0.0, 1.0),
}


def test_every_name_makes_its_kind():
    assert type(Feedback.correction(E)) is Target
    assert type(Feedback.correction(E, loss="cosine")) is Target
    assert type(Feedback.success(0.9, response=E)) is Reward
    assert type(Feedback.failure(-0.8, response=E)) is Reward
    assert type(Feedback.from_quality(0.85, response=E)) is Reward
    assert type(Feedback.preference(E, -E)) is Preference
    assert type(Feedback.preference(E, -E, p=0.7, beta=5.0)) is Preference


@pytest.mark.parametrize("name", SCALARS)
def test_the_ends_of_a_range_belong_to_it(name):
    make, low, high = SCALARS[name]
    for score in (low, high, (low + high) / 2, np.float32(high), int(low)):
        assert type(make(score, response=E)) is Reward


@pytest.mark.parametrize("name", SCALARS)
def test_a_score_out_of_its_range_is_refused(name):
    make, low, high = SCALARS[name]
    for score in (low - 0.01, high + 0.01, float("nan"), float("inf"), "1", None, True, [0.0]):
        with pytest.raises(
            FeedbackError, match=rf"^{name}: score: got .*, expected a number from {low:g} to {high:g}$"
        ):
            make(score, response=E)


@pytest.mark.parametrize("name", SCALARS)
def test_a_bare_score_is_refused_with_the_way_out(name):
    make, _, high = SCALARS[name]
    with pytest.raises(FeedbackError, match=rf"^{name}: .*no direction.*response=.*correction.*ten times"):
        make(high)


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan"), None, "1"])
def test_a_preference_needs_a_probability(p):
    with pytest.raises(FeedbackError, match="preference: p: got"):
        Feedback.preference(E, -E, p=p)


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan"), float("inf"), None])
def test_a_preference_needs_a_steepness(beta):
    with pytest.raises(FeedbackError, match="preference: beta: got"):
        Feedback.preference(E, -E, beta=beta)


def test_the_namespace_makes_no_objects():
    with pytest.raises(FeedbackError, match=r"Feedback\.correction"):
        Feedback()
