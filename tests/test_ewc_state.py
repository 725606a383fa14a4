"""Consolidation as bytes and files, and the Grams that travel with it."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import microlora as ml
from microlora import exceptions
from support import close, make, normal, read_tensors, rng, write_tensors

KINDS = ("delta", "factor", "l2", "si", "mas")
seeds = st.integers(0, 2**32 - 1)


def worked(kind="factor", names=("q", "v"), tasks=2, seed=0, **settings):
    """A learner and a consolidation with tasks behind it and one under way."""
    r = rng(seed)
    lora = make(10, 6, 2, names=names)
    ewc = ml.EwcPlusPlus(lora, kind=kind, fisher="empirical", **settings)
    opt = ml._core.Optimizer(lora, "sgd")
    for task in range(tasks + 1):
        for m in names:
            ewc.accumulate_fisher(normal(r, 4, 10), normal(r, 4, 6), m)
            ewc.adapt(normal(r, 10), ml.Target(normal(r, 6)), m)
        opt.step(lora, 0.05, ewc=ewc)
        if task < tasks:
            ewc.start_new_task()
    return lora, ewc


def numbers(ewc):
    gradient = [v.tobytes() for pair in ewc.penalty_grad().values() for v in pair]
    return ewc.penalty(), gradient, ewc.task_count, ewc.n_samples, ewc.max_importance


# The importance of "l2" is 1, so that its normalisation is refused.
STATES = [
    (kind, settings)
    for kind in KINDS
    for settings in ({}, {"anchors": "separate"}, {"fisher_normalize": "max"})
    if (kind, "fisher_normalize" in settings) != ("l2", True)
]


@pytest.mark.parametrize(("kind", "settings"), STATES, ids=str)
def test_a_state_goes_on_bit_for_bit(kind, settings):
    lora, ewc = worked(kind, **settings)
    data = ewc.export_state()
    other = ml.EwcPlusPlus(lora, kind=kind, fisher="empirical", **settings)
    other.import_state(data)
    assert numbers(other) == numbers(ewc)
    assert other.export_state() == data
    r = rng(3)
    x, g = normal(r, 7, 10), normal(r, 7, 6)
    for one in (ewc, other):
        one.accumulate_fisher(x, g, "q")
        one.start_new_task()
    assert other.export_state() == ewc.export_state()


def test_the_header_states_the_unit():
    _, ewc = worked("delta")
    header = read_tensors(ewc.export_state())[0]["__metadata__"]
    assert header["format"] == "microlora-ewc"
    assert header["fisher"] == "per_sample_mean"
    assert (header["kind"], header["task_count"], header["n_samples"]) == ("delta", "2", "10")
    assert json.loads(header["settings"]) == ewc.settings


def test_another_learner_kind_or_version_is_refused_and_nothing_changes():
    lora, ewc = worked()
    data = ewc.export_state()
    other_names = make(10, 6, 2, names=("k", "v"))
    more = make(10, 6, 2, names=("q", "v", "k"))
    wide = make(10, 7, 2, names=("q", "v"))
    scaled = make(10, 6, 2, names=("q", "v"), alpha=9.0)
    header, tensors = read_tensors(data)

    def changed(**entries):
        meta = {**header["__metadata__"], **entries}
        return write_tensors({**header, "__metadata__": meta}, tensors)

    cases = [
        (lora, {"kind": "delta"}, data, exceptions.ConfigError),
        (lora, {"anchors": "separate"}, data, exceptions.ConfigError),
        (lora, {"fisher_normalize": "max"}, data, exceptions.ConfigError),
        (lora, {"fisher_decay": 0.9}, data, exceptions.ConfigError),
        (other_names, {}, data, exceptions.ConfigError),
        (more, {}, data, exceptions.ConfigError),
        (wide, {}, data, exceptions.ShapeError),
        (scaled, {}, data, exceptions.ShapeError),
        (lora, {}, changed(format_version="2"), exceptions.UnsupportedVariantError),
        (lora, {}, changed(format_version="x"), exceptions.FormatError),
        (lora, {}, changed(format="microlora"), exceptions.FormatError),
        (lora, {}, changed(fisher="batch_sum"), exceptions.FormatError),
        (lora, {}, changed(settings="{}"), exceptions.FormatError),
        (lora, {}, data[:-1], exceptions.FormatError),
        (lora, {}, lora.export_weights(), exceptions.FormatError),
        (lora, {}, b"", exceptions.FormatError),
        (lora, {}, bytearray(data), exceptions.DTypeError),
    ]
    for target, settings, came, error in cases:
        mine = ml.EwcPlusPlus(target, **{"kind": "factor", "fisher": "empirical", **settings})
        x = normal(rng(1), 3, target[target.modules()[0]].in_features)
        g = normal(rng(2), 3, target[target.modules()[0]].out_features)
        mine.accumulate_fisher(x, g, target.modules()[0])
        before = mine.export_state()
        with pytest.raises(error):
            mine.import_state(came)
        assert mine.export_state() == before


def test_modules_are_matched_by_name():
    _, ewc = worked(names=("q", "v"))
    turned = make(10, 6, 2, names=("v", "q"))
    other = ml.EwcPlusPlus(turned, kind="factor", fisher="empirical")
    other.import_state(ewc.export_state())
    for m in ("q", "v"):
        for a, b in zip(ewc.task_fisher(m), other.task_fisher(m), strict=True):
            assert a.tobytes() == b.tobytes()
    assert ewc.task_fisher("q")[0].tobytes() != ewc.task_fisher("v")[0].tobytes()


@given(data=st.data())
def test_broken_bytes_never_pass_and_never_crash(data):
    lora, ewc = worked("delta", names=("q",))
    good = ewc.export_state()
    raw = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw)
    mine = ml.EwcPlusPlus(lora, kind="delta", fisher="empirical")
    before = mine.export_state()
    try:
        mine.import_state(raw)
    except exceptions.MicroLoraError:
        assert mine.export_state() == before
    else:
        assert np.isfinite(mine.penalty())


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
def test_impossible_importance_is_refused(value):
    _, ewc = worked("factor", names=("q",))
    header, tensors = read_tensors(ewc.export_state())
    name = next(n for n in tensors if n.endswith("importance_a"))
    tensors[name][:4] = np.float32(value).tobytes()
    with pytest.raises(exceptions.FormatError, match="importance_a"):
        ewc.import_state(write_tensors(header, tensors))


# -- files --


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_it_travels_beside_its_adapter(tmp_path, kind):
    lora, ewc = worked("delta", names=("q_proj",), gamma=0.5)
    path = tmp_path / ("adapter" if kind == "directory" else "adapter.safetensors")
    lora.save(path)
    file = ewc.save(path)
    assert file == str(
        path / "ewc_state.safetensors" if kind == "directory" else tmp_path / "adapter.ewc.safetensors"
    )
    again = ml.MicroLoRA.load(path)
    other = ml.EwcPlusPlus.load(again, path)
    assert other.settings == ewc.settings
    assert other.export_state() == ewc.export_state()
    assert other.penalty() == ewc.penalty()
    for got, want in zip(again["q_proj"].raw(), lora["q_proj"].raw(), strict=True):
        assert got.tobytes() == want.tobytes()
    assert sorted(p.name for p in tmp_path.rglob("*.tmp")) == []
    with pytest.raises(OSError, match="nowhere"):
        ewc.save(tmp_path / "nowhere" / "a.safetensors")
    with pytest.raises(FileNotFoundError):
        ml.EwcPlusPlus.load(again, tmp_path / "other.safetensors")


# -- Grams --


@given(seed=seeds, n=st.integers(1, 600), d=st.integers(1, 40))
def test_a_whole_gram_is_numpys(seed, n, d):
    lora = make(d, 4, 1)
    x = normal(rng(seed), n, d)
    gram = ml.collect_gram(lora, x)
    want = x.astype(np.float64).T @ x / n
    close(gram.matrix(), want, 1e-6)
    close(gram.diag, np.diag(want), 1e-6)
    assert (gram.n, gram.features, gram.memory_bytes) == (n, d, 4 * d * d + 4 * d)
    cut = n // 2
    if cut:
        both = ml.collect_gram(lora, x[:cut]) + ml.collect_gram(lora, x[cut:])
        close(both.matrix(), want, 1e-6)
        assert both.n == n
    v = normal(rng(seed + 1), 3, d)
    close(gram.apply(v), v @ want, 1e-5)
    assert ml.Gram.from_bytes(gram.to_bytes()) == gram


@pytest.mark.parametrize("spectrum", ["flat", "steep"])
def test_a_low_rank_gram_keeps_its_diagonal_and_its_bound(spectrum):
    d, q, r = 2100, 8, rng(4)
    lora = make(d, 4, 1)
    mix = r.standard_normal((20, d)) * (1.0 if spectrum == "flat" else 0.5 ** np.arange(20)[:, None])
    x = (r.standard_normal((700, 20)) @ mix).astype(np.float32)
    gram = ml.collect_gram(lora, x, q=q)
    true = x.astype(np.float64).T @ x / 700
    assert gram.memory_bytes == 4 * d * (q + 1)
    close(gram.diag, np.diag(true), 1e-6)
    close(np.diag(gram.matrix()), np.diag(true), 1e-6)
    low = gram.low.astype(np.float64)
    # Nonzero eigenvalues of the residual, in the 28 dimensions where it can have any.
    basis = np.linalg.qr(np.vstack([mix, low]).T)[0]
    values = np.linalg.eigvalsh(basis.T @ (true - low.T @ low) @ basis)
    top = np.linalg.eigvalsh(basis.T @ true @ basis)
    assert values.min() >= -1e-5 * top[-1]
    assert values.max() <= gram.error_bound + 1e-5 * top[-1]
    assert gram.error_bound <= (3 * top[-q - 1] if spectrum == "steep" else top.sum())
    v = normal(r, 2, d)
    close(gram.apply(v), v @ gram.matrix().astype(np.float64), 1e-4)
    halves = ml.collect_gram(lora, x[:300], q=q) + ml.collect_gram(lora, x[300:], q=q)
    close(halves.diag, np.diag(true), 1e-6)
    both = halves.low.astype(np.float64)
    values = np.linalg.eigvalsh(basis.T @ (true - both.T @ both) @ basis)
    assert values.min() >= -1e-5 * top[-1]
    assert values.max() <= halves.error_bound + 1e-5 * top[-1]
    assert ml.Gram.from_bytes(gram.to_bytes()) == gram


def test_grams_travel_with_the_state():
    r = rng(5)
    lora, ewc = worked(names=("a/b", "a"))
    ewc.grams["a/b"] = ml.collect_gram(lora, normal(r, 30, 10), "a/b")
    ewc.grams["a"] = ml.collect_gram(lora, normal(r, 20, 10), "a")
    data = ewc.export_state()
    other = ml.EwcPlusPlus(lora, kind="factor", fisher="empirical")
    other.import_state(data)
    assert other.grams == ewc.grams
    assert other.export_state() == data
    header, tensors = read_tensors(data)
    header["__metadata__"]["note"] = "{}"
    before = other.export_state()
    with pytest.raises(exceptions.FormatError):
        other.import_state(write_tensors(header, tensors))
    assert other.export_state() == before


def test_bad_inputs_of_a_gram():
    lora = make(6)
    x = normal(rng(6), 9, 6)
    broken = x.copy()
    broken[3, 3] = np.inf
    for bad, error in [
        (broken, exceptions.NonFiniteError),
        (x[:, :5], exceptions.ShapeError),
        (x[:0], exceptions.ShapeError),
        (x[0], exceptions.ShapeError),
        (np.ones((2, 6), int), exceptions.DTypeError),
        (np.full((2, 6), 1e30), exceptions.NonFiniteError),
    ]:
        with pytest.raises(error, match="X"):
            ml.collect_gram(lora, bad)
    with pytest.raises(exceptions.UnknownModuleError):
        ml.collect_gram(lora, x, "k_proj")
    with pytest.raises(exceptions.ConfigError, match="q"):
        ml.collect_gram(lora, x, q=0)
    gram = ml.collect_gram(lora, x)
    with pytest.raises(exceptions.ShapeError):
        gram + ml.collect_gram(make(7), normal(rng(7), 9, 7))
    with pytest.raises(exceptions.ShapeError):
        gram.apply(np.ones(5))
    good = gram.to_bytes()
    for data in (good[:-1], good[8:], b"", b"\0" * 40, good.replace(b"F32", b"F64")):
        with pytest.raises(exceptions.FormatError):
            ml.Gram.from_bytes(data)
