"""LoraChain: forward, gradients, DoRA, checkpoints and training against a float64 twin."""

import copy
import itertools
import pickle

import numpy as np
import pytest

import microlora as ml
from microlora import _core, exceptions
from reference_chain import Twin, adamw

F = np.float32


def layers_of(rng, widths, bias=True):
    return [
        (
            (rng.standard_normal((o, i)) / np.sqrt(i)).astype(F),
            (0.1 * rng.standard_normal(o)).astype(F) if bias else None,
        )
        for i, o in itertools.pairwise(widths)
    ]


def chain_of(seed=0, widths=(7, 9, 8, 4), rank=3, moved=True, **options):
    """A chain whose B (and magnitudes) are away from their start, and the data of a batch."""
    rng = np.random.default_rng(seed)
    chain = ml.LoraChain(layers_of(rng, widths), rank=rank, **options)
    if moved:
        chain.set_factors(
            {
                name: (a, (0.3 * rng.standard_normal(b.shape)).astype(F))
                for name, (a, b) in chain.factors().items()
            }
        )
    if options.get("use_dora") and moved:
        chain.set_magnitudes([m * rng.uniform(0.7, 1.3, m.shape).astype(F) for m in chain.magnitudes()])
    x = rng.standard_normal((6, widths[0])).astype(F)
    if options.get("head", "cross_entropy") == "cross_entropy":
        y = rng.integers(0, widths[-1], 6)
    else:
        y = rng.standard_normal((6, widths[-1])).astype(F)
    return chain, x, y


def twin_of(chain, seed=0, widths=(7, 9, 8, 4)):
    layers = layers_of(np.random.default_rng(seed), widths)
    magnitudes = chain.magnitudes() if chain.use_dora else None
    scaling = chain.config.scaling()
    return Twin(layers, chain.factors().values(), scaling, chain.activation, chain.head, magnitudes)


KINDS = [
    {"activation": activation, "head": head, "use_dora": dora}
    for activation in ("relu", "gelu", "tanh")
    for head in ("cross_entropy", "mse")
    for dora in (False, True)
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: "-".join(map(str, k.values())))
def test_outputs_losses_and_gradients_match_the_twin(kind):
    chain, x, y = chain_of(**kind)
    twin = twin_of(chain)
    np.testing.assert_allclose(chain.forward(x), twin.forward(x), rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(_core.evaluate(chain, x, y), twin.losses(x, y), rtol=2e-5, atol=2e-5)
    loss, _, gradients = chain.gradients(x, y)
    assert loss == pytest.approx(twin.losses(x, y).mean(), rel=1e-5)
    for i, (ga, gb, gm) in enumerate(gradients):
        a, b = twin.factors[i]
        np.testing.assert_allclose(ga, twin.gradient(x, y, a), rtol=1e-3, atol=2e-5)
        np.testing.assert_allclose(gb, twin.gradient(x, y, b), rtol=1e-3, atol=2e-5)
        assert (gm is None) == (not chain.use_dora)
        if gm is not None:
            np.testing.assert_allclose(gm, twin.gradient(x, y, twin.magnitudes[i]), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_starts_as_the_frozen_network_and_fuses_into_it(dora):
    chain, x, y = chain_of(moved=False, use_dora=dora)
    h = x
    layers = layers_of(np.random.default_rng(0), (7, 9, 8, 4))
    for i, (w, b) in enumerate(layers):
        h = h @ w.T + b
        h = np.maximum(h, 0) if i < 2 else h
    np.testing.assert_allclose(chain.forward(x), h, rtol=1e-5, atol=1e-5)
    chain, x, y = chain_of(use_dora=dora)
    plain = ml.LoraChain(chain.fuse(), rank=3)
    np.testing.assert_allclose(plain.forward(x), chain.forward(x), rtol=2e-5, atol=2e-5)
    assert plain.predict(x).tolist() == chain.predict(x).tolist()
    assert plain.loss(x, y) == pytest.approx(chain.loss(x, y), rel=1e-4)


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 5, 9, 16])
def test_checkpointing_gives_the_same_bits(activation, dora, depth):
    widths = (7,) + (8,) * (depth - 1) + (4,)
    kind = {"widths": widths, "activation": activation, "use_dora": dora}
    (plain, x, y), (saving, _, _) = (chain_of(**kind, gradient_checkpointing=on) for on in (False, True))
    loss, _, gradients = plain.gradients(x, y)
    again, _, recomputed = saving.gradients(x, y)
    assert loss == again
    for one, two in zip(gradients, recomputed, strict=True):
        for g, h in zip(one, two, strict=True):
            assert (g is None and h is None) or np.array_equal(g, h)


def test_checkpointing_halves_the_peak_of_a_deep_chain():
    def peak(depth, on):
        rng = np.random.default_rng(0)
        chain = ml.LoraChain(layers_of(rng, (64,) * (depth + 1)), rank=2, gradient_checkpointing=on)
        x = rng.standard_normal((32, 64)).astype(F)
        return chain.gradients(x, rng.integers(0, 64, 32))[1]

    assert peak(16, True) <= 0.5 * peak(16, False)
    assert peak(36, True) <= 0.35 * peak(36, False)


def test_training_is_adamw_on_the_mean_gradient():
    chain, x, y = chain_of(seed=3, activation="tanh")
    twin = twin_of(chain, seed=3)
    weights = [t for pair in twin.factors for t in pair]
    state = [(np.zeros_like(w), np.zeros_like(w)) for w in weights]
    optimizer = _core.Optimizer(chain, "adamw", weight_decay=0.1)
    order = np.arange(6).repeat(4)
    losses, _ = optimizer.train(chain, x, y, order, [0.01] * 6, batch_size=4)
    for t in range(1, 7):
        rows = order[4 * (t - 1) : 4 * t]
        assert losses[t - 1] == pytest.approx(twin.losses(x[rows], y[rows]).mean(), rel=1e-4)
        grads = [twin.gradient(x[rows], y[rows], w) for w in weights]
        adamw(weights, grads, state, t, 0.01, weight_decay=0.1)
    for (a, b), (wa, wb) in zip(chain.factors().values(), twin.factors, strict=True):
        np.testing.assert_allclose(a, wa, atol=2e-4)
        np.testing.assert_allclose(b, wb, atol=2e-4)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", ["sgd", "momentum", "adamw"])
def test_accumulated_batches_equal_the_large_one_and_chunks_equal_one_call(kind, dora):
    def run(batch, accumulation, chunks):
        chain, x, y = chain_of(seed=5, use_dora=dora)
        optimizer = _core.Optimizer(chain, kind)
        order = np.random.default_rng(1).permutation(np.arange(48) % 6)
        for part in np.split(order, chunks):
            optimizer.train(
                chain, x, y, part, [0.05] * (len(part) // 8), batch_size=batch, accumulation=accumulation
            )
        return [w for pair in chain.factors().values() for w in pair] + chain.magnitudes()

    whole, parts, split = run(8, 1, 1), run(2, 4, 1), run(8, 1, 3)
    for a, b, c in zip(whole, parts, split, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
        assert np.array_equal(a, c)


def test_bad_rows_change_nothing():
    chain, x, y = chain_of()
    optimizer = _core.Optimizer(chain, "adamw")
    optimizer.train(chain, x, y, np.arange(6), [0.01], batch_size=6)
    before, moments, version = chain.snapshot(), optimizer.to_bytes(), chain.version
    bad = x.copy()
    bad[4, 2] = np.nan
    with pytest.raises(exceptions.SampleError, match="row 4") as caught:
        optimizer.train(chain, bad, y, [0, 4], [0.01], batch_size=2)
    assert (caught.value.row, caught.value.steps_done) == (4, 0)
    with pytest.raises(exceptions.SampleError) as caught:
        optimizer.train(chain, bad, y, [0, 1, 4, 2], [0.0, 0.0], batch_size=2)
    assert (caught.value.row, caught.value.steps_done) == (4, 1)
    chain.restore(before)
    optimizer.restore(moments)
    with pytest.raises(exceptions.ConfigError, match=r"y\[1\]"):
        optimizer.train(chain, x, np.array([0, 4, 0, 0, 0, 0]), [0], [0.01], batch_size=2)
    with pytest.raises(exceptions.ConfigError, match="order"):
        optimizer.train(chain, x, y, [6], [0.01], batch_size=2)
    with pytest.raises(exceptions.ShapeError, match="lrs"):
        optimizer.train(chain, x, y, [0, 1, 2], [0.01], batch_size=2)
    with pytest.raises(exceptions.ConfigError, match="lr"):
        optimizer.train(chain, x, y, [0], [np.nan], batch_size=2)
    with pytest.raises(exceptions.ShapeError, match="x"):
        optimizer.train(chain, x[:, :5], y, [0], [0.01], batch_size=2)
    with pytest.raises(exceptions.NonFiniteError):
        _core.Optimizer(chain, "sgd").train(chain, x, y, [0], [1e300], batch_size=2)
    assert chain.snapshot() == before or chain.version >= version
    np.testing.assert_array_equal(chain.forward(x), chain.forward(x))
    assert optimizer.to_bytes() == moments


@pytest.mark.parametrize("rows", [1, 5])
def test_clipping_scales_the_mean_gradient_to_the_norm(rows):
    chain, x, y = chain_of(seed=9)
    before = chain.factors()
    _, _, gradients = chain.gradients(x[:rows], y[:rows])
    norm = np.sqrt(sum(float((g.astype(float) ** 2).sum()) for pair in gradients for g in pair[:2]))
    optimizer = _core.Optimizer(chain, "sgd")
    _, norms = optimizer.train(chain, x, y, np.arange(rows), [1.0], batch_size=rows, max_grad_norm=norm / 4)
    assert norms[0] == pytest.approx(norm, rel=1e-5)
    for (name, old), (ga, gb, _) in zip(before.items(), gradients, strict=True):
        for now, was, g in zip(chain.factors()[name], old, (ga, gb), strict=True):
            np.testing.assert_allclose(now, was - g / 4, atol=1e-6)


def test_state_goes_on_bit_for_bit():
    chain, x, y = chain_of(use_dora=True)
    optimizer = _core.Optimizer(chain, "adamw", lora_plus_ratio=4.0)
    optimizer.train(chain, x, y, np.arange(6), [0.01, 0.02], batch_size=3)
    state, moments = chain.snapshot(), optimizer.to_bytes()
    optimizer.train(chain, x, y, np.arange(6), [0.01, 0.02], batch_size=3)
    twin, _, _ = chain_of(moved=False, use_dora=True)
    twin.restore(state)
    other = _core.Optimizer(twin, "adamw", lora_plus_ratio=4.0)
    other.restore(moments)
    other.train(twin, x, y, np.arange(6), [0.01, 0.02], batch_size=3)
    assert np.array_equal(twin.forward(x), chain.forward(x))
    assert other.to_bytes() == optimizer.to_bytes()
    assert other.steps == 4


def test_refusals():
    rng = np.random.default_rng(0)
    layers = layers_of(rng, (7, 9, 4))
    with pytest.raises(exceptions.ShapeError, match=r"layers\[1\]"):
        ml.LoraChain([layers[1], layers[1]], rank=2)
    with pytest.raises(exceptions.ConfigError, match="activation"):
        ml.LoraChain(layers, rank=4, activation="swish")
    with pytest.raises(exceptions.ConfigError, match="head"):
        ml.LoraChain(layers, rank=4, head="hinge")
    with pytest.raises(exceptions.ConfigError, match="layers"):
        ml.LoraChain([])
    with pytest.raises(exceptions.NonFiniteError, match=r"layers\[0\]"):
        ml.LoraChain([(layers[0][0] * np.inf, None)], rank=4)
    dora = ml.LoraChain(layers, rank=[5, 4], use_dora=True)
    with pytest.raises(exceptions.UnsupportedVariantError, match="fuse"):
        dora.lora
    plain = ml.LoraChain(layers, rank=[5, 4])
    with pytest.raises(exceptions.ConfigError, match="rank"):
        ml.LoraChain(layers, rank=[5])
    with pytest.raises(exceptions.ConfigError, match="rank"):
        ml.LoraChain(layers, rank=[5, 5])
    assert [a.shape[0] for a, _ in ml.LoraChain(layers, rank=5).factors().values()] == [5, 4]
    with pytest.raises(exceptions.ConfigError, match="DoRA"):
        plain.restore(dora.snapshot())
    with pytest.raises(exceptions.ConfigError, match="magnitudes"):
        plain.set_magnitudes([np.ones(9, F), np.ones(4, F)])
    with pytest.raises(exceptions.ConfigError, match="labels"):
        plain.loss(rng.standard_normal((2, 7)), rng.standard_normal((2, 4)))
    with pytest.raises(exceptions.ConfigError, match="modules"):
        _core.evaluate(plain, np.zeros((2, 7), F), np.zeros(2, np.int64), modules=["layers.0"])


def test_dora_of_single_layers():
    rng = np.random.default_rng(4)
    layers = layers_of(rng, (7, 9, 8, 4))
    mixed = ml.LoraChain(layers, rank=3, use_dora=[False, True, False])
    plain = ml.LoraChain(layers, rank=3)
    x, y = rng.standard_normal((6, 7)).astype(F), rng.integers(0, 4, 6)
    np.testing.assert_allclose(mixed.forward(x), plain.forward(x), atol=1e-5)
    optimizer = _core.Optimizer(mixed, "adamw")
    optimizer.train(mixed, x, y, np.arange(6).repeat(5), [0.05] * 5, batch_size=6)
    assert [m.shape for m in mixed.magnitudes()] == [(8,)]
    assert [g[2] is not None for g in mixed.gradients(x, y)[2]] == [False, True, False]
    assert not np.allclose(mixed.magnitudes()[0], np.linalg.norm(layers[1][0], axis=1), atol=1e-3)
    fused = ml.LoraChain(mixed.fuse(), rank=3)
    np.testing.assert_allclose(fused.forward(x), mixed.forward(x), atol=1e-4)
    with pytest.raises(exceptions.ConfigError, match="use_dora"):
        ml.LoraChain(layers, rank=3, use_dora=[True])
    with pytest.raises(exceptions.ConfigError, match="layers of LoRA, DoRA, LoRA"):
        plain.restore(mixed.snapshot())


@pytest.mark.parametrize("dora", [False, True])
def test_kept_in_a_file_pickled_and_copied(dora, tmp_path):
    chain, x, y = chain_of(use_dora=dora)
    _core.Optimizer(chain, "adamw").train(chain, x, y, np.arange(6), [0.05], batch_size=6)
    want = chain.forward(x)
    chain.save(tmp_path / "chain.safetensors")
    for twin in (pickle.loads(pickle.dumps(chain)), copy.deepcopy(chain), chain.copy()):
        assert np.array_equal(twin.forward(x), want)
        assert twin.digest == chain.digest
        assert repr(twin).split(", version")[0] == repr(chain).split(", version")[0]
    fresh, _, _ = chain_of(use_dora=dora, moved=False)
    fresh.load(tmp_path / "chain.safetensors")
    assert np.array_equal(fresh.forward(x), want)
    if dora:
        # Its factors alone are another network.
        with pytest.raises(exceptions.UnsupportedVariantError, match="DoRA"):
            ml.load(tmp_path / "chain.safetensors")
    else:
        loaded = ml.MicroLoRA(ml.load(tmp_path / "chain.safetensors"))
        assert np.array_equal(loaded.forward(x, "layers.0"), chain.lora.forward(x, "layers.0"))
    other, _, _ = chain_of(use_dora=dora, seed=1)
    assert other.digest != chain.digest


def test_labels_may_be_lists_or_of_any_integer_kind():
    chain, x, y = chain_of()
    want = chain.loss(x, y)
    for labels in (y.tolist(), y.astype(np.int8), y.astype(np.uint32), tuple(y.tolist())):
        assert chain.loss(x, labels) == want
    with pytest.raises(exceptions.DTypeError, match="y"):
        chain.loss(x, y.astype(float))
    with pytest.raises(exceptions.ShapeError, match=r"layers\[0\]: got 3 items"):
        ml.LoraChain([(np.ones((2, 2), F), None, 1)])
    with pytest.raises(exceptions.DTypeError, match="torch module"):
        ml.LoraChain(object())


def test_narrow_storage_keeps_a_float32_master():
    chain, x, _ = chain_of(seed=7)
    exact = chain.forward(x)
    chain.set_storage("bf16")
    rounded = chain.forward(x)
    assert not np.array_equal(exact, rounded)
    np.testing.assert_allclose(rounded, exact, rtol=0.05, atol=0.05)
    chain.set_storage("f32")
    assert np.array_equal(chain.forward(x), exact)
