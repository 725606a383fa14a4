"""Adapters out of tuned weights, from arrays and from files, against the dense decomposition."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import microlora as ml
from merge_support import delta, distance
from microlora.exceptions import (
    CancelledError,
    ConfigError,
    DTypeError,
    FormatError,
    NonFiniteError,
    ShapeError,
)
from microlora.progress import CancelToken
from support import normal, rng, to_bits, write_tensors

CODES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}


def pair(n_out=20, n_in=30, rank=4, seed=0, noise=0.0):
    """Base and tuned weights whose difference has this rank, and a little more."""
    r = rng(seed)
    base = normal(r, n_out, n_in)
    change = normal(r, n_out, rank) @ normal(r, rank, n_in) + noise * normal(r, n_out, n_in)
    return base, (base + change).astype(np.float32)


def change_of(base, tuned):
    return (tuned - base).astype(np.float64)


def write(path, tensors, dtype="f32"):
    header = {k: {"dtype": CODES[dtype], "shape": list(v.shape)} for k, v in tensors.items()}
    path.write_bytes(write_tensors(header, {k: to_bits(v, dtype) for k, v in tensors.items()}))
    return path


def best(change, rank):
    u, s, v = np.linalg.svd(change, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def test_a_change_of_low_rank_is_found_whole():
    base, tuned = pair()
    made, report = ml.extract({"m": tuned}, {"m": base}, rank=4)
    assert distance(delta(made), change_of(base, tuned)) < 2e-6
    assert made.info("m").rank == 4
    assert made.info("m").scaling == 1.0
    assert report["m"].energy_kept == pytest.approx(1.0, abs=1e-6)
    assert report["m"].norm == pytest.approx(np.linalg.norm(change_of(base, tuned)), rel=1e-5)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 8), st.integers(1, 8), st.integers(0, 99))
def test_never_worse_than_a_thousandth_above_the_best(n_out, n_in, true, rank, seed):
    base, tuned = pair(n_out, n_in, true, seed, noise=0.1)
    change = change_of(base, tuned)
    made, report = ml.extract({"m": tuned}, {"m": base}, rank=rank, seed=seed)
    lost = np.linalg.norm(delta(made) - change)
    assert lost <= 1.001 * np.linalg.norm(best(change, rank) - change) + 1e-5 * np.linalg.norm(change)
    assert report["m"].error * np.linalg.norm(change) == pytest.approx(lost, rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99, 1.0])
def test_the_least_rank_for_an_energy(share):
    base, tuned = pair(30, 40, 12, noise=0.05)
    change = change_of(base, tuned)
    values = np.linalg.svd(change, compute_uv=False) ** 2
    want = int(np.searchsorted(np.cumsum(values) / values.sum(), share - 1e-9)) + 1
    made, report = ml.extract({"m": tuned}, {"m": base}, energy=share)
    assert abs(made.info("m").rank - want) <= (0 if share < 1 else 1)
    assert report["m"].energy_kept >= share - 1e-5


def test_a_largest_error_and_a_cap_that_is_told():
    base, tuned = pair(30, 40, 12, noise=0.05)
    made, report = ml.extract({"m": tuned}, {"m": base}, max_error=0.3)
    assert report["m"].error <= 0.3
    assert distance(delta(made), change_of(base, tuned)) <= 0.3 + 1e-4
    capped, told = ml.extract({"m": tuned}, {"m": base}, energy=0.999, max_rank=3)
    assert capped.info("m").rank == 3
    assert "max_rank 3" in " ".join(told["m"].notes)
    assert distance(delta(capped), change_of(base, tuned)) == pytest.approx(told["m"].error, rel=1e-3)


def test_transposed_weights_come_out_the_right_way_round():
    base, tuned = pair(20, 30)
    straight, _ = ml.extract({"m": tuned}, {"m": base}, rank=3)
    turned, _ = ml.extract({"m": tuned.T.copy()}, {"m": base.T.copy()}, rank=3, transposed="m")
    assert turned.dims == straight.dims == {"m": (30, 20)}
    assert distance(delta(turned), delta(straight)) < 1e-4


@pytest.mark.parametrize("dtype", CODES)
def test_files_and_shards(tmp_path, dtype):
    names = ["a.q", "b.q"]
    pairs = {name: pair(seed=i) for i, name in enumerate(names)}
    base = {f"{n}.weight": p[0] for n, p in pairs.items()}
    tuned = {f"{n}.weight": p[1] for n, p in pairs.items()}
    base["norm.weight"] = tuned["norm.weight"] = np.ones(5, np.float32)
    base["same.weight"] = tuned["same.weight"] = np.ones((4, 5), np.float32)
    base["a.q.bias"], tuned["a.q.bias"] = np.zeros(3, np.float32), np.ones(3, np.float32)
    one = write(tmp_path / "base.safetensors", base, dtype)
    folder = tmp_path / "tuned"
    folder.mkdir()
    where = {k: f"part-{i % 2}.safetensors" for i, k in enumerate(tuned)}
    for part in sorted(set(where.values())):
        write(folder / part, {k: v for k, v in tuned.items() if where[k] == part}, dtype)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    made, report = ml.extract(folder, one, rank=4)
    assert made.modules() == names
    limit = {"f32": 2e-6, "f16": 2e-3, "bf16": 2e-2}[dtype]
    for name, (b, t) in pairs.items():
        assert distance(delta(made, name), change_of(b, t)) < limit
    notes = " ".join(report.notes)
    assert "same" in notes
    assert "a.q.bias" in notes
    assert "norm" not in notes
    only, told = ml.extract(folder, one, rank=4, modules="b.*")
    assert only.modules() == ["b.q"]
    assert "a.q.weight" in " ".join(told.notes)
    loaded, _ = ml.extract({n: p[1] for n, p in pairs.items()}, {n: p[0] for n, p in pairs.items()}, rank=4)
    if dtype == "f32":
        for name in names:
            assert distance(delta(made, name), delta(loaded, name)) < 1e-6


def test_what_was_fused_comes_out_again(tmp_path):
    r = rng(3)
    base = {"layer.q_proj.weight": normal(r, 24, 16)}
    write(tmp_path / "base.safetensors", base)
    factors = {"layer.q_proj": (normal(r, 3, 16), normal(r, 24, 3))}
    adapter = ml.Adapter.from_factors(factors, alpha=6.0)
    ml.fuse(tmp_path / "base.safetensors", adapter, out=tmp_path / "tuned.safetensors")
    made, _ = ml.extract(tmp_path / "tuned.safetensors", tmp_path / "base.safetensors", rank=3)
    assert distance(delta(made, "layer.q_proj"), delta(adapter, "layer.q_proj")) < 1e-5


@pytest.mark.parametrize("n_in", [1000])
def test_memory_is_bounded_by_the_factors(n_in):
    base, tuned = pair(900, n_in, 8)
    _, report = ml.extract({"m": tuned}, {"m": base}, rank=4)
    assert report.peak_bytes < base.nbytes / 2


BAD = {
    "no measure": ({}, ConfigError, "rank, energy, max_error"),
    "two measures": ({"rank": 2, "energy": 0.9}, ConfigError, "rank and energy"),
    "rank 0": ({"rank": 0}, ConfigError, "rank"),
    "energy 0": ({"energy": 0.0}, ConfigError, "energy"),
    "energy above 1": ({"energy": 1.5}, ConfigError, "energy"),
    "max_error 1": ({"max_error": 1.0}, ConfigError, "max_error"),
    "rank above max_rank": ({"rank": 9, "max_rank": 4}, ConfigError, "max_rank"),
    "no such module": ({"rank": 2, "modules": "x*"}, ConfigError, "modules"),
    "dtype": ({"rank": 2, "dtype": "f8"}, ConfigError, "dtype"),
    "seed": ({"rank": 2, "seed": -1}, ConfigError, "seed"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings(case):
    settings, error, words = BAD[case]
    base, tuned = pair()
    with pytest.raises(error, match=words):
        ml.extract({"m": tuned}, {"m": base}, **settings)


def test_bad_weights(tmp_path):
    base, tuned = pair()
    with pytest.raises(ShapeError, match="module m"):
        ml.extract({"m": tuned}, {"m": base[:, :-1]}, rank=2)
    with pytest.raises(ConfigError, match=r"base.*'m'"):
        ml.extract({"m": tuned}, {"n": base}, rank=2)
    with pytest.raises(ConfigError, match="same weights"):
        ml.extract({"m": base}, {"m": base}, rank=2)
    with pytest.raises(DTypeError, match="two paths or two mappings"):
        ml.extract({"m": tuned}, tmp_path, rank=2)
    broken = tuned.copy()
    broken[3, 4] = np.nan
    with pytest.raises(NonFiniteError, match="module m"):
        ml.extract({"m": broken}, {"m": base}, rank=2)
    one = write(tmp_path / "base.safetensors", {"m.weight": base})
    with pytest.raises(ShapeError, match="module m"):
        ml.extract(write(tmp_path / "t.safetensors", {"m.weight": tuned[:, :-1]}), one, rank=2)
    (tmp_path / "junk.safetensors").write_bytes(b"junk" * 10)
    with pytest.raises(FormatError):
        ml.extract(tmp_path / "junk.safetensors", one, rank=2)
    with pytest.raises(FileNotFoundError):
        ml.extract(tmp_path / "none.safetensors", one, rank=2)


def test_progress_and_cancel():
    base, tuned = pair()
    seen = []
    ml.extract({"m": tuned}, {"m": base}, rank=2, progress=lambda d, t, w: seen.append((d, t, w)))
    assert seen[-1] == (1, 1, "extract")
    token = CancelToken()
    token.cancel()
    with pytest.raises(CancelledError):
        ml.extract({"m": tuned}, {"m": base}, rank=2, cancel=token)


def test_a_state_dict_is_understood():
    base, tuned = pair()
    names = {"model.q_proj.weight": (tuned, base), "model.norm.weight": (np.ones(3, "f4"), np.zeros(3, "f4"))}
    made, report = ml.extract(
        {k: v[0] for k, v in names.items()}, {k: v[1] for k, v in names.items()}, rank=4
    )
    assert made.modules() == ["model.q_proj"]
    assert "model.norm.weight" in " ".join(report.notes)
