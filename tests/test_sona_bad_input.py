"""What the loops refuse: typed, named, and with every byte of the state as it was."""

from contextlib import closing

import numpy as np
import pytest

import microlora as ml
from microlora import exceptions as ex
from microlora.sona import JournalConfig, SonaConfig, SonaLoop
from sona_core_support import NAMES, WIDTH, core_config, core_loop, feed, finish, same_state, targets
from sona_support import Words
from support import normal, rng, run_python

X = normal(rng(1), WIDTH)
T = ml.Target(normal(rng(2), WIDTH))
NAN, INF = float("nan"), float("inf")


def bad(v, at=3):
    out = X.copy()
    out[at] = v
    return out


def adapt(*args, **options):
    return lambda s: s.instant_adapt(*args, **options)


EVENTS = {
    "NaN in x": (adapt(bad(NAN), T), ex.NonFiniteError, "x"),
    "infinity in x": (adapt(bad(INF), T), ex.NonFiniteError, "x"),
    "x of another width": (adapt(X[:5], T), ex.ShapeError, "x: "),
    "x of no width": (adapt(X[:0], T), ex.ShapeError, "x: "),
    "rows": (adapt(np.stack([X, X]), T), ex.ShapeError, "x: "),
    "x of integers as text": (adapt(np.array(["a"] * WIDTH), T), ex.DTypeError, "x: "),
    "x that its squares overflow": (adapt(np.full(WIDTH, 3e38, np.float32), T), ex.NonFiniteError, ""),
    "no feedback": (adapt(X, None), ex.DTypeError, "feedback"),
    "a vector as feedback": (adapt(X, X), ex.DTypeError, "feedback"),
    "a target of another width": (adapt(X, ml.Target(X[:3])), ex.ShapeError, "target"),
    "a response of another width": (adapt(X, ml.Reward(0.5, X[:3])), ex.ShapeError, "response"),
    "base of another width": (adapt(X, T, base=X[:3]), ex.ShapeError, "base"),
    "NaN in base": (adapt(X, T, base=bad(NAN)), ex.NonFiniteError, "base"),
    "an unknown module": (adapt(X, T, module="k_proj"), ex.UnknownModuleError, "k_proj"),
    "quality of NaN": (adapt(X, T, NAN), ex.NonFiniteError, "quality"),
    "quality above 1": (adapt(X, T, 1.5), ex.FeedbackError, "quality: got 1.5"),
    "quality just above 1": (adapt(X, T, 1.0 + 1e-9), ex.FeedbackError, "quality: got 1.000000001"),
    "quality below 0": (adapt(X, T, -0.1), ex.FeedbackError, "quality: got -0.1"),
    "infinite quality": (adapt(X, T, INF), ex.FeedbackError, "quality: got inf"),
    "quality as text": (adapt(X, T, "0.5"), ex.FeedbackError, "quality: got '0.5'"),
    "quality as a list": (adapt(X, T, [0.5]), ex.FeedbackError, "quality: got [0.5]"),
    "quality as a flag": (adapt(X, T, True), ex.FeedbackError, "quality: got True"),
    "a text without an encoder": (adapt("how?", "so", 0.5), ex.ConfigError, "no encoder"),
    "a text with base": (adapt("how?", T, base=X), ex.ConfigError, "base"),
}
CALLS = {
    "forward of NaN": (lambda s: s.forward(bad(NAN), "q_proj"), ex.NonFiniteError, "x"),
    "forward of another width": (lambda s: s.forward(X[:3], "q_proj"), ex.ShapeError, "x"),
    "forward without a module": (lambda s: s.forward(X), ex.ConfigError, "module: missing"),
    "no arms": (lambda s: s.choose(X, [], "q_proj"), ex.ConfigError, "arms"),
    "an arm twice": (lambda s: s.choose(X, ["a", "a"], "v_proj"), ex.ConfigError, "a"),
    "a choice of NaN": (lambda s: s.choose(bad(NAN), ["a"]), ex.NonFiniteError, "x"),
    "a choice of another width": (lambda s: s.choose(X[:3], ["a"]), ex.ShapeError, "x"),
    "a choice of another module": (lambda s: s.choose(X, ["a"], "v_proj"), ex.ConfigError, "first choice"),
    "arms in one text": (lambda s: s.choose(X, "abc"), ex.DTypeError, "arms: got str"),
    "arms of numbers": (lambda s: s.choose(X, ["a", 1]), ex.DTypeError, "arms[1]: got int"),
    "a choice of a numbered module": (lambda s: s.choose(X, ["a"], 3), ex.DTypeError, "module: got int"),
    "a reward for a name": (lambda s: s.reward("a", 0.5), ex.DTypeError, "choice: got str"),
    "a reward for a number below 0": (lambda s: s.reward(-1, 0.5), ex.UnknownChoiceError, "choice: got -1"),
    "a reward for a huge number": (lambda s: s.reward(2**70, 0.5), ex.UnknownChoiceError, "choice: got 1180"),
    "a reward in words": (lambda s: s.reward(2, "good"), ex.DTypeError, "reward: got str"),
    "forgetting a text": (lambda s: s.forget("5"), ex.DTypeError, "event: got str"),
    "forgetting no event": (lambda s: s.forget(None), ex.DTypeError, "event: got NoneType"),
    "forgetting a half": (lambda s: s.forget(1.5), ex.DTypeError, "event: got float"),
    "forgetting below 0": (lambda s: s.forget(-1), ex.FeedbackError, "event: got -1"),
    "forgetting in some way": (lambda s: s.forget(1, 3), ex.DTypeError, "how: got int"),
    "forgetting in another way": (lambda s: s.forget(1, "so"), ex.ConfigError, "how: got"),
    "a reward for nothing": (lambda s: s.reward(99, 0.5), ex.MicroLoraError, "99"),
    "a reward of NaN": (lambda s: s.reward(2, NAN), ex.MicroLoraError, "reward"),
    "a reward again": (lambda s: s.reward(1, 0.5), ex.MicroLoraError, "1"),
    "few inputs of a warm-up": (lambda s: s.warm_up(np.ones((2, WIDTH), np.float32)), ex.MicroLoraError, ""),
    "another adapter's loss": (lambda s: s.evaluate(adapter_of(6)), ex.MicroLoraError, ""),
    "another adapter": (lambda s: s.install(adapter_of(6), 3), ex.MicroLoraError, ""),
    "an adapter of another rank": (lambda s: s.install(adapter_of(WIDTH, 2), 3), ex.ShapeError, "rank 2"),
    "no state": (lambda s: s.restore(b""), ex.FormatError, ""),
    "an adapter as state": (lambda s: s.restore(adapter_of(WIDTH).to_bytes()), ex.FormatError, "no state"),
    "a cut state": (lambda s: s.restore(s.to_bytes()[:-9]), ex.FormatError, ""),
    "a state of other modules": (lambda s: s.restore(other_state()), ex.MicroLoraError, ""),
    "a saved state elsewhere": (lambda s: s.checkpoint(), ex.ConfigError, "directory"),
}


def adapter_of(width, rank=4):
    cfg = ml.LoraConfig(rank=rank, alpha=2.0 * rank, target_modules=NAMES)
    return ml.MicroLoRA(cfg, hidden_dim=width).adapter()


def other_state():
    return core_loop(target_modules=("q_proj",)).to_bytes()


@pytest.fixture(params=["ewc_merge", "ensemble"])
def sona(request):
    loop = core_loop(consolidation=request.param, ensemble_size=3, pattern_threshold=0.3)
    feed(loop, targets(40, patterns=3))
    finish(loop)
    feed(loop, targets(5, 1))
    loop.reward(loop.choose(X, ["a", "b"], "q_proj").id, 1.0)
    loop.choose(X, ["a", "b"], "q_proj")
    return loop


@pytest.mark.parametrize("name", [*EVENTS, *CALLS])
def test_refused_with_the_state_as_it_was(sona, name):
    call, error, message = (EVENTS | CALLS)[name]
    before, version, stats = sona.to_bytes(), sona.version, sona.stats()
    for _ in range(12):  # held-out numbers are no excuse
        with pytest.raises(error) as caught:
            call(sona)
        assert message in str(caught.value)
        assert isinstance(caught.value, ex.MicroLoraError)
        assert sona.to_bytes() == before
        if name in CALLS:
            break
        feed(sona, targets(1, 3))
        before = sona.to_bytes()
    if name in CALLS:
        assert (sona.version, sona.stats().events) == (version, stats.events)


@pytest.mark.parametrize("name", EVENTS)
def test_a_refused_event_is_not_in_the_journal(tmp_path, name):
    call, error, _ = EVENTS[name]
    config, journal = core_config(dtype="f16"), JournalConfig(segment_bytes=16384)
    with closing(SonaLoop.open(tmp_path / "d", config, journal=journal)) as sona:
        feed(sona, targets(5))
        with pytest.raises(error):
            call(sona)
        feed(sona, targets(5, 1))
        assert [line["event"] for line in sona.audit()] == list(range(1, 11))
    twin = SonaLoop(config)
    feed(twin, targets(5) + targets(5, 1))
    with closing(SonaLoop.open(tmp_path / "d", journal=journal)) as again:
        same_state(again, twin)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32"])
def test_an_event_that_a_later_module_refuses_is_in_none(dtype):
    sona = core_loop(dtype=dtype, rank=2, holdout=0.0)
    a = sona.lora["v_proj"].lora_a.astype(np.float64)
    x = X - np.linalg.pinv(a) @ (a @ X)
    refused = 0
    for scale in (1e-2, 1e-3, 1e-6, 1e-9, 1e-12, 1e-15):
        fresh = core_loop(dtype=dtype, rank=2, holdout=0.0)
        before = fresh.to_bytes()
        try:
            fresh.instant_adapt((scale * x).astype(np.float32), ml.Target(np.full(WIDTH, 90.0, np.float32)))
        except ex.NonFiniteError:
            refused += 1
            assert fresh.to_bytes() == before
    assert refused


def test_modules_of_other_widths_have_no_warm_up_by_hand():
    lora = ml.LoraConfig(rank=4, target_modules=NAMES)
    sona = SonaLoop(SonaConfig(lora=lora, dims={"q_proj": (12, 12), "v_proj": (6, 6)}))
    before = sona.to_bytes()
    with pytest.raises(ex.ConfigError, match="widths"):
        sona.warm_up(normal(rng(), 10, 12))
    assert sona.to_bytes() == before


class Broken(Words):
    """An encoder that fails in the way that its name says."""

    def __init__(self, how):
        super().__init__(WIDTH)
        self.how = how

    def encode(self, texts):
        if self.how == "raises":
            raise ZeroDivisionError("no model")
        rows = super().encode(texts)
        return {"nan": rows * NAN, "width": rows[:, :3], "rows": rows[:0], "zero": rows * 0}[self.how]


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("raises", ex.EncoderError),
        ("nan", ex.NonFiniteError),
        ("width", ex.MicroLoraError),
        ("rows", ex.MicroLoraError),
        ("zero", ex.FeedbackError),
    ],
)
def test_encoders_that_fail(how, error):
    sona = SonaLoop(core_config(), encoder=Broken(how))
    feed(sona, targets(5))
    before = sona.to_bytes()
    with pytest.raises(error):
        sona.instant_adapt("how?", "so", 0.9)
    assert sona.to_bytes() == before


@pytest.mark.parametrize(
    "texts", [("", "so", 0.5), ("how?", " ", 0.5), ("how?", "so", NAN), ("how?", "so", 2)]
)
def test_texts_that_say_nothing(texts):
    sona = SonaLoop(core_config(), encoder=Words(WIDTH))
    feed(sona, targets(5))
    before = sona.to_bytes()
    with pytest.raises(ex.MicroLoraError):
        sona.instant_adapt(*texts)
    assert sona.to_bytes() == before


DISK_FULL = """
import resource, signal, sys
from contextlib import closing
from microlora.sona import JournalConfig, SonaLoop
from sona_core_support import core_config, digest, essence, targets
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
journal = JournalConfig(segment_bytes=4096)
sona = SonaLoop.open(sys.argv[1], core_config(), journal=journal)
calls, failed = targets(60), 0
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for i, call in enumerate(calls):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100 if i > 5 else hard, hard))
    before = essence(sona)
    try:
        done = sona.instant_adapt(*call)
    except OSError:
        failed += 1
        assert essence(sona) == before
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        done = sona.instant_adapt(*call)
    assert done.event == i + 1, (done.event, i)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
assert [line["event"] for line in sona.audit()] == list(range(1, 61))
now = digest(sona)
sona.close()
with closing(SonaLoop.open(sys.argv[1], journal=journal)) as again:
    assert digest(again) == now
    assert again.opened.warnings == ()
print(failed)
"""


def test_a_full_disk_refuses_events_that_can_come_again(tmp_path):
    assert int(run_python(DISK_FULL, tmp_path / "d")) > 0


def test_times_of_a_journal_never_go_back(tmp_path):
    with closing(SonaLoop.open(tmp_path / "d", core_config(), journal=JournalConfig())) as sona:
        feed(sona, targets(20))
        times = [line["time"] for line in sona.audit()]
    assert times == sorted(times)


def test_a_choice_is_rewarded_by_itself_or_by_its_number(sona):
    twin = core_loop()
    twin.restore(core_loop().to_bytes())
    for i in range(6):
        by_itself, by_number = sona.choose(X, ("a", "b"), "q_proj"), twin.choose(X, ["a", "b"], "q_proj")
        assert by_itself.name == ["a", "b"][by_itself.arm]
        assert isinstance(sona.reward(by_itself, i), float)
        assert isinstance(twin.reward(np.int64(by_number.id), np.float32(i)), float)
    assert [reward for _, _, reward in sona.choices()][-6:] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert len(twin.choices()) == 6


def test_a_result_is_not_the_number_of_its_event(sona):
    result = sona.instant_adapt(*targets(1, 8)[0])
    with pytest.raises(ex.DTypeError, match=r"event: got AdaptationResult, .*result\.event"):
        sona.forget(result)
    assert sona.forget(result.event) in ("replay", "downdate")


def test_the_room_lists_what_it_has():
    names = dir(ml.sona)
    assert {*ml.sona.__all__, "__all__", "__name__"} <= set(names)
    assert "TYPE_CHECKING" not in names
    assert all(getattr(ml.sona, name) is not None for name in ml.sona.__all__)
