import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import microlora as ml
import reference_merge as twin
from merge_support import adapter, cases, delta, distance, from_delta, with_extra
from microlora.exceptions import CancelledError, ConfigError, DTypeError
from microlora.merging import MergeReport, Resized
from microlora.progress import CancelToken
from support import normal, rng

SHAPES = {"q": (40, 30, 8), "k": (40, 20, 6), "v": (12, 50, 2)}


def spectrum(values, n_in=20, n_out=16, seed=0):
    """A delta with given singular values."""
    r = rng(seed)
    u = np.linalg.qr(r.standard_normal((n_out, len(values))))[0]
    v = np.linalg.qr(r.standard_normal((n_in, len(values))))[0]
    return from_delta((u * values) @ v.T, len(values))


@given(cases(most=2), st.integers(1, 6))
def test_a_rank_gives_the_best_approximation(of, rank):
    one = of["p0"]
    made, report = ml.resize(one, rank=rank, dtype="f32")
    best, size = twin.resize(delta(one), rank=rank), np.linalg.norm(delta(one))
    assert np.linalg.norm(delta(made) - delta(one)) <= best.error * size * (1 + 1e-4) + 2e-5 * size
    row = report["m"]
    assert row.rank_out == made.info("m").rank == min(rank, one.info("m").rank)
    assert row.energy_kept == pytest.approx(best.energy, abs=1e-5)
    assert row.error == pytest.approx(best.error, abs=1e-3)
    assert row.norm == pytest.approx(size, rel=1e-5)


@given(cases(most=2), st.floats(0.05, 0.999))
def test_energy_takes_the_fewest(of, energy):
    one = of["p0"]
    rank = ml.resize(one, energy=energy).adapter.info("m").rank
    assert twin.resize(delta(one), rank=rank).energy >= energy - 1e-5
    if rank > 1:
        assert twin.resize(delta(one), rank=rank - 1).energy < energy + 1e-5


@given(cases(most=2), st.floats(0.01, 0.95))
def test_an_error_is_not_exceeded(of, error):
    one = of["p0"]
    rank = ml.resize(one, max_error=error).adapter.info("m").rank
    assert twin.resize(delta(one), rank=rank).error <= error + 1e-4
    if rank > 1:
        assert twin.resize(delta(one), rank=rank - 1).error > error - 1e-4


def test_ranks_by_hand():
    one = spectrum([4.0, 2.0, 1.0, 0.1])
    ranks = lambda **keep: ml.resize(one, **keep).adapter.info("m").rank  # noqa: E731
    assert [ranks(energy=e) for e in (0.5, 0.9, 0.99, 0.9999)] == [1, 2, 3, 4]
    assert [ranks(max_error=e) for e in (0.9, 0.4, 0.1, 0.01)] == [1, 2, 3, 4]
    assert [ranks(rank=r) for r in (1, 3, 4, 100)] == [1, 3, 4, 4]


def test_every_module_gets_its_own_rank_or_all_the_largest():
    one = adapter(SHAPES)
    own = ml.resize(one, energy=0.8).adapter
    ranks = {m: own.info(m).rank for m in SHAPES}
    assert len(set(ranks.values())) > 1
    same = ml.resize(one, energy=0.8, per_module=False).adapter
    assert {m: same.info(m).rank for m in SHAPES} == {
        m: min(max(ranks.values()), one.info(m).rank) for m in SHAPES
    }


def test_what_need_not_change_stays_bit_for_bit():
    one = adapter(SHAPES, dtype="bf16")
    made = ml.resize(one, rank=100).adapter
    for module in SHAPES:
        assert all(np.array_equal(x, y) for x, y in zip(made.raw(module), one.raw(module), strict=True))
        assert made.info(module) == one.info(module)
    same = ml.resize(one, rank=4).adapter
    assert same.info("q").dtype_a == "bf16"
    assert ml.resize(one, rank=100, dtype="f32").adapter.info("q").dtype_a == "f32"


def test_patterns_of_peft_hold_the_ranks(tmp_path):
    one = adapter(SHAPES)
    made = ml.resize(one, energy=0.8).adapter
    ml.save(made, tmp_path / "peft")
    back = ml.load(tmp_path / "peft")
    for module in SHAPES:
        assert back.info(module).rank == made.info(module).rank
        assert distance(delta(back, module), delta(made, module)) < 1e-6


def test_it_keeps_what_it_knows(tmp_path):
    said = ml.AdapterMetadata(
        name="n",
        version="1.2",
        base_model="m-1",
        base_fingerprint="f",
        task_types=("x",),
        training_size=5,
        metrics=(ml.Metric("acc", "d", 0.9),),
        parents=("old",),
    )
    one = adapter(SHAPES).with_metadata(said)
    made = ml.resize(one, rank=2).adapter
    new = {"name": "", "version": "", "metrics": (), "parents": ("n",), "created": made.metadata.created}
    assert made.metadata == said.replace(**new)
    assert ml.resize(adapter(SHAPES), rank=2).adapter.metadata.parents == ("adapter",)
    assert made.config.rank_of("q") == 2
    assert made.config.target_modules == tuple(SHAPES)
    ml.save(one, tmp_path / "x.safetensors")
    again = ml.resize(tmp_path / "x.safetensors", rank=2).adapter
    assert np.array_equal(delta(again, "q"), delta(made, "q"))
    assert np.array_equal(delta(ml.resize(ml.MicroLoRA(one), rank=2).adapter, "q"), delta(made, "q"))


def test_tensors_that_are_left_out_are_noted(tmp_path):
    report = ml.resize(with_extra(adapter(SHAPES), tmp_path / "x"), rank=2).report
    assert report.notes == (
        "tensors of 'adapter' that are no factors are left out: base_model.model.head.weight",
    )
    assert ml.resize(adapter(SHAPES), rank=2).report.notes == ()


def test_the_answer_has_names():
    got = ml.resize(adapter(SHAPES), rank=2)
    assert isinstance(got, Resized)
    assert isinstance(got.report, MergeReport)
    assert [m.name for m in got.report.modules] == list(SHAPES)
    assert "8 -> 2" in str(got.report)
    assert MergeReport.from_json(got.report.to_json()) == got.report


def test_a_delta_of_zero():
    a, b = rng().standard_normal((3, 8)), np.zeros((5, 3))
    zero = ml.Adapter.from_factors({"m": (a, b)}, alpha=3.0)
    for keep in ({"rank": 1}, {"energy": 0.5}, {"max_error": 0.1}):
        made, report = ml.resize(zero, **keep)
        assert not delta(made).any()
        assert (report["m"].error, report["m"].energy_kept) == (0.0, 1.0)


BAD = [
    *[{"rank": v} for v in (0, -1, 1.5, "8", True, 65_537)],
    *[{"energy": v} for v in (0.0, -0.1, 1.1, float("nan"), "1")],
    *[{"max_error": v} for v in (-0.1, 1.0, float("nan"), "1")],
    {},
    {"rank": 2, "energy": 0.5},
    {"rank": 2, "per_module": False},
    {"energy": 0.5, "per_module": 1},
    {"rank": 2, "dtype": "f64"},
]


@pytest.mark.parametrize("keep", BAD, ids=str)
def test_bad_input(keep):
    with pytest.raises(ConfigError, match="expected"):
        ml.resize(adapter(SHAPES), **keep)


def test_no_adapter():
    with pytest.raises(DTypeError, match="adapter: got int"):
        ml.resize(3, rank=2)
    with pytest.raises(OSError, match="nowhere"):
        ml.resize("/nowhere/at/all", rank=2)


def test_progress_and_cancel():
    seen = []
    ml.resize(adapter(SHAPES), energy=0.8, progress=lambda *a: seen.append(a))
    assert seen[-1][0] == seen[-1][1]
    token = CancelToken()
    token.cancel()
    with pytest.raises(CancelledError):
        ml.resize(adapter(SHAPES), rank=2, cancel=token)


def test_rslora_adapters_stay_of_one_kind(tmp_path):
    """Modules that stay and modules that shrink must be of one scaling, or PEFT could not hold them."""
    r = rng(5)
    low = normal(r, 8, 16) * (np.arange(8) < 2)[:, None], normal(r, 12, 8)
    full = normal(r, 8, 16), normal(r, 12, 8)
    whole = ml.Adapter.from_factors({"a": low, "b": full}, alpha=8.0, use_rslora=True)
    small, _ = ml.resize(whole, energy=0.9999)
    assert small.info("a").rank == 2
    assert all(small.info(m).use_rslora for m in "ab")
    ml.save(small, tmp_path / "small", "peft")
    back = ml.load(tmp_path / "small")
    for module in "ab":
        assert distance(delta(back, module), delta(whole, module)) < 2e-2


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_rounding_to_a_narrow_dtype_is_in_the_error(dtype):
    shapes = {"m": (24, 20, 6)}
    a, b = adapter(shapes, 1), adapter(shapes, 2)
    both = ml.merge({"a": a, "b": a, "c": b}, method="cat").adapter
    small, report = ml.resize(both, max_error=0.0, dtype=dtype)
    off = distance(delta(small), delta(both))
    assert off > 1e-5
    assert report["m"].error == pytest.approx(off, rel=0.05)
    assert "rounding to" in " ".join(report["m"].notes)


def test_scales_of_f16_go_into_alpha():
    """B of 1e-4 times A of 1e-2 would vanish in f16 were the scaling 1."""
    r = rng(6)
    pairs = [(1e-2 * normal(r, 4, 32), 1e-4 * normal(r, 32, 4)) for _ in range(2)]
    one, two = (ml.Adapter.from_factors({"m": p}, alpha=1e-3, dtype="f16") for p in pairs)
    made = ml.compose_sequential([one, two], residual=False)
    want = delta(two) @ delta(one)
    assert distance(delta(made), want) < 2e-3
    assert made.info("m").dtype_a == "f16"
    for merged in (ml.merge({"a": one, "b": two}, method=m, rank=4) for m in ("ties", "linear", "sce")):
        wide = ml.merge({"a": one, "b": two}, method=merged.report["m"].method, rank=4, dtype="f32")
        assert distance(delta(merged.adapter), delta(wide.adapter)) < 2e-3
