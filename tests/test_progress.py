import threading

import pytest

from microlora.exceptions import CancelledError, MicroLoraError
from microlora.progress import CancelToken, Progress


def test_a_token_is_set_once_and_stays():
    token = CancelToken()
    assert not token.cancelled
    token.raise_if_cancelled("saving")
    assert repr(token) == "CancelToken(cancelled=False)"
    token.cancel()
    token.cancel()
    assert token.cancelled
    assert repr(token) == "CancelToken(cancelled=True)"
    with pytest.raises(CancelledError, match="saving was cancelled") as caught:
        token.raise_if_cancelled("saving")
    assert isinstance(caught.value, MicroLoraError)
    with pytest.raises(CancelledError, match="the call was cancelled"):
        token.raise_if_cancelled()


def test_the_state_cannot_be_assigned():
    token = CancelToken()
    with pytest.raises(AttributeError):
        token.cancelled = True


def test_cancel_reaches_the_work_of_another_thread():
    token = CancelToken()
    started, result = threading.Event(), []

    def work():
        started.set()
        try:
            while True:
                token.raise_if_cancelled("the work")
        except CancelledError as error:
            result.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    assert started.wait(10)
    token.cancel()
    thread.join(10)
    assert not thread.is_alive()
    assert result == ["the work was cancelled; no output was left behind"]


def test_the_shape_of_a_progress_callback():
    seen = []

    def work(progress: Progress) -> None:
        progress(0, None, "starting")
        progress(1, 2, "half")

    work(lambda done, total, message: seen.append((done, total, message)))
    assert seen == [(0, None, "starting"), (1, 2, "half")]
