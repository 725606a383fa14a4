"""The read path: what forward, fusing and the views of the weights promise, on every instruction set."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import microlora as ml
import reference as ref
from microlora import _core
from microlora.exceptions import ConfigError, DTypeError, UnknownModuleError
from support import (
    DTYPES,
    bf16_bits,
    close,
    from_bf16,
    make,
    normal,
    rng,
    run_python,
    set_weights,
    twin,
)

DIMS = (1, 7, 16, 17, 97, 128)
RANKS = (1, 2, 3, 8, 16, 64, 256)
SHAPES = [(i, o, r) for r in RANKS for i, o in [(300, 300), (256, 401), (417, 256)]]
SHAPES += [(i, o, r) for i in DIMS for o in DIMS for r in (1, 3) if r <= min(i, o)]


def row(v):
    return np.ascontiguousarray(v, np.float32)


# -- invariants --


@pytest.mark.parametrize("dtype", DTYPES)
def test_untrained_adds_exact_zeros(dtype):
    lora = make(17, 31, 3, learned=False, dtype=dtype)
    y = lora.forward(normal(rng(), 17), "m")
    assert y.shape == (31,)
    assert y.dtype == np.float32
    assert not y.any()
    assert not np.signbit(y).any()
    assert not lora.forward(normal(rng(), 5, 17), "m").any()
    w = normal(rng(), 31, 17)
    before = w.copy()
    lora.fuse_into(w, "m")
    np.testing.assert_array_equal(w, before)


def check_shape(n_in, n_out, rank, rows=(1, 2, 5, 33)):
    lora, r = make(n_in, n_out, rank, seed=n_in + n_out), rng(rank)
    want, x = twin(lora), normal(r, max(rows), n_in)
    close(lora.forward(x[0], "m"), want.forward(x[0]), 1e-5)
    single = np.stack([lora.forward(v, "m") for v in x])
    for n in rows:
        batch = lora.forward(row(x[:n]), "m")
        close(batch, want.forward(x[:n]), 1e-5)
        close(batch, single[:n], 1e-6)
    add = normal(r, n_out)
    total = add.copy()
    lora.forward_add(x[0], "m", total)
    close(total, add + want.forward(x[0]), 1e-5)


@pytest.mark.parametrize(("n_in", "n_out", "rank"), SHAPES)
def test_forward_matches_the_twin_and_batches_match_rows(n_in, n_out, rank):
    check_shape(n_in, n_out, rank)


@pytest.mark.parametrize("isa", _core.available_isas())
def test_every_instruction_set_of_this_machine(isa):
    """In a process of its own, because the choice is made once."""
    out = run_python(
        "import test_forward as t; from microlora import _core; print(_core.isa())\n"
        "for n, o, r in t.SHAPES: t.check_shape(n, o, r, rows=(1, 2, 7))",
        env={"MICROLORA_ISA": isa},
    )
    print(f"checked on {isa}; this machine has {', '.join(_core.available_isas())}")
    assert out.strip() == isa


def test_an_unknown_instruction_set_is_refused():
    out = run_python(
        "import microlora as ml\n"
        "try: ml.create_lora('coder', 32)\n"
        "except ml.exceptions.ConfigError as e: print(e)",
        env={"MICROLORA_ISA": "mmx"},
    )
    assert "MICROLORA_ISA" in out
    assert "mmx" in out


@given(seed=st.integers(0, 9999), n_in=st.integers(1, 70), n_out=st.integers(1, 70), rank=st.integers(1, 20))
def test_linear_in_x(seed, n_in, n_out, rank):
    lora, r = make(n_in, n_out, rank, seed=seed), rng(seed)
    x, z, c = normal(r, n_in), normal(r, n_in), np.float32(r.uniform(-3, 3))
    f = lambda v: ref.f64(lora.forward(v, "m"))  # noqa: E731
    scale = np.abs(f(x)).max() + abs(c) * np.abs(f(z)).max()
    bound = np.abs(lora["m"].lora_b).max() * lora["m"].scaling * np.linalg.norm(lora["m"].lora_a)
    close(f(x + c * z), f(x) + c * f(z), 1e-5, 1e-5 * scale + 1e-6 * bound * np.linalg.norm(x + c * z))


@pytest.mark.parametrize(("n_in", "n_out"), [(48, 48), (48, 80), (80, 48), (17, 97), (1, 7)])
def test_delta_weight_and_fusing_agree_with_forward(n_in, n_out):
    lora, r = make(n_in, n_out, 5), rng(1)
    x, w = normal(r, 9, n_in), normal(r, n_out, n_in)
    delta = lora.delta_weight("m")
    assert delta.shape == w.shape
    close(delta, ref.delta_weight(lora["m"].lora_a, lora["m"].lora_b, lora["m"].scaling), 1e-6)
    np.testing.assert_array_equal(lora["m"].delta_weight(), delta)
    close(x @ w.T + lora.forward(x, "m"), x @ (w + delta).T, 1e-5)
    fused = w.copy()
    lora.fuse_into(fused, "m")
    close(fused, ref.f64(w) + delta, 1e-6)
    lora.unfuse_from(fused, "m")
    assert np.abs(fused - w).max() <= 1e-6 * max(np.abs(w).max(), np.abs(delta).max())


def test_fusing_is_exact_to_scale_when_the_delta_is_large():
    lora, r = make(32, 32, 4, alpha=4e4), rng(2)
    w = normal(r, 32, 32)
    delta, fused = lora.delta_weight("m"), w.copy()
    lora.fuse_into(fused, "m")
    lora.unfuse_from(fused, "m")
    assert np.abs(fused - w).max() <= 1e-6 * max(np.abs(w).max(), np.abs(delta).max())


def test_scaling_of_both_kinds():
    assert make(32, 32, 4, alpha=6.0)["m"].scaling == 1.5
    assert make(32, 32, 4, alpha=6.0, use_rslora=True)["m"].scaling == 3.0
    lora = make(32, 32, 4, alpha=6.0, use_rslora=True)
    close(lora.forward(np.ones(32), "m"), twin(lora).forward(np.ones(32)), 1e-5)


def test_initialisation_is_seeded_uniform_and_its_own_for_each_module():
    bound = 1 / np.sqrt(400)
    lora = make(400, 30, 20, names=("q_proj", "k_proj"), learned=False, seed=3)
    a, other = lora["q_proj"].lora_a, lora["k_proj"].lora_a
    assert np.abs(a).max() < bound
    assert np.abs(a).max() > 0.99 * bound
    assert abs(a.mean()) < 4 * bound / np.sqrt(3 * a.size)
    assert a.std() == pytest.approx(bound / np.sqrt(3), rel=0.02)
    assert (a != other).any()
    same = make(400, 30, 20, names=("k_proj", "q_proj"), learned=False, seed=3)
    np.testing.assert_array_equal(same["q_proj"].lora_a, a)
    assert (make(400, 30, 20, names=("q_proj",), learned=False, seed=4)["q_proj"].lora_a != a).any()


def test_a_new_rank_may_not_exceed_the_layer():
    for dims in [(4, 9), (9, 4)]:
        with pytest.raises(ConfigError, match=r"rank: got 5 .*expected at most 4"):
            ml.MicroLoRA(ml.LoraConfig(rank=5, target_modules=["m"]), dims={"m": dims})


# -- inputs and outputs --


def test_inputs_of_every_kind_give_the_same():
    lora, r = make(24, 10, 3), rng(3)
    x = normal(r, 6, 24)
    want = lora.forward(x, "m")
    wide = np.zeros((12, 48), np.float32)
    wide[::2, ::2] = x
    readonly, unaligned = x.copy(), np.frombuffer(b"\0" + x.tobytes(), np.float32, offset=1).reshape(6, 24)
    readonly.flags.writeable = False
    assert not unaligned.flags.aligned
    same = [
        x.astype(np.float64),
        x.tolist(),
        tuple(map(tuple, x.tolist())),
        wide[::2, ::2],
        np.asfortranarray(x),
    ]
    same += [readonly, unaligned, x.astype(np.longdouble), np.flip(np.flip(x, 1).copy(), 1), list(x)]
    for other in same:
        np.testing.assert_array_equal(lora.forward(other, "m"), want)
    np.testing.assert_array_equal(lora.forward(x[:, ::1][2], "m"), lora.forward(x[2].tolist(), "m"))
    np.testing.assert_array_equal(lora.forward(wide[4, ::2], "m"), lora.forward(x[2], "m"))
    close(lora.forward(x.astype(np.float16), "m"), lora.forward(x.astype(np.float16).astype("f4"), "m"), 0)


def test_one_row_matrix_stays_a_matrix():
    lora = make(8, 5, 2)
    x = normal(rng(), 1, 8)
    assert lora.forward(x, "m").shape == (1, 5)
    close(lora.forward(x, "m")[0], lora.forward(x[0], "m"), 1e-6)


def test_out_is_filled_and_returned():
    lora, r = make(24, 10, 3), rng(3)
    x = normal(r, 4, 24)
    for v in (x[0], x):
        out = np.full((*v.shape[:-1], 10), np.nan, np.float32)
        assert lora.forward(v, "m", out) is out
        np.testing.assert_array_equal(out, lora.forward(v, "m"))
        other = np.empty_like(out)
        assert lora["m"].forward(v, out=other) is other
        np.testing.assert_array_equal(other, out)
        total = np.ones_like(out)
        assert lora.forward_add(v, "m", out=total) is None
        close(total, 1 + out, 1e-6)
        total = np.ones_like(out)
        lora["m"].forward_add(v, total)
        close(total, 1 + out, 1e-6)
    part = np.zeros((4, 10), np.float32)
    lora.forward(x[1], "m", out=part[1])
    np.testing.assert_array_equal(part[1], lora.forward(x[1], "m"))
    assert not part[[0, 2, 3]].any()


def test_arguments_go_by_position_or_by_name():
    lora, x = make(8, 8, 2), normal(rng(), 8)
    want, out = lora.forward(x, "m"), np.empty(8, np.float32)
    np.testing.assert_array_equal(lora.forward(x=x, module="m", out=out), want)
    np.testing.assert_array_equal(lora.forward(x, "m", out), want)
    np.testing.assert_array_equal(lora["m"].forward(x=x, out=out), want)
    np.testing.assert_array_equal(lora["m"].forward(x, out), want)
    total = np.zeros(8, np.float32)
    lora.forward_add(x=x, module="m", out=total)
    np.testing.assert_array_equal(total, want)


def test_the_module_may_be_left_out_only_when_there_is_one():
    one, two = make(8, 8, 2), make(8, 8, 2, names=("a", "b"))
    x = normal(rng(), 8)
    np.testing.assert_array_equal(one.forward(x), one.forward(x, "m"))
    total = np.zeros(8, np.float32)
    one.forward_add(x, out=total)
    np.testing.assert_array_equal(total, one.forward(x))
    np.testing.assert_array_equal(one.delta_weight(), one.delta_weight("m"))
    with pytest.raises(ConfigError, match=r"module: missing, expected one of a, b"):
        two.forward(x)
    with pytest.raises(UnknownModuleError, match=r"module: got \"c\", expected one of a, b"):
        two.forward(x, "c")
    with pytest.raises(ConfigError, match="out: missing"):
        one.forward_add(x)


def test_the_container_protocol():
    lora = make(8, 8, 2, names=("a", "b"))
    assert (list(lora), len(lora), lora.modules()) == (["a", "b"], 2, ["a", "b"])
    assert "a" in lora
    assert "c" not in lora
    h = lora["b"]
    assert (h.name, h.rank, h.in_features, h.out_features, h.dtype, h.alpha) == ("b", 2, 8, 8, "f32", 4.0)
    assert "'b'" in repr(h) or '"b"' in repr(h)


def test_forward_all_takes_the_modules_that_share_their_input():
    names = ("o_proj", "v_proj", "q_proj", "k_proj", "up_proj", "gate_proj")
    lora, r = make(16, 16, 2, names=names), rng(1)
    for x in (normal(r, 16), normal(r, 3, 16)):
        got = lora.forward_all(x)
        assert list(got) == ["q_proj", "k_proj", "v_proj"]
        for name, y in got.items():
            np.testing.assert_array_equal(y, lora.forward(x, name))
            assert y.shape == x.shape
        assert list(lora.forward_all(x, ["up_proj", "o_proj"])) == ["up_proj", "o_proj"]
        assert list(lora.forward_all(x, modules=("k_proj",))) == ["k_proj"]
    mlp = make(16, 48, 2, names=("up_proj", "gate_proj", "down_proj"))
    assert list(mlp.forward_all(normal(r, 16))) == ["gate_proj", "up_proj"]
    with pytest.raises(ConfigError, match="modules: missing"):
        make(8, 8, 2, names=("o_proj", "down_proj")).forward_all(normal(r, 8))
    with pytest.raises(UnknownModuleError):
        lora.forward_all(normal(r, 16), ["q_proj", "nope"])
    cfg = ml.LoraConfig(rank=2, target_modules=["q_proj", "k_proj"])
    uneven = ml.MicroLoRA(cfg, dims={"q_proj": (8, 8), "k_proj": (9, 8)})
    with pytest.raises(ConfigError, match="share their input"):
        uneven.forward_all(normal(r, 8))


def test_disabled_adds_nothing():
    lora, x = make(8, 5, 2, names=("q_proj", "k_proj")), normal(rng(), 3, 8)
    want = lora.forward(x, "q_proj")
    lora.enabled = False
    assert lora.enabled is False
    for v in (x, x[0]):
        assert not lora.forward(v, "q_proj").any()
        assert not lora.forward(v, "q_proj", np.full((*v.shape[:-1], 5), np.nan, np.float32)).any()
        assert not any(y.any() for y in lora.forward_all(v).values())
        total = np.ones((*v.shape[:-1], 5), np.float32)
        lora.forward_add(v, "q_proj", total)
        assert (total == 1).all()
    lora.enabled = True
    np.testing.assert_array_equal(lora.forward(x, "q_proj"), want)


def test_a_large_batch_that_lets_go_of_the_gil():
    lora, r = make(256, 200, 16), rng(0)
    x = normal(r, 2000, 256)
    y = lora.forward(x, "m")
    close(y, twin(lora).forward(x), 1e-5)
    close(y[:64], np.stack([lora.forward(v, "m") for v in x[:64]]), 1e-6)


# -- the weights --


def test_factors_are_read_only_copies_in_peft_shapes():
    lora = make(24, 10, 3)
    for source in (lora["m"], None):
        a, b = (source.lora_a, source.lora_b) if source else lora.adapter().factors("m")
        assert (a.shape, b.shape) == ((3, 24), (10, 3))
        for v in (a, b):
            assert v.dtype == np.float32
            assert v.flags.c_contiguous
            assert not v.flags.writeable
            with pytest.raises(ValueError, match="read-only"):
                v[0, 0] = 1
    before, old = lora["m"].lora_b, lora["m"].lora_b.copy()
    lora.instant(normal(rng(), 24), ml.Target(normal(rng(), 10)), "m")
    np.testing.assert_array_equal(before, old)
    assert (lora["m"].lora_b != old).any()
    delta = lora.delta_weight("m")
    delta[:] = 0  # a copy of the caller's own


@pytest.mark.parametrize("n_in", [1, 7, 16, 33])
def test_raw_gives_the_stored_bits_rounded_to_nearest_even(n_in):
    r = rng(n_in)
    a, b = normal(r, 1, n_in) * 100, normal(r, 9, 1)
    a[0, 0], b[0, 0] = 1 + 2**-11, 1 + 3 * 2**-11  # ties of f16: down to 1, up to 1 + 2^-9
    b[1, 0], b[2, 0] = 1 + 2**-8, 1 + 3 * 2**-8  # ties of bf16
    for dtype in DTYPES:
        lora = set_weights(make(n_in, 9, 1, dtype=dtype, learned=False), {"m": (a, b)})
        for got, want in zip(lora["m"].raw(), (a, b), strict=True):
            bits = {"f32": want, "f16": want.astype(np.float16), "bf16": bf16_bits(want)}[dtype]
            assert got.dtype == bits.dtype
            assert not got.flags.writeable
            np.testing.assert_array_equal(got, bits)
        for got, bits in zip((lora["m"].lora_a, lora["m"].lora_b), lora["m"].raw(), strict=True):
            np.testing.assert_array_equal(
                got, from_bf16(bits) if dtype == "bf16" else bits.astype(np.float32)
            )
        for g, w in zip(lora.adapter().raw("m"), lora["m"].raw(), strict=True):
            np.testing.assert_array_equal(g, w)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_a_learning_step_is_stored_rounded_to_nearest_even(dtype):
    """The stored factor is the f32 master after the step, rounded; the f32 twin learner shows the master."""
    r, narrow, full = rng(1), make(33, 18, 3, dtype=dtype), make(33, 18, 3)
    set_weights(full, {"m": (narrow["m"].lora_a, narrow["m"].lora_b)})
    for _ in range(20):
        x, t = normal(r, 33), ml.Target(normal(r, 18))
        narrow.instant(x, t, "m")
        full.instant(x, t, "m")
    master = full["m"].lora_b
    want = master.astype(np.float16) if dtype == "f16" else bf16_bits(master)
    np.testing.assert_array_equal(narrow["m"].raw()[1], want)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize(
    ("n_in", "n_out", "rank"), [(97, 33, 8), (64, 64, 16), (7, 300, 3), (1, 1, 1), (17, 5, 2)]
)
def test_narrow_storage_sums_in_f32(dtype, n_in, n_out, rank):
    lora, r = make(n_in, n_out, rank, dtype=dtype), rng(6)
    x = normal(r, 40, n_in)
    want = twin(lora).forward(x)  # of the rounded weights
    close(lora.forward(x, "m"), want, 1e-5)
    close(np.stack([lora.forward(v, "m") for v in x]), want, 1e-5)
    close(x @ lora.delta_weight("m").T, want, 1e-5)


# -- torch --


@pytest.mark.oracle
def test_torch_tensors_are_read_without_importing_torch():
    torch = pytest.importorskip("torch")
    lora, r = make(24, 10, 3), rng(3)
    x = normal(r, 6, 24)
    want = lora.forward(x, "m")
    for t in (torch.from_numpy(x), torch.from_numpy(x).requires_grad_(), torch.from_numpy(x).double()):
        np.testing.assert_array_equal(lora.forward(t, "m"), want)
        np.testing.assert_array_equal(lora.forward(t[2], "m"), lora.forward(x[2], "m"))
    np.testing.assert_array_equal(lora.forward(torch.from_numpy(x.T.copy()).T, "m"), want)
    half = torch.from_numpy(x).bfloat16()
    np.testing.assert_array_equal(lora.forward(half, "m"), lora.forward(half.float().numpy(), "m"))
    y = torch.from_numpy(x[0]).half()
    np.testing.assert_array_equal(lora.forward(y, "m"), lora.forward(y.float().numpy(), "m"))
    assert lora.instant(torch.from_numpy(x[0]), ml.Target(torch.ones(10)), "m", base=torch.zeros(10)).applied
    with pytest.raises(DTypeError, match="x: got dtype int64"):
        lora.forward(torch.arange(24), "m")


def test_importing_and_running_never_imports_torch():
    run_python(
        "import sys, numpy as np, microlora as ml\n"
        "lora = ml.create_lora('coder', 32)\n"
        "lora.forward(np.ones(32), 'q_proj')\n"
        "assert 'torch' not in sys.modules and 'safetensors' not in sys.modules"
    )
