"""The loop as people hold it: parts, texts, hooks, values, and what is refused."""

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest

import microlora as ml
from microlora import exceptions as ex
from microlora.sona import SonaConfig, SonaLoop
from sona_support import WIDTH, Words, config, feed, loop, stream
from support import close, normal, rng


def test_it_learns_serves_and_publishes():
    sona = loop()
    x, t = feed(sona, 60)
    before = 0.5 * (t**2).sum(1).mean()
    after = 0.5 * ((sona.forward(x) - t) ** 2).sum(1).mean()
    assert after < 0.5 * before
    assert not sona.manager.active.lora_b("q_proj").any()
    result = sona.maybe_background(force=True)
    assert result.loop_type == "background"
    assert result.applied
    assert sona.manager.generation == 2
    assert (sona.manager.active.lora_b("q_proj") == sona.consolidated().lora_b("q_proj")).all()
    out = np.ones_like(x)
    sona.forward_add(x, "q_proj", out)
    close(out, 1.0 + sona.forward(x), rtol=1e-6)


def test_parts_are_those_that_it_was_made_of():
    sona = loop(encoder=(words := Words()))
    assert sona.config == config()
    assert sona.encoder is words
    assert sona.lora.config == sona.config.learner
    assert sona.adapter().config == sona.lora.config
    assert sona.consolidated().config == sona.lora.config
    assert sona.modules() == ["q_proj"]
    assert sona.stats().instant_count == 0


def test_a_learner_is_gone_on_with():
    lora = ml.MicroLoRA(ml.LoraConfig(rank=3, target_modules=["v_proj"]), dims={"v_proj": (12, 7)}, seed=5)
    sona = SonaLoop(lora=lora)
    assert sona.lora is lora
    assert dict(sona.config.dims) == {"v_proj": (12, 7)}
    assert sona.config.lora == lora.config
    named = ml.MicroLoRA(lora.config.replace(name="mine"), dims={"v_proj": (12, 7)})
    assert SonaLoop(SonaConfig(lora=lora.config), lora=named).lora is named
    with pytest.raises(ex.ConfigError, match="rank 3 beside 8"):
        SonaLoop(SonaConfig(), lora=lora)
    with pytest.raises(ex.ConfigError, match=r"'v_proj': \(12, 7\).*expected"):
        SonaLoop(SonaConfig(lora=lora.config, hidden_dim=12), lora=lora)
    with pytest.raises(ex.ConfigError, match="mu"):
        SonaLoop(SonaConfig(lora=lora.config, instant_lr=0.25), lora=lora)


def test_widths_come_from_the_encoders_where_nothing_else_says():
    sona = SonaLoop(SonaConfig(), encoder=Words(16))
    assert dict(sona.config.dims) == {"q_proj": (16, 16), "v_proj": (16, 16)}
    sona = SonaLoop(SonaConfig(), encoder=Words(16), response_encoder=Words(9))
    assert dict(sona.config.dims) == {"q_proj": (16, 9), "v_proj": (16, 9)}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ex.ConfigError, "config: got neither hidden_dim nor dims"),
        ({"config": {"rank": 3}}, ex.DTypeError, "config: got dict, expected a SonaConfig"),
        ({"lora": 3}, ex.DTypeError, "lora: got int"),
        ({"config": config(), "encoder": 3}, ex.DTypeError, "encoder: got int, expected a TextEncoder"),
        ({"config": config(), "encoder": Words(5)}, ex.ShapeError, "encoder: got vectors of 5 features"),
        (
            {"config": config(), "encoder": Words(), "response_encoder": Words(5)},
            ex.ShapeError,
            "response_encoder: got vectors of 5 features, expected out_features of a module (q_proj",
        ),
        (
            {"config": config(), "response_encoder": Words()},
            ex.ConfigError,
            "encoder: got None with a response",
        ),
        ({"config": config(), "on_event": 3}, ex.DTypeError, "on_event: got int"),
    ],
)
def test_what_cannot_be_made_is_refused(arguments, error, message):
    with pytest.raises(error) as caught:
        SonaLoop(**arguments)
    assert message in str(caught.value)


# -- texts --


def test_a_response_is_rewarded_by_its_quality():
    words = Words()
    texts, vectors = loop(encoder=words), loop()
    x, e = ml.encoders.encode_checked(words, ["how?", "like this"])
    for quality in (0.9, 0.2, 0.7):
        a = texts.instant_adapt("how?", "like this", quality)
        b = vectors.instant_adapt(x, ml.Reward(quality, e), quality)
        assert a.applied == b.applied
        assert a.loss_after == b.loss_after
    assert (texts.lora["q_proj"].lora_b == vectors.lora["q_proj"].lora_b).all()
    assert texts.stats().accumulated_quality == pytest.approx(1.8)


def test_a_target_is_imitated_on_top_of_the_embedding():
    words = Words()
    sona = loop(encoder=words)
    (x,) = ml.encoders.encode_checked(words, ["how?"])
    t = normal(rng(3), WIDTH)
    for _ in range(30):
        sona.instant_adapt("how?", ml.Target(t))
    close(sona.embed("how?"), t, rtol=0.1, atol=0.1)
    close(sona.embed("how?"), x + sona.forward(x), rtol=1e-6, atol=1e-6)
    assert sona.embed(["how?", "what?"], "q_proj").shape == (2, WIDTH)


def test_a_response_encoder_of_its_own():
    words, others = Words(), Words(5)
    lora = ml.LoraConfig(rank=4, target_modules=["q_proj"])
    sona = loop(words, others, lora_config=lora, hidden_dim=None, dims={"q_proj": (WIDTH, 5)})
    assert sona.instant_adapt("how?", "like this", 0.8).applied
    assert words.asked == ["how?"]
    assert others.asked == ["like this"]
    with pytest.raises(ex.ShapeError):
        sona.embed("how?")


def untouched(sona):
    stats = sona.stats()
    return stats.instant_count, stats.instant_applied, stats.accumulated_quality, sona.lora.version


BAD_TEXTS = [
    (("", "good", 0.5), ex.ConfigError, "query: got ''"),
    ((" \n", "good", 0.5), ex.ConfigError, "query: got ' \\n'"),
    (("how?", "", 0.5), ex.ConfigError, "response: got ''"),
    (("how?", "good", None), ex.FeedbackError, "quality: got None with a response"),
    (("how?", "good", float("nan")), ex.NonFiniteError, "quality: got NaN"),
    (("how?", "good", 1.5), ex.FeedbackError, "quality: got 1.5"),
    (("how?", "good", -0.5), ex.FeedbackError, "quality: got -0.5"),
    (("how?", 3, 0.5), ex.DTypeError, "response: got int"),
    (("how?", ml.Target(np.ones(WIDTH, np.float32)), float("nan")), ex.NonFiniteError, "quality: got NaN"),
]


@pytest.mark.parametrize(("event", "error", "message"), BAD_TEXTS)
def test_bad_texts_are_refused_before_an_encoder_is_asked(event, error, message):
    words = Words()
    sona = loop(encoder=words)
    before = untouched(sona)
    with pytest.raises(error) as caught:
        sona.instant_adapt(*event)
    assert message in str(caught.value)
    assert words.asked == []
    assert untouched(sona) == before


class Broken(Words):
    def __init__(self, what):
        super().__init__()
        self.what = what

    def encode(self, texts):
        return self.what(texts)


def raises(texts):
    raise OSError("the model is gone")


BROKEN = [
    (raises, ex.EncoderError, "encoder 'words' raised OSError: the model is gone"),
    (lambda texts: np.zeros((len(texts), 5), np.float32), ex.ShapeError, "gave shape"),
    (lambda texts: np.full((len(texts), WIDTH), np.nan, np.float32), ex.NonFiniteError, "NaN"),
    (lambda texts: "text", ex.ConfigError, "gave str"),
    (lambda texts: np.zeros((len(texts), WIDTH), np.float32), ex.FeedbackError, "maps to zero"),
]


@pytest.mark.parametrize(("what", "error", "message"), BROKEN)
def test_an_encoder_that_fails_changes_nothing(what, error, message):
    sona = loop(encoder=Broken(what))
    before = untouched(sona)
    with pytest.raises(error) as caught:
        sona.instant_adapt("how?", "like this", 0.5)
    assert message in str(caught.value)
    assert untouched(sona) == before
    feed(sona, 3)
    assert sona.stats().instant_count == 3


def test_the_cause_of_an_encoders_error_is_kept():
    with pytest.raises(ex.EncoderError) as caught:
        loop(encoder=Broken(raises)).instant_adapt("how?", "like this", 0.5)
    assert isinstance(caught.value.__cause__, OSError)


def test_texts_need_an_encoder():
    sona = loop()
    with pytest.raises(ex.ConfigError, match="there is no encoder"):
        sona.instant_adapt("how?", "like this", 0.5)
    with pytest.raises(ex.ConfigError, match="there is no encoder"):
        sona.embed("how?")
    with pytest.raises(ex.ConfigError, match="text: got none"):
        loop(encoder=Words()).embed([])


# -- who is told --


def test_the_hook_hears_of_every_loop_and_cannot_stop_one(caplog):
    heard = []

    def hook(result):
        heard.append(result.loop_type)
        raise RuntimeError("hook")

    sona = loop(on_event=hook)
    feed(sona, 3)
    sona.maybe_background(force=True)
    assert heard == ["instant"] * 3 + ["background"]
    assert "on_event failed" in caplog.text
    sona.on_event = None
    feed(sona, 2)
    assert len(heard) == 4
    with pytest.raises(ex.DTypeError, match="on_event"):
        sona.on_event = 3


def test_without_listeners_an_event_is_the_cores_own():
    assert "instant_adapt" not in vars(loop())
    assert SonaLoop.instant_adapt is ml._core.Sona.instant_adapt


def test_texts_are_told_of_once():
    heard = []
    sona = loop(encoder=Words(), on_event=heard.append)
    sona.instant_adapt("how?", "like this", 0.8)
    assert len(heard) == 1


def test_subscribers_of_the_manager_hear_of_accepted_versions():
    sona, heard = loop(), []
    sona.manager.subscribe(lambda old, new: heard.append((old, new)))
    for seed in range(3):
        feed(sona, 60, seed)
        assert sona.maybe_background(force=True).applied
    assert heard == [(1, 2), (2, 3), (3, 4)]


# -- values --


def test_repr_has_sizes_and_state():
    text = repr(loop())
    assert text.startswith("SonaLoop(q_proj; 288 parameters, ")
    assert text.endswith("version 0, ewc_merge, not running)")


@pytest.mark.parametrize("take", [pickle.dumps, copy.copy, copy.deepcopy])
def test_it_is_no_value(take):
    with pytest.raises(ex.DTypeError, match="save"):
        take(loop())


def test_a_loop_is_collected_when_nobody_holds_it():
    sona = loop(encoder=Words())
    feed(sona, 5)
    ref = weakref.ref(sona)
    del sona
    assert ref() is None
    observed = loop(on_event=lambda result: None)
    ref = weakref.ref(observed)
    del observed
    gc.collect()
    assert ref() is None


def test_not_due_is_none():
    sona = loop(background_min_samples=10, gate_min_samples=1)
    feed(sona, 9)
    assert sona.maybe_background() is None
    x, t = stream(3, 5)
    for row, target in zip(x, t, strict=True):
        sona.instant_adapt(row, ml.Target(target))
    assert sona.maybe_background() is not None
