"""Values and learners: snapshots, pickles, copies, equality, and bytes that are taken whole or refused."""

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import microlora as ml
from microlora.exceptions import DTypeError, FormatError, ShapeError, UnknownModuleError
from support import DTYPES, KINDS, feedback_kinds, make, normal, rng, set_weights, state_of

OPERATIONS = (
    *(f"instant {k}" for k in KINDS),
    *(f"adapt {k}" for k in KINDS),
    "apply",
    "clipped apply",
    "basis",
)


def run(lora, operations, r):
    """A sequence of operations; returns everything that they gave."""
    seen = []
    for name in operations:
        what, _, kind = name.partition(" ")
        module = "ab"[r.integers(2)]
        x, base, fb = normal(r, 12), normal(r, 9), feedback_kinds(r, 9)
        if what in ("instant", "adapt"):
            seen.append(getattr(lora, what)(x, fb[kind], module, base=base))
        elif what == "basis":
            inputs = normal(r, 40, 12)
            if not lora[module].lora_b.any() and not lora[module].pending:
                seen.append(lora.fit_input_basis(inputs, module))
        else:
            seen.append(lora.apply_updates(0.1, *([1.0] if what == "clipped" else [])))
        seen += [lora.forward(x, m).tobytes() for m in "ab"]
    return [
        (v.rule, v.loss_before, v.loss_after, v.step) if isinstance(v, ml.StepResult) else v for v in seen
    ]


configs = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(DTYPES),
        "dropout": st.sampled_from([0.0, 0.3]),
        "learned": st.booleans(),
        "instant": st.builds(
            ml.InstantConfig,
            rule=st.sampled_from(["auto", "nlms"]),
            train=st.sampled_from(["b", "both"]),
            forgetting=st.sampled_from([1.0, 0.95]),
        ),
    }
)
operations = st.lists(st.sampled_from(OPERATIONS), max_size=8)


@given(seed=st.integers(0, 9999), config=configs, before=operations, between=operations, after=operations)
def test_restore_gives_bit_identical_outputs_and_later_learning(seed, config, before, between, after):
    lora = make(12, 9, 3, names=("a", "b"), seed=seed, **config)
    run(lora, before, rng(seed))
    snapshot = lora.snapshot()
    frozen = snapshot.to_bytes()
    want = run(lora, after, rng(seed + 1))
    end = lora.snapshot().to_bytes()
    counters = lora.counters
    ways = {
        "restore": snapshot,
        "pickle": pickle.loads(pickle.dumps(snapshot)),
        "bytes": ml.Snapshot(frozen),
    }
    for way, source in ways.items():
        run(lora, between, rng(seed + 2))
        version = lora.version
        lora.restore(source)
        assert lora.version > version
        assert run(lora, after, rng(seed + 1)) == want, way
        assert lora.counters == counters
    assert snapshot.to_bytes() == frozen, "learning changed a snapshot"
    fresh = make(12, 9, 3, names=("a", "b"), seed=seed + 1, **config)
    fresh.restore(snapshot)
    twin = pickle.loads(pickle.dumps(fresh))
    for other in (fresh, twin, fresh.copy() if fresh.version else fresh):
        if other is fresh:
            continue
        assert run(other, after, rng(seed + 1)) == want
    assert run(fresh, after, rng(seed + 1)) == want
    versionless = lambda data: data.split(b'"rng"')[-1]  # noqa: E731
    assert versionless(fresh.snapshot().to_bytes()) == versionless(end)


@given(seed=st.integers(0, 9999), before=operations, after=operations)
def test_restore_of_a_plain_adapter_starts_the_learner_afresh(seed, before, after):
    lora = make(12, 9, 3, names=("a", "b"), seed=seed)
    run(lora, before, rng(seed))
    value = lora.adapter()
    lora.restore(value)
    assert lora.adapter() == value
    assert [lora[m].pending for m in "ab"] == [0, 0]
    assert [lora[m].ridge for m in "ab"] == [None, None]
    fresh = ml.MicroLoRA(value, seed=seed)
    assert run(lora, after, rng(1)) == run(fresh, after, rng(1))


def test_a_narrow_adapter_loses_its_master_but_a_snapshot_keeps_it():
    r = rng(1)
    lora = make(16, 8, 3, dtype="bf16")
    for _ in range(5):
        lora.instant(normal(r, 16), ml.Target(normal(r, 8)), "m")
    kept, lost = ml.MicroLoRA(lora.adapter()), ml.MicroLoRA(lora.adapter())
    kept.restore(lora.snapshot())
    event = normal(r, 16), ml.Target(normal(r, 8)), "m"
    for learner in (lora, kept, lost):
        learner.instant(*event)
    np.testing.assert_array_equal(lora["m"].raw()[1], kept["m"].raw()[1])
    assert (lora["m"].raw()[1] != lost["m"].raw()[1]).any()


def test_a_snapshot_says_when_it_was_taken_and_costs_nothing_until_the_next_step():
    lora, r = make(16, 8, 3), rng(1)
    lora.instant(normal(r, 16), ml.Target(normal(r, 8)), "m")
    snapshot = lora.snapshot()
    assert snapshot.version == lora.version == 2
    before = snapshot.lora_b("m").copy()
    lora.instant(normal(r, 16), ml.Target(normal(r, 8)), "m")
    np.testing.assert_array_equal(snapshot.lora_b("m"), before)
    assert isinstance(snapshot, ml.Adapter)
    assert snapshot.config == lora.config


# -- pickling, equality, hashing --


def test_everything_pickles_by_its_content():
    r = rng(1)
    lora = make(12, 9, 3, name="mine", tags=["x"])
    lora.metadata = ml.AdapterMetadata(name="mine", base_model="tiny", training_size=7)
    result = lora.instant(normal(r, 12), ml.Target(normal(r, 9)), "m")
    skipped = lora.instant(np.zeros(12), ml.Target(normal(r, 9)), "m")
    values = [result, skipped, lora.adapter(), lora.snapshot(), *feedback_kinds(r, 9).values(), lora.config]
    for value in values:
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
            other = pickle.loads(pickle.dumps(value, protocol))
            assert type(other) is type(value)
            assert other == value
            assert (other != value) is False
            assert repr(other) == repr(value)
    lora.enabled = False
    other = pickle.loads(pickle.dumps(lora))
    assert (other.config, other.metadata, other.enabled) == (lora.config, lora.metadata, False)
    assert other.adapter() == lora.adapter()
    assert other.device == "cpu"


@given(seed=st.integers(0, 9999))
def test_feedback_is_bit_identical_after_a_pickle(seed):
    """Directions are normalised when made; making them again must not move them."""
    r = rng(seed)
    for fb in feedback_kinds(r, int(r.integers(1, 30))).values():
        assert pickle.loads(pickle.dumps(fb)) == fb


def test_feedback_shows_what_it_was_made_from():
    r = rng(1)
    e, n = normal(r, 5), normal(r, 3, 5)
    unit = lambda v: v / np.linalg.norm(v, axis=-1, keepdims=True)  # noqa: E731
    t = ml.Target(e)
    np.testing.assert_array_equal(t.t, e)
    assert (t.loss, t.width, ml.Target(e, "cosine").loss) == ("mse", 5, "cosine")
    np.testing.assert_array_equal(ml.Gradient(e).g, e)
    reward = ml.Reward(0.5, e)
    assert reward.r == 0.5
    np.testing.assert_allclose(reward.response, unit(e), rtol=1e-6)
    p = ml.Preference(e, n[0], p=0.75, beta=8.0)
    assert (p.p, p.beta) == (0.75, 8.0)
    np.testing.assert_allclose(p.chosen, unit(e), rtol=1e-6)
    np.testing.assert_allclose(p.rejected, unit(n[0]), rtol=1e-6)
    c = ml.Contrastive(e, n, tau=0.5)
    assert c.tau == 0.5
    np.testing.assert_allclose(c.positive, unit(e), rtol=1e-6)
    np.testing.assert_allclose(c.negatives, unit(n), rtol=1e-6)
    assert not t.t.flags.writeable
    assert ml.Contrastive(e, n[0]).negatives.shape == (1, 5)


def test_adapters_are_equal_and_hash_by_content():
    one, two = make(12, 9, 3, seed=1), make(12, 9, 3, seed=1)
    assert one.adapter() == two.adapter()
    assert hash(one.adapter()) == hash(two.adapter())
    assert len({one.adapter(), two.adapter(), make(12, 9, 3, seed=2).adapter()}) == 2
    assert one.adapter() != one.adapter().with_metadata(ml.AdapterMetadata(name="other"))
    assert one.adapter() != make(12, 9, 3, seed=1, alpha=1.0).adapter()
    assert one.adapter() != "x"
    assert one.snapshot() == two.snapshot()
    assert hash(one.snapshot()) == hash(two.snapshot())
    assert one.snapshot() != one.adapter()
    assert one.adapter() != one.snapshot()
    x = normal(rng(), 12)
    one.instant(np.zeros(12), ml.Target(normal(rng(), 9)), "m")
    assert one.adapter() == two.adapter()
    two.instant(x, ml.Target(normal(rng(), 9)), "m")
    assert one.adapter() != two.adapter()


def test_a_learner_is_not_hashable():
    with pytest.raises(TypeError, match="changes as it learns"):
        hash(make())


@pytest.mark.parametrize("how", ["copy", "copy.copy", "pickle"])
def test_a_copy_is_independent(how):
    lora, r = make(12, 9, 3), rng(1)
    lora.instant(normal(r, 12), ml.Target(normal(r, 9)), "m")
    lora.enabled = False
    make_copy = {
        "copy": lambda v: v.copy(),
        "copy.copy": copy.copy,
        "pickle": lambda v: pickle.loads(pickle.dumps(v)),
    }
    other = make_copy[how](lora)
    assert type(other) is type(lora)
    assert (other.adapter(), other.config, other.enabled) == (lora.adapter(), lora.config, False)
    before = state_of(lora)
    other.instant(normal(r, 12), ml.Target(normal(r, 9)), "m")
    other.enabled = True
    assert state_of(lora) == before
    assert other.adapter() != lora.adapter()


def test_values_describe_themselves_with_sizes():
    lora = make(16, 32, 4, names=("a", "b", "c", "d", "e"))
    assert "960 parameters" in repr(lora)
    assert f"{lora.memory_bytes:,} bytes" in repr(lora)
    assert repr(lora.adapter()).startswith("Adapter(a, b, c, d, ... (5 modules); 960 parameters")
    assert repr(lora.snapshot()).startswith("Snapshot(")
    info = lora.adapter().info("a")
    assert info == (16, 32, 4, 8.0, False, "f32", "f32")
    assert info.scaling == 2.0
    assert lora.adapter().dims["e"] == (16, 32)
    with pytest.raises(UnknownModuleError, match="expected one of a, b"):
        lora.adapter().info("z")


# -- bytes --


@pytest.mark.parametrize("dtype", DTYPES)
def test_exported_weights_come_back_whole(dtype):
    one, two = make(12, 9, 3, dtype=dtype, seed=1), make(12, 9, 3, dtype=dtype, seed=2)
    two.instant(normal(rng(), 12), ml.Target(normal(rng(), 9)), "m")
    two.import_weights(one.export_weights())
    for got, want in zip(two["m"].raw(), one["m"].raw(), strict=True):
        np.testing.assert_array_equal(got, want)
    assert two["m"].ridge is None
    assert two.export_weights() == one.export_weights()


def test_weights_that_do_not_fit_are_refused():
    lora = make(12, 9, 3)
    data = lora.export_weights()
    others = {
        "width": make(13, 9, 3),
        "output": make(12, 10, 3),
        "rank": make(12, 9, 4),
        "alpha": make(12, 9, 3, alpha=1.0),
        "rslora": make(12, 9, 3, use_rslora=True),
        "dtype": make(12, 9, 3, dtype="f16"),
        "name": make(12, 9, 3, names=("n",)),
        "more": make(12, 9, 3, names=("m", "n")),
    }
    before = state_of(lora)
    for what, other in others.items():
        for call in (lora.import_weights, lora.restore):
            source = other.export_weights() if call == lora.import_weights else other.snapshot()
            with pytest.raises(ml.MicroLoraError) as e:
                call(source)
            assert "got" in str(e.value), what
    for cut in [b"", data[:4], data[:40], data[:-1], data + b"x", b"\0" * 64, data[::-1]]:
        with pytest.raises(FormatError, match="bytes"):
            lora.import_weights(cut)
    for wrong in (None, "x", bytearray(data), 3):
        with pytest.raises(DTypeError, match=r"data: got .*expected bytes"):
            lora.import_weights(wrong)
        with pytest.raises(DTypeError, match=r"source: got .*expected a Snapshot or an Adapter"):
            lora.restore(wrong)
    assert state_of(lora) == before
    with pytest.raises(ShapeError, match="m: got shape 13 -> 9"):
        lora.restore(others["width"].adapter())


@given(seed=st.integers(0, 9999))
def test_damaged_snapshot_bytes_are_refused_or_harmless(seed):
    r = rng(seed)
    lora = make(6, 5, 2, dtype="f16")
    lora.instant(normal(r, 6), ml.Target(normal(r, 5)), "m")
    lora.adapt(normal(r, 6), ml.Target(normal(r, 5)), "m")
    data = bytearray(lora.snapshot().to_bytes())
    for at in r.integers(0, len(data), 3):
        data[at] ^= int(r.integers(1, 256))
    before = state_of(lora)
    try:
        lora.restore(ml.Snapshot(bytes(data)))
    except ml.MicroLoraError:
        assert state_of(lora) == before
    assert np.isfinite(lora.forward(normal(r, 6), "m")).all()


def test_a_snapshot_needs_learner_state():
    lora = make(6, 5, 2)
    with pytest.raises(FormatError, match="no learner state"):
        ml.Snapshot(lora.export_weights())
    for cls in (ml.Adapter, ml.Snapshot):
        for wrong in (None, 3, "x", lora):
            with pytest.raises(DTypeError, match=r"source: got .*, expected an? \w+ or its bytes"):
                cls(wrong)


def test_restoring_does_not_touch_the_switch():
    lora = make(6, 5, 2)
    snapshot = lora.snapshot()
    lora.enabled = False
    lora.restore(snapshot)
    assert lora.enabled is False
    set_weights(lora, {"m": (lora["m"].lora_a, lora["m"].lora_b)})
    assert lora.enabled is False
