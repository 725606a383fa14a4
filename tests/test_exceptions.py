import inspect
import pickle
import warnings

import pytest

from microlora import exceptions
from microlora.exceptions import MicroLoraError, UnusedTensorWarning

ERRORS = [
    item
    for _, item in inspect.getmembers(exceptions, inspect.isclass)
    if issubclass(item, MicroLoraError) and not item.__name__.startswith("_")
]

BUILTIN = {
    "ShapeError": ValueError,
    "DTypeError": TypeError,
    "NonFiniteError": ValueError,
    "SampleError": ValueError,
    "LayoutError": ValueError,
    "ConfigError": ValueError,
    "UnknownModuleError": KeyError,
    "UnknownChoiceError": KeyError,
    "UnknownPresetError": KeyError,
    "FeedbackError": ValueError,
    "FormatError": ValueError,
    "UnsupportedVariantError": ValueError,
    "UnrepairableError": ValueError,
    "VerificationError": ValueError,
    "DestinationExistsError": FileExistsError,
    "MissingPathError": FileNotFoundError,
    "DeviceError": RuntimeError,
    "SwapError": RuntimeError,
    "MissingExtraError": ImportError,
    "EncoderError": RuntimeError,
    "LeakageError": ValueError,
}


def test_the_list_is_whole():
    assert {error.__name__ for error in ERRORS} == {*BUILTIN, "MicroLoraError", "CancelledError"}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_every_error_pickles_and_keeps_its_message(error):
    message = "rank: got 0, expected 'an integer' \n of 1"
    raised = error(message)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(raised, protocol))
        assert type(again) is error
        assert again.args == (message,)
        assert str(again) == str(raised) == message


@pytest.mark.parametrize("name", BUILTIN)
def test_every_error_is_the_builtin_a_caller_expects(name):
    with pytest.raises(BUILTIN[name]):
        raise getattr(exceptions, name)("x")


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_every_error_is_documented_and_empty_is_fine(error):
    assert inspect.getdoc(error)
    assert str(error()) in ("", "()")


def test_a_sample_error_carries_its_place():
    raised = exceptions.SampleError("x: row 7 contains NaN", row=7, steps_done=3, sample_id="a")
    again = pickle.loads(pickle.dumps(raised))
    for error in (raised, again):
        assert (error.row, error.steps_done, error.sample_id) == (7, 3, "a")
        assert str(error) == "x: row 7 contains NaN"
    assert exceptions.SampleError("text", 4, 2).row == 4


def test_a_swap_error_carries_the_generation():
    raised = exceptions.SwapError("expected: got 3", 7)
    again = pickle.loads(pickle.dumps(raised))
    for error in (raised, again):
        assert error.generation == 7
        assert str(error) == "expected: got 3"
    assert exceptions.SwapError("text", generation=2).generation == 2
    assert exceptions.SwapError("text").generation is None


def test_the_warning_is_a_warning():
    with pytest.warns(UnusedTensorWarning, match="x"):
        warnings.warn("x", UnusedTensorWarning, stacklevel=1)
