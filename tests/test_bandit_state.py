"""State and refusals of the bandit: bytes, damage, bad input."""

import doctest
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import microlora as ml
from microlora import _core
from microlora import exceptions as ex
from reference_bandit import ARMS, taught
from support import make, move, normal, read_tensors, rng, write_tensors


def test_bytes_go_on_bit_for_bit():
    lora, r = make(), rng(9)
    bandit, _ = taught(lora, r, max_open=7, seed=5)
    bandit.choose(normal(r, 24), ["fourth", *ARMS])
    again = _core.Bandit.from_bytes(lora, bandit.to_bytes())
    assert again.to_bytes() == bandit.to_bytes()
    assert again.settings == bandit.settings
    for _ in range(30):
        x, reward = normal(r, 24), float(r.uniform())
        a, b = bandit.choose(x, ARMS), again.choose(x, ARMS)
        assert a == b
        assert bandit.reward(a, reward) == again.reward(b, reward)
    assert again.to_bytes() == bandit.to_bytes()
    assert again.restarts == 0


def test_bytes_meet_another_a_at_the_next_choice():
    lora, r = make(), rng(10)
    bandit, _ = taught(lora, r)
    data = bandit.to_bytes()
    move(lora, r)
    again, x = _core.Bandit.from_bytes(lora, data), normal(r, 24)
    assert again.choose(x, ARMS) == bandit.choose(x, ARMS)
    assert again.restarts == bandit.restarts == 1


def test_a_new_bandit_has_a_state_too():
    lora = make()
    data = _core.Bandit(lora, alpha=0.5).to_bytes()
    assert _core.Bandit.from_bytes(lora, data).settings["alpha"] == 0.5


def test_bytes_of_another_shape_are_refused():
    r = rng(11)
    data = taught(make(), r)[0].to_bytes()
    for other in (make(rank=3), make(23, 24)):
        with pytest.raises(ex.ShapeError):
            _core.Bandit.from_bytes(other, data)


@pytest.mark.parametrize(
    "name",
    ["theta", "p", "open_propensity", "open_u", "open_x", "log_propensity", "log_reward", "log_x"],
)
def test_numbers_that_are_not_finite_are_refused(name):
    lora, r = make(), rng(12)
    bandit, _ = taught(lora, r)
    bandit.choose(normal(r, 24), ARMS)
    header, tensors = read_tensors(bandit.to_bytes())
    size = {"F64": 8, "F32": 4}[header[name]["dtype"]]
    nan = np.array(np.nan, f"<f{size}").tobytes()
    tensors[name][-size:] = nan
    with pytest.raises(ex.FormatError):
        _core.Bandit.from_bytes(lora, write_tensors(header, tensors))


@pytest.mark.parametrize("name", ["open_id", "open_arm", "log_id", "log_arm"])
def test_choices_that_cannot_have_been_are_refused(name):
    lora, r = make(), rng(13)
    bandit, _ = taught(lora, r)
    bandit.choose(normal(r, 24), ARMS)
    header, tensors = read_tensors(bandit.to_bytes())
    tensors[name][-8:] = (1 << 40).to_bytes(8, "little")
    with pytest.raises(ex.FormatError, match="cannot have been"):
        _core.Bandit.from_bytes(lora, write_tensors(header, tensors))


@given(st.data())
def test_damaged_bytes_are_refused_or_sound(data):
    lora = make()
    whole = taught(lora, rng(14), events=5)[0].to_bytes()
    at, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    damaged = whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :]
    for broken in (damaged, whole[:at]):
        try:
            bandit = _core.Bandit.from_bytes(lora, broken)
        except ml.MicroLoraError:
            continue
        assert broken is damaged
        assert np.isfinite(bandit.choose(np.ones(24, np.float32), ARMS).scores).all()


def test_a_newer_layout_is_refused():
    lora = make()
    header, tensors = read_tensors(_core.Bandit(lora).to_bytes())
    tensors["state"] = tensors["state"].replace(b'"version":1', b'"version":2')
    with pytest.raises(ex.UnsupportedVariantError, match="version 2"):
        _core.Bandit.from_bytes(lora, write_tensors(header, tensors))


def test_choices_pickle():
    choice = _core.Bandit(make()).choose(np.ones(24, np.float32), ARMS)
    assert pickle.loads(pickle.dumps(choice)) == choice
    assert repr(choice) == f'Choice(id=1, arm={choice.arm}, name="{choice.name}", propensity=0.3333)'


# --- Bad input ---------------------------------------------------------------------------------------------

X = np.ones(24, np.float32)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda b: b.choose(X, []), ex.ConfigError, "arms: got none"),
        (lambda b: b.choose(X, ["a", "b", "a"]), ex.ConfigError, 'arms: got "a" twice'),
        (lambda b: b.choose(X, ["long", "long"]), ex.ConfigError, 'arms: got "long" twice'),
        (lambda b: b.choose(X, [""]), ex.ConfigError, "arms: got an empty name"),
        (lambda b: b.choose(X, [str(i) for i in range(257)]), ex.ConfigError, "at most 256 arms"),
        (lambda b: b.choose(X, "long"), ex.DTypeError, "arms: got <class 'str'>"),
        (lambda b: b.choose(X, ["long", 3]), ex.DTypeError, "arms: got <class 'int'>"),
        (lambda b: b.choose(X, None), ex.DTypeError, "arms: got <class 'NoneType'>"),
        (lambda b: b.choose(X[:-1], ARMS), ex.ShapeError, "x: got shape (23,), expected (24,)"),
        (lambda b: b.choose(X[None], ARMS), ex.ShapeError, "x: got shape (1, 24)"),
        (lambda b: b.choose(X * np.nan, ARMS), ex.NonFiniteError, "x: contains NaN or infinity"),
        (lambda b: b.choose(X * np.float32(3e38), ARMS), ex.NonFiniteError, "x: "),
        (lambda b: b.choose(["a"] * 24, ARMS), ex.DTypeError, "x: "),
        (lambda b: b.reward(41, float("nan")), ex.NonFiniteError, "reward: contains NaN"),
        (lambda b: b.reward(41, float("inf")), ex.NonFiniteError, "reward: contains NaN"),
        (lambda b: b.reward(41, -2e18), ex.ConfigError, "reward: got -2e18"),
        (lambda b: b.reward(41, "good"), ex.DTypeError, "reward: got <class 'str'>"),
        (lambda b: b.reward("long", 1.0), ex.DTypeError, "choice: got <class 'str'>"),
        (lambda b: b.reward(-1, 1.0), ex.DTypeError, "choice: got <class 'int'>"),
        (lambda b: b.reward(1, 1.0), ex.UnknownChoiceError, "choice: got 1, expected one that waits"),
        (lambda b: b.reward(0, 1.0), ex.UnknownChoiceError, "no choice has that number"),
        (lambda b: b.reward(42, 1.0), ex.UnknownChoiceError, "no choice has that number"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(call, error, words):
    bandit, _ = taught(make(), rng(15))
    bandit.choose(normal(rng(16), 24), ARMS)
    before = bandit.to_bytes()
    with pytest.raises(error) as caught:
        call(bandit)
    assert words in str(caught.value)
    assert bandit.to_bytes() == before


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"alpha": -0.1}, "alpha: got -0.1"),
        ({"alpha": float("nan")}, "alpha: got NaN"),
        ({"alpha": "big"}, "alpha: got 'big'"),
        ({"ridge": 0.0}, "ridge: got 0"),
        ({"epsilon": 1.5}, "epsilon: got 1.5"),
        ({"max_arms": 0}, "max_arms: got 0"),
        ({"max_open": 0}, "max_open: got 0"),
        ({"max_open": 2.5}, "max_open: got 2.5"),
        ({"history": -1}, "history: got -1"),
        ({"seed": -1}, "seed: got -1"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(ex.ConfigError, match="expected") as caught:
        _core.Bandit(make(), **settings)
    assert words in str(caught.value)


def test_modules_are_found_by_name():
    lora = make(names=("q_proj", "k_proj"))
    assert _core.Bandit(lora, "k_proj").module == "k_proj"
    with pytest.raises(ex.UnknownModuleError):
        _core.Bandit(lora, "v_proj")
    with pytest.raises(ex.ConfigError, match="module: got nothing"):
        _core.Bandit(lora)
    with pytest.raises(ex.DTypeError, match="data: got"):
        _core.Bandit.from_bytes(lora, "text", "k_proj")
    with pytest.raises(ex.FormatError):
        _core.Bandit.from_bytes(lora, lora.adapter().to_bytes(), "k_proj")


def test_the_example_of_the_class_runs():
    stub = Path(ml.__file__).with_name("_core.pyi").read_text()
    text = re.split('"""', stub[stub.index("class Bandit:") :])[1]
    example = doctest.DocTestParser().get_doctest(text, {}, "Bandit", None, 0)
    assert example.examples
    assert doctest.DocTestRunner(verbose=False).run(example).failed == 0
