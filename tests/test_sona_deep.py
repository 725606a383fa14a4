"""The deep loop: what it trains on, what it leaves alone, the gate, the penalty, cancelling, distilling."""

import json
import threading

import numpy as np
import pytest

import microlora as ml
from microlora import exceptions as ex
from microlora.sona import DeepResult, distil, gather
from microlora.training import AdapterTrainingConfig, TrainingConfig
from microlora.training.events_in import InEvent
from sona_support import WIDTH, Words, feed, loop, stream
from support import close, normal, rng

QUICK = AdapterTrainingConfig(epochs=4, training=TrainingConfig(learning_rate=0.02))


def weights(sona):
    return sona.lora["q_proj"].lora_a.copy(), sona.lora["q_proj"].lora_b.copy()


def state(sona):
    return (*(w.tobytes() for w in weights(sona)), sona.lora.version, sona._fisher, sona.manager.generation)


def narrow(**changes):
    """A loop whose rank cannot hold the stream with the A that was drawn."""
    lora = ml.LoraConfig(rank=2, alpha=4.0, target_modules=["q_proj"])
    return loop(lora_config=lora, training=QUICK, **changes)


def test_training_moves_a_and_lowers_the_held_out_loss():
    sona = narrow()
    feed(sona, 300)
    sona.maybe_background(force=True)
    a, _ = weights(sona)
    before = sona.evaluate()
    heard = []
    sona.on_event = heard.append
    result = sona.deep_optimize()
    assert isinstance(result, DeepResult)
    assert result.applied
    assert result.loop_type == "deep"
    assert heard == [result]
    assert result.outcome == "accepted"
    assert not np.array_equal(weights(sona)[0], a)
    assert result.loss_before == pytest.approx(before)
    assert sona.evaluate() == pytest.approx(result.loss_after)
    assert result.loss_after < 0.8 * before
    assert result.quality_delta == pytest.approx(result.loss_before - result.loss_after)
    assert result.latency_us > 0
    assert result.version == sona.lora.version
    assert sona.stats().deep_count == 1
    assert json.loads(json.dumps(result.to_dict()))["training"]["stop_reason"] == result.training.stop_reason
    close(sona.manager.active.lora_a("q_proj"), sona.adapter().lora_a("q_proj"), rtol=0)


def test_it_asks_for_training_when_enough_quality_has_come():
    sona = loop(deep_trigger_threshold=5.0, training=QUICK)
    feed(sona, 9, quality=0.6)
    assert sona.stats().accumulated_quality == pytest.approx(5.4)
    assert sona.should_trigger_deep()
    feed(sona, 60, quality=1.0, seed=1)
    assert sona.deep_optimize().applied
    assert not sona.should_trigger_deep()
    feed(sona, 4, seed=2, quality=1.0)
    assert not sona.should_trigger_deep()


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_no_held_out_sample_is_ever_trained_on(monkeypatch, dtype):
    sona = loop(training=QUICK, reservoir_dtype=dtype)
    x, t = feed(sona, 200)
    sona.maybe_background(force=True)
    half = lambda x: x.astype(np.float16).tobytes()  # noqa: E731
    held = {half(x) for _, x, *_ in sona.samples(True)}
    assert len(held) == 20
    seen = []
    real = gather.rows
    monkeypatch.setattr("microlora.sona.deep.rows", lambda events: seen.extend(events) or real(events))
    # The user gives the stream again, and with it what the gate measures with.
    result = sona.deep_optimize((x, t))
    assert len(seen) == 180
    assert {half(e.x) for e in seen} & held == set()
    assert "20 samples left out: equal to a held-out sample of the gate" in result.notes
    assert "180 samples left out: remembered as well as given" in result.notes


def test_early_stopping_looks_at_a_tenth_that_is_not_trained_on():
    r = rng(4)
    events = [InEvent(normal(r, 3), ml.Target(normal(r, 2))) for _ in range(50)]
    events += events[:25]
    train, held = gather.split(events, seed=3, run=0)
    assert len(train) + len(held) == 75
    assert len({gather.key(e) for e in held}) == 5
    assert {gather.key(e) for e in train} & {gather.key(e) for e in held} == set()
    assert [e.x.tolist() for e in gather.split(events, 3, 0)[1]] == [e.x.tolist() for e in held]
    assert [e.x.tolist() for e in gather.split(events, 3, 1)[1]] != [e.x.tolist() for e in held]
    assert gather.split(events[:9], 0, 0) == (events[:9], [])
    bare = [InEvent(normal(r, 3), ml.Gradient(normal(r, 2))) for _ in range(50)]
    assert gather.split(bare, 0, 0) == (bare, [])


def test_training_stops_early():
    patient = AdapterTrainingConfig(
        epochs=50, early_stopping_patience=2, training=TrainingConfig(learning_rate=0.5)
    )
    sona = loop(training=patient, holdout=0.0)
    x = normal(rng(1), 200, WIDTH)
    noise = normal(rng(2), 200, WIDTH)
    for row, target in zip(x, noise, strict=True):
        sona.instant_adapt(row, ml.Target(target))
    result = sona.deep_optimize()
    assert result.training.stop_reason == "early_stopping"
    assert result.training.epochs_completed < 50
    assert len(result.training.history.val_losses) >= 3


def test_a_result_that_raises_the_held_out_loss_is_refused(caplog):
    sona = loop(training=QUICK, holdout=0.2)
    feed(sona, 400)
    sona.maybe_background(force=True)
    before = state(sona)
    x, t = stream(600, 7)
    result = sona.deep_optimize((x, -30.0 * t))
    assert (result.applied, result.outcome, result.quality_delta) == (False, "kept", 0.0)
    assert result.loss_after == result.loss_before
    assert any(note.startswith("refused") for note in result.notes)
    assert state(sona) == before
    assert any(r.name == "microlora.sona.deep" and r.levelname == "WARNING" for r in caplog.records)


def test_cancelling_leaves_everything_as_it_was():
    sona = loop(training=QUICK)
    feed(sona, 200)
    sona.maybe_background(force=True)
    before, stats = state(sona), sona.stats()
    token = ml.CancelToken()
    seen = []

    def progress(done, total, message):
        seen.append(done)
        if len(seen) == 2:
            token.cancel()

    with pytest.raises(ex.CancelledError, match="nothing changed"):
        sona.deep_optimize(progress=progress, cancel=token)
    assert len(seen) >= 2
    assert state(sona) == before
    assert sona.stats() == stats or str(sona.stats()) == str(stats)
    with pytest.raises(ex.CancelledError, match="nothing changed"):
        sona.deep_optimize(cancel=token)
    assert sona.deep_optimize().applied


def test_one_run_at_a_time():
    sona = loop(training=QUICK)
    feed(sona, 100)
    inside, go = threading.Event(), threading.Event()
    done = []

    def progress(*_):
        inside.set()
        go.wait(20)

    thread = threading.Thread(target=lambda: done.append(sona.deep_optimize(progress=progress)))
    thread.start()
    assert inside.wait(20)
    with pytest.raises(ex.SwapError, match="under way"):
        sona.deep_optimize()
    go.set()
    thread.join()
    assert done[0].loop_type == "deep"
    assert sona.deep_optimize().loop_type == "deep"


BAD = [
    ({"samples": 3}, ex.DTypeError, "samples: got int"),
    ({"samples": [(np.ones(WIDTH), 3)]}, ex.DTypeError, "samples[0]"),
    ({"samples": [(np.ones(5, np.float32), ml.Target(np.ones(4, np.float32)))]}, ex.ShapeError, "5 -> 4"),
    ({"samples": [ml.TrainingSample(query="how?", response="so")]}, ex.ConfigError, "no encoder"),
    ({"distill": 1}, ex.ConfigError, "distill: got 1"),
    ({"distill": True}, ex.ConfigError, "distill: got True with consolidation 'ewc_merge'"),
    ({"cancel": 3}, ex.DTypeError, "cancel: got int"),
    ({"base": "output"}, ex.ConfigError, "base: got 'output'"),
    (
        {"samples": (np.full((3, WIDTH), np.nan, np.float32), np.ones((3, WIDTH), np.float32))},
        ex.NonFiniteError,
        "",
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_what_cannot_be_trained_is_refused(options, error, message):
    sona = loop(training=QUICK)
    feed(sona, 30)
    sona.maybe_background(force=True)
    before = state(sona)
    with pytest.raises(error) as caught:
        sona.deep_optimize(**options)
    assert message in str(caught.value)
    assert state(sona) == before
    assert sona.deep_optimize().loop_type == "deep"


def test_nothing_remembered_and_nothing_given():
    with pytest.raises(ex.ConfigError, match="none is remembered"):
        loop().deep_optimize()


def test_samples_of_every_form_give_the_same_events():
    sona = loop()
    x, t = stream(4)
    samples = [ml.TrainingSample(a, b) for a, b in zip(x, t, strict=True)]
    forms = [
        (x, t),
        (x, t, np.ones(4, np.float32)),
        samples,
        ml.AdapterDataset(samples),
        [(a, ml.Target(b)) for a, b in zip(x, t, strict=True)],
    ]
    for form in forms:
        events = gather.gather(sona, form, None).events
        assert [(e.x.tolist(), e.feedback, e.base, e.weight) for e in events] == [
            (a.tolist(), ml.Target(b), None, 1.0) for a, b in zip(x, t, strict=True)
        ]
    events = gather.gather(sona, (x, t), "input").events
    assert all(np.array_equal(e.base, e.x) for e in events)


def test_quality_weighs_targets_and_drops_those_below_the_threshold():
    sona = loop(quality_threshold=0.6)
    x, t = stream(3)
    samples = [ml.TrainingSample(a, b, q) for a, b, q in zip(x, t, (0.5, 0.6, 0.8), strict=True)]
    found = gather.gather(sona, samples, None)
    assert found.low == 2
    assert [e.weight for e in found.events] == [pytest.approx(0.5)]


def test_texts_are_encoded_and_stand_on_their_embedding():
    words = Words()
    sona = loop(encoder=words)
    x, e = ml.encoders.encode_checked(words, ["how?", "so"])
    (event,) = gather.gather(sona, [ml.TrainingSample(query="how?", response="so")], None).events
    close(event.x, x, rtol=0)
    close(event.base, x, rtol=0)
    assert event.feedback == ml.Target(e)


def test_arrays_where_all_are_plain_targets_and_samples_elsewhere():
    x, t = stream(6)
    base = normal(rng(5), 6, WIDTH)
    events = [InEvent(a, ml.Target(b), None, c) for a, b, c in zip(x, t, base, strict=True)]
    rows = gather.rows(events)
    close(rows.arrays[1], t - base, rtol=0, atol=0)
    assert rows.weights is None
    assert gather.rows([e._replace(weight=0.5) for e in events]).weights.tolist() == [0.5] * 6
    assert gather.rows([e._replace(module="q_proj") for e in events]).module == "q_proj"
    mixed = gather.rows([*events, InEvent(x[0], ml.Target(t[0], loss="cosine"), None, base[0])])
    assert mixed.events[0].base is not None
    assert len(mixed) == 7


def test_both_ways_to_the_trainer_learn_the_same():
    plain, mixed = loop(training=QUICK, holdout=0.0), loop(training=QUICK, holdout=0.0)
    x, t = stream(40)
    base = normal(rng(5), 40, WIDTH)
    for sona in (plain, mixed):
        for a, b, c in zip(x, t, base, strict=True):
            sona.instant_adapt(a, ml.Target(b), base=c)
    plain.deep_optimize()
    # A weightless bystander takes the whole run through the other way.
    one = gather.rows
    try:
        import microlora.sona.deep as deep
        from microlora.training.rows import rows_of_events

        deep.rows = lambda events: rows_of_events(events, 0.0)
        mixed.deep_optimize()
    finally:
        deep.rows = one
    close(weights(plain)[1], weights(mixed)[1], rtol=1e-3, atol=1e-4)


def test_the_penalty_of_earlier_runs_holds_what_they_learned():
    def forgetting(ewc_lambda):
        sona = loop(training=QUICK, ewc_lambda=ewc_lambda, holdout=0.0, seed=1)
        x, t = stream(200, 1)
        sona.deep_optimize((x, t))
        before = ((sona.forward(x) - t) ** 2).sum(1).mean()
        other, wanted = stream(200, 2)
        sona.deep_optimize((other, -wanted))
        return ((sona.forward(x) - t) ** 2).sum(1).mean() - before

    free, held = forgetting(0.0), forgetting(30.0)
    assert held < 0.5 * free


def test_no_penalty_is_kept_where_it_is_off_or_the_run_was_refused():
    off, on = loop(training=QUICK, ewc_lambda=0.0), loop(training=QUICK, holdout=0.2)
    for sona in (off, on):
        feed(sona, 200)
        assert sona.deep_optimize().applied
    assert off._fisher is None
    kept = on._fisher
    assert kept is not None
    x, t = stream(600, 7)
    assert not on.deep_optimize((x, -30.0 * t)).applied
    assert on._fisher == kept


# -- distilling --


def grown(hard=False):
    """A loop with two members, one for each of two kinds of inputs."""
    sona = loop(consolidation="ensemble", ensemble_hard=hard, warmup_inputs=20, training=QUICK)
    r = rng(11)
    centres = 3.0 * normal(r, 2, WIDTH)
    maps = [normal(r, WIDTH, WIDTH) / WIDTH for _ in range(2)]
    for i in range(600):
        x = centres[i % 2] + normal(r, WIDTH)
        sona.instant_adapt(x, ml.Target(x @ maps[i % 2]))
        if i % 50 == 49:
            sona.maybe_background(force=True)
    assert len(sona.ensemble()) == 2
    return sona


@pytest.mark.parametrize("hard", [True, False])
def test_a_student_learns_what_the_ensemble_says(monkeypatch, hard):
    sona = grown(hard)
    lessons = []
    real = gather.rows
    monkeypatch.setattr("microlora.sona.deep.rows", lambda events: lessons.extend(events) or real(events))
    before, serves = sona.evaluate(), sona.forward
    wanted = {x.tobytes(): serves(x) for _, x, *_ in sona.samples(False)}
    result = sona.deep_optimize(distill=True)
    assert {e.x.tobytes() for e in lessons} == set(wanted)
    for lesson in lessons:
        close(lesson.feedback.t, wanted[lesson.x.tobytes()], rtol=1e-6, atol=1e-6)
    assert result.ensemble_loss == pytest.approx(before, rel=1e-3)
    assert result.loss_before == pytest.approx(before, rel=1e-3)
    assert len(sona.ensemble()) == (1 if result.applied else 2)
    shown = f"ensemble of 2 {result.ensemble_loss:.6g}, one adapter {result.student_loss:.6g}"
    assert any(shown in note for note in result.notes)


def test_a_student_that_is_as_good_serves_in_its_place():
    # The gate is wide open here, so that the student's own measurement can be held against the core's.
    sona = loop(consolidation="ensemble", warmup_inputs=20, training=QUICK, gate_tolerance=1e6)
    x, t = stream(400, 5)
    for row, target in zip(x, t, strict=True):
        sona.instant_adapt(row, ml.Target(target))
    sona.maybe_background(force=True)
    sona.maybe_background(force=True)
    result = sona.deep_optimize(distill=True)
    assert result.applied
    assert len(sona.ensemble()) == 1
    assert result.student_loss == pytest.approx(sona.evaluate(), rel=1e-3)


def test_held_out_losses_are_those_of_the_float64_twin(monkeypatch):
    sona = loop()
    r = rng(6)
    x, e, other = (normal(r, 5, WIDTH) for _ in range(3))
    y = normal(r, 5, WIDTH).astype(np.float64)
    kinds = [
        ml.Target(e[0]),
        ml.Target(e[1], loss="cosine"),
        ml.Preference(e[2], other[2], beta=3.0),
        ml.Contrastive(e[3], other[:2], tau=0.5),
        ml.Reward(0.75, e[4]),
    ]
    rows = [(i, x[i], f, x[i], None, None, 1.0) for i, f in enumerate(kinds)]
    outputs = {row.tobytes(): y[i].astype(np.float32) for i, row in enumerate(x)}
    cos = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)  # noqa: E731
    full = x + y
    scores = np.array([cos(full[3], e[3]), cos(full[3], other[0]), cos(full[3], other[1])]) / 0.5
    twins = [
        0.5 * ((full[0] - e[0]) ** 2).sum(),
        1 - cos(full[1], e[1]),
        np.log1p(np.exp(-3.0 * (cos(full[2], e[2]) - cos(full[2], other[2])))),
        -scores[0] + np.log(np.exp(scores).sum()),
        0.5 * (y[4] @ (e[4] / np.linalg.norm(e[4])) - 0.0) ** 2,
    ]
    for row, twin in zip(rows, twins, strict=True):
        monkeypatch.setattr(sona, "samples", lambda held, row=row: [row] if held else [])
        (loss,), n = distil.heldout_loss(sona, [lambda x, module: outputs[x.tobytes()]])
        assert n == 1
        assert loss == pytest.approx(twin, rel=1e-4), row[2]
    monkeypatch.setattr(sona, "samples", lambda held: [])
    assert distil.heldout_loss(sona, [lambda x, module: x]) == ([], 0)
