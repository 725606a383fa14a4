"""Quantised adapters: types, fallbacks, errors against dense twins, budgets, profiles, reports."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import microlora as ml
from microlora.exceptions import CancelledError, ConfigError, DTypeError, NonFiniteError, ShapeError
from microlora.quantizing.measure import Measured, relative
from microlora.quantizing.search import options, smallest
from microlora.quantizing.types import BLOCKS, Name, Pair, candidates, fitting, size_of, stored
from support import normal, rng

BLOCK_TYPES = list(BLOCKS)


def adapter(widths=((512, 256), (256, 768)), rank=8, seed=0, size=1.0, dtype="f32", **more):
    """Modules m0, m1, ... of these widths."""
    r, factors = rng(seed), {}
    for i, (n_in, n_out) in enumerate(widths):
        a = normal(r, rank, n_in) / np.sqrt(n_in)
        b = normal(r, n_out, rank) * size * (1.0 + i) / np.sqrt(rank)
        factors[f"m{i}"] = (a.astype(np.float32), b.astype(np.float32))
    return ml.Adapter.from_factors(factors, alpha=2.0 * rank, dtype=dtype, **more)


def dense(value, module):
    """Weight change (in, out) in float64."""
    a, b = (v.astype(np.float64) for v in value.factors(module))
    return value.info(module).scaling * (a.T @ b.T)


def change(before, made, module):
    """Weight change before, and what storing it changed."""
    whole = dense(before, module)
    return whole, dense(made.dequantize(), module) - whole


# -- types --


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_all_factors_in_one_type(name):
    value = adapter()
    made, report = ml.quantize(value, name)
    assert isinstance(made, ml.QuantizedAdapter)
    assert all(m.types == (name, name) == m.asked and not m.fell_back for m in report.modules)
    elements, size = BLOCKS[name].elements, BLOCKS[name].bytes
    for m in report.modules:
        assert m.bytes_after == m.rank * (m.in_features + m.out_features) // elements * size
        assert m.bytes_before == 4 * m.rank * (m.in_features + m.out_features)
    assert report.memory_after == made.memory_bytes < report.memory_before == value.memory_bytes
    assert report.recipe == name


def test_capital_letters_and_the_named_recipe():
    report = ml.quantize(adapter(), "Q4_K_M").report
    assert [m.types for m in report.modules] == [("q4_k", "q6_k")] * 2
    assert report.recipe == "q4_k_m"
    q4, q6 = (ml.quantize(adapter(), t).report for t in ("Q4_K", "q6_k"))
    assert q6.delta_error < report.delta_error < q4.delta_error
    assert q4.bytes_after < report.bytes_after < q6.bytes_after


@pytest.mark.parametrize(
    ("types", "want"),
    [
        ({"lora_a": "q4_k", "lora_b": "q8_0"}, [("q4_k", "q8_0")] * 2),
        ({"*": "q8_0"}, [("q8_0", "q8_0")] * 2),
        ({"m0": "q6_k", "*": ("f16", "q4_0")}, [("q6_k", "q6_k"), ("f16", "q4_0")]),
        ({"m0": {"lora_a": "f32", "lora_b": "bf16"}, "m1": "q4_k_m"}, [("f32", "bf16"), ("q4_k", "q6_k")]),
    ],
)
def test_mixed_types(types, want):
    value = adapter()
    made, report = ml.quantize(value, types)
    assert [m.types for m in report.modules] == want
    for m in report.modules:
        a, b = value.factors(m.name)
        got = made.dequantize().factors(m.name)
        np.testing.assert_array_equal(got[0], stored(a, m.types[0], Name(m.name, "lora_a")))
        np.testing.assert_array_equal(got[1].T, stored(b.T.copy(), m.types[1], Name(m.name, "lora_b")))


def test_widths_that_are_no_whole_blocks_fall_back():
    value = adapter(((256, 96), (784, 10)))
    report = ml.quantize(value, "q4_k").report
    assert [m.types for m in report.modules] == [("q4_k", "q8_0"), ("f16", "f16")]
    assert [m.fell_back for m in report.modules] == [("lora_b",), ("lora_a", "lora_b")]
    text = str(report)
    assert "q8_0*" in text
    assert "not whole blocks" in text
    assert "*" not in str(ml.quantize(adapter(), "q4_k").report)
    kept = ml.quantize(adapter(((784, 10),), dtype="bf16"), "q8_0").report
    assert kept.modules[0].types == ("bf16", "bf16")
    assert kept.delta_error == 0.0


def test_blocks_of_b_along_the_rank():
    value = adapter(((256, 96), (256, 10)), rank=32)
    made, report = ml.quantize(value, "q4_k", b_along_rank=True, calibration=normal(rng(1), 20, 256))
    assert [m.types for m in report.modules] == [("q4_k", "q8_0")] * 2
    for m in report.modules:
        whole, off = change(value, made, m.name)
        assert m.delta_error == pytest.approx(np.linalg.norm(off) / np.linalg.norm(whole), rel=1e-6)
        b = stored(value.lora_b(m.name), "q8_0", Name(m.name, "lora_b"))
        np.testing.assert_array_equal(made.dequantize().lora_b(m.name), b)
    small = ml.quantize(adapter(rank=8), "q8_0", b_along_rank=True).report
    assert {m.types for m in small.modules} == {("q8_0", "f16")}
    found = ml.quantize(value, target_error=0.05, b_along_rank=True).report
    assert found.delta_error == pytest.approx(found.reached_error, rel=1e-9)
    with pytest.raises(ConfigError, match="b_along_rank: got 1"):
        ml.quantize(value, "q8_0", b_along_rank=1)


@given(st.sampled_from([*BLOCK_TYPES, "f16", "f32"]), st.integers(1, 2048), st.sampled_from(["f32", "bf16"]))
def test_fitting_always_fits(name, width, dtype):
    got = fitting(name, width, dtype)
    assert got not in BLOCKS or width % BLOCKS[got].elements == 0
    assert got == name or width % BLOCKS[name].elements
    assert got in candidates(width, dtype) or got == name
    assert size_of(got, (3, width)) >= 0


@pytest.mark.parametrize(
    ("types", "words"),
    [
        ("q3_k", "type: got 'q3_k', expected one of 'q8_0'"),
        ("", "type: got ''"),
        ({"m0": "q8_0"}, "nothing for module 'm1'"),
        ({"m0": "q8_0", "m1": "q8_0", "m3": "q8_0"}, "got module 'm3'.*did you mean"),
        ({"m0": "q8_0", "*": "q9"}, r"type\['\*'\]: got 'q9'"),
        ({"lora_a": "q8_0"}, "expected lora_a and lora_b"),
        ({"*": {"lora_a": "q8_0"}}, "expected lora_a and lora_b"),
        ({"*": ("q8_0", "q4_k_m")}, r"type\['\*'\]\[1\]: got 'q4_k_m'"),
        ({"*": 7}, r"type\['\*'\]: got 7"),
        ({}, "nothing for module 'm0'"),
    ],
)
def test_types_that_are_none(types, words):
    with pytest.raises(ConfigError, match=words):
        ml.quantize(adapter(), types)


def test_other_bad_input():
    value = adapter()
    with pytest.raises(DTypeError, match="type: got int"):
        ml.quantize(value, 8)
    with pytest.raises(ConfigError, match="type, target_error: got neither"):
        ml.quantize(value)
    with pytest.raises(ConfigError, match="type, target_error: got both"):
        ml.quantize(value, "q8_0", target_error=0.1)
    for bad in (0.0, 1.0, -0.1, float("nan"), "x", True):
        with pytest.raises(ConfigError, match="target_error: got"):
            ml.quantize(value, target_error=bad)
    with pytest.raises(DTypeError, match="adapter: got int"):
        ml.quantize(3, "q8_0")
    with pytest.raises(DTypeError, match="is quantised already"):
        ml.quantize(ml.quantize(value, "q8_0").adapter, "q8_0")
    huge = ml.Adapter.from_factors({"m": (np.full((1, 32), 1e9, "f4"), np.ones((32, 1), "f4"))}, alpha=1)
    with pytest.raises(NonFiniteError, match=r"module m, lora_a: .*too large for a q8_0 scale"):
        ml.quantize(huge, "q8_0")
    with pytest.raises(NonFiniteError, match="module m, lora_a: holds numbers too large for f16"):
        ml.quantize(huge, "f16")


# -- errors --


@pytest.mark.parametrize("name", ["q8_0", "q4_k", "q4_k_m", "f16", "bf16", "f32"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_errors_are_those_of_dense_matrices(name, use_rslora):
    value = adapter(use_rslora=use_rslora)
    x = {"m0": normal(rng(3), 90, 512), "m1": np.abs(normal(rng(4), 40, 256)).astype(np.float64)}
    made, report = ml.quantize(value, name, calibration=x)
    totals = np.zeros(4)
    for m in report.modules:
        whole, off = change(value, made, m.name)
        norms = [np.linalg.norm(v) for v in (off, whole, x[m.name] @ off, x[m.name] @ whole)]
        assert m.delta_error == pytest.approx(norms[0] / norms[1], rel=1e-6, abs=1e-12)
        assert m.delta_norm == pytest.approx(norms[1], rel=1e-9)
        assert m.output_error == pytest.approx(norms[2] / norms[3], rel=1e-6, abs=1e-12)
        assert m.output_norm == pytest.approx(norms[3] / np.sqrt(len(x[m.name])), rel=1e-9)
        n = len(x[m.name])
        totals += np.square(norms) / [1, 1, n, n]
    assert report.delta_error == pytest.approx(np.sqrt(totals[0] / totals[1]), rel=1e-6, abs=1e-12)
    assert report.output_error == pytest.approx(np.sqrt(totals[2] / totals[3]), rel=1e-6, abs=1e-12)
    assert report.quality == 1 - report.output_error
    assert (report.delta_error == 0) == (name == "f32")


def test_a_gram_stands_for_its_inputs():
    value, x = adapter(((64, 32),)), normal(rng(5), 300, 64) * np.linspace(0.1, 3, 64).astype(np.float32)
    lora = ml.MicroLoRA(ml.LoraConfig(rank=8, target_modules=("m0",)), dims={"m0": (64, 32)})
    gram = ml.collect_gram(lora, x, "m0")
    by_rows, by_gram = (ml.quantize(value, "q4_0", calibration={"m0": c}).report for c in (x, gram))
    assert by_gram.output_error == pytest.approx(by_rows.output_error, rel=1e-4)
    assert by_gram.output_error != pytest.approx(by_gram.delta_error, rel=1e-3)


def test_one_calibration_for_all_modules_of_a_width():
    value, x = adapter(((256, 32), (256, 64))), normal(rng(6), 50, 256)
    one = ml.quantize(value, "q8_0", calibration=x).report
    assert one == ml.quantize(value, "q8_0", calibration={"m0": x, "m1": x}).report
    some = ml.quantize(value, "q8_0", calibration={"m1": x}).report
    assert some["m0"].output_error is None
    assert some["m1"] == one["m1"]
    assert some.output_error == pytest.approx(one["m1"].output_error, rel=1e-12)


def test_bad_calibration():
    value = adapter()
    x = normal(rng(7), 10, 512)
    with pytest.raises(
        ShapeError, match=r"calibration, module m1: got shape \(10, 512\), expected \(n, 256\)"
    ):
        ml.quantize(value, "q8_0", calibration=x)
    with pytest.raises(ConfigError, match="calibration: got module 'm9'"):
        ml.quantize(value, "q8_0", calibration={"m9": x})
    for bad, error in [
        (x[0], ShapeError),
        (x[:0], ShapeError),
        (x.astype(int), DTypeError),
        (np.full((2, 512), np.nan), NonFiniteError),
    ]:
        with pytest.raises(error, match=r"calibration\['m0'\]"):
            ml.quantize(value, "q8_0", calibration={"m0": bad})


def test_a_module_that_does_nothing():
    zero = ml.Adapter.from_factors({"m": (np.ones((2, 32), "f4"), np.zeros((32, 2), "f4"))}, alpha=1)
    report = ml.quantize(zero, "q4_0", calibration=normal(rng(8), 4, 32)).report
    assert (report.delta_error, report.output_error, report.quality) == (0.0, 0.0, 1.0)
    assert ml.quantize(zero, target_error=0.01).report.modules[0].types in {("q4_0", "q4_0")}


# -- budgets --


@pytest.mark.parametrize("target", [0.001, 0.004, 0.01, 0.02, 0.05, 0.12])
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_budget_is_kept_and_reached_error_is_what_is_measured(target, calibrated):
    value = adapter(((512, 256), (256, 768), (96, 40)))
    x = {m: normal(rng(9), 30, n) for m, (n, _) in value.dims.items()} if calibrated else None
    report = ml.quantize(value, target_error=target, calibration=x).report
    got = report.output_error if calibrated else report.delta_error
    assert report.measure == ("output" if calibrated else "delta")
    assert got == pytest.approx(report.reached_error, rel=1e-9)
    assert got <= target == report.target_error
    assert all(m.asked is None and not m.fell_back for m in report.modules)


def test_smaller_errors_take_more_bytes():
    value = adapter(((512, 256), (256, 768), (96, 40)), seed=1)
    sizes = [ml.quantize(value, target_error=t).report.bytes_after for t in (0.001, 0.006, 0.02, 0.06, 0.15)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) >= 4


@pytest.mark.parametrize("seed", range(6))
def test_budget_is_near_the_best_of_all_choices(seed):
    """Against all combinations of options: never smaller, little larger; no module could go back alone."""
    r = rng(seed)
    shapes = ((256, 512), (512, 32), (96, 256))
    value = adapter(shapes, rank=4, seed=seed, size=float(r.uniform(0.2, 2)))
    modules = [Measured.of(value, name, None) for name in value.modules()]
    total = sum(m.delta(m.dtypes)[1] ** 2 for m in modules)
    tables = [options(m, m.delta(m.dtypes)[1] ** 2 / total) for m in modules]
    excess = []
    for target in (0.003, 0.005, 0.01, 0.02, 0.04, 0.07):
        found = smallest(modules, target, None, None)
        pairs = [found.types[m.name] for m in modules]
        chosen = [next(o for o in t if o.types == p) for t, p in zip(tables, pairs, strict=True)]
        cost, size = sum(o.cost for o in chosen), sum(o.bytes for o in chosen)
        assert cost <= target**2
        for one, table in zip(chosen, tables, strict=True):
            assert all(cost - one.cost + o.cost > target**2 for o in table if o.bytes < one.bytes)
        best = min(
            a.bytes + b.bytes + c.bytes
            for a in tables[0]
            for b in tables[1]
            for c in tables[2]
            if a.cost + b.cost + c.cost <= target**2
        )
        excess.append(size / best)
    assert min(excess) >= 1
    assert max(excess) <= 1.06
    assert np.mean(excess) <= 1.015


def test_options_beat_one_another_in_one_way():
    value = adapter()
    table = options(Measured.of(value, "m0", None), 1.0)
    assert [o.bytes for o in table] == sorted({o.bytes for o in table})
    assert [o.cost for o in table] == sorted((o.cost for o in table), reverse=True)
    assert table[0].types == Pair("q4_k", "q4_k") or table[0].bytes == size_of("q4_0", (8, 768))


def test_a_budget_that_nothing_keeps_names_the_best():
    value = adapter()
    with pytest.raises(
        ConfigError, match=r"target_error: got 1e-06, expected at least (\S+), the delta"
    ) as e:
        ml.quantize(value, target_error=1e-6)
    best = float(str(e.value).split("at least ")[1].split(",")[0])
    assert ml.quantize(value, target_error=1.01 * best).report.delta_error <= 1.01 * best


def test_a_budget_of_some_outputs_says_so():
    value = adapter()
    report = ml.quantize(value, target_error=0.02, calibration={"m1": normal(rng(1), 9, 256)}).report
    assert report.measure == "output and delta"
    assert report.reached_error <= 0.02


def test_progress_and_cancel():
    seen = []
    ml.quantize(adapter(), target_error=0.02, progress=lambda *a: seen.append(a))
    assert [(d, t) for d, t, _ in seen] == [(1, 2), (2, 2)] * 2
    assert seen[0][2] == "measured m0"
    assert seen[-1][2] == "quantised m1"
    token = ml.CancelToken()
    token.cancel()
    for how in ({"type": "q8_0"}, {"target_error": 0.02}):
        with pytest.raises(CancelledError):
            ml.quantize(adapter(), cancel=token, **how)


# -- profiles and reports --


@pytest.mark.parametrize(
    ("names", "field"),
    [
        (("mobile", "intent_classifier"), "adapter_type"),
        (("Desktop", "ContentGenerator"), "adapter_type"),
        (("server", "server"), "adapter_type"),
        (("poet", "workflow-builder"), "device"),
    ],
)
def test_a_profile_s_names_in_each_other_s_place_are_refused(names, field):
    value = names[field == "device"]
    with pytest.raises(ConfigError, match=f"^{field}: got '{value}', expected .*the other way round"):
        ml.quantization_profile(*names)


@pytest.mark.parametrize(
    ("names", "recipe", "figures"),
    [
        (("intent_classifier", "mobile"), "q4_k_m", (0.85, 0.75, 2.0)),
        (("IntentClassifier", "Mobile"), "q4_k_m", (0.85, 0.75, 2.0)),
        (("content_generator", "desktop"), "q6_k", (0.95, 0.5, 1.3)),
        (("workflow-builder", "server"), "q8_0", (0.98, 0.25, 1.1)),
        (("intent_classifier", "server"), "q6_k", (0.95, 0.5, 1.3)),
        (("poet", "toaster"), "q6_k", (0.95, 0.5, 1.3)),
    ],
)
def test_profiles(names, recipe, figures):
    profile = ml.quantization_profile(*names)
    assert profile.recipe == recipe
    assert (profile.quality_threshold, profile.size_reduction, profile.inference_speed_gain) == figures
    assert bool(profile.device) == (
        names[1].lower() in ("mobile", "desktop") or names[0] == "workflow-builder"
    )
    report = ml.quantize(adapter(), profile).report
    assert report.recipe == recipe
    assert {m.types for m in report.modules} == {tuple(profile.types)}
    assert report.quality_threshold == profile.quality_threshold
    assert "quality wanted" in str(report)
    assert ("MISSED" in str(report)) == (report.quality < profile.quality_threshold)


def test_profile_names_that_are_none():
    for bad in (("", "mobile"), ("poet", 3), (None, "mobile")):
        with pytest.raises(ConfigError, match=r"adapter_type|device"):
            ml.quantization_profile(*bad)


def test_report_reads_back_and_prints():
    value = adapter()
    for report in (
        ml.quantize(value, "q4_k", calibration={"m0": normal(rng(2), 7, 512)}).report,
        ml.quantize(value, target_error=0.03).report,
        ml.quantize(value, ml.quantization_profile("content_generator", "desktop")).report,
    ):
        assert ml.QuantizationReport.from_json(report.to_json()) == report
        assert json.loads(report.to_json())["modules"][0]["name"] == "m0"
        lines = str(report).splitlines()
        assert max(map(len, lines)) <= 110
        assert lines[1].startswith("m0")
    by_type = ml.quantize(value, {"m0": "q8_0", "m1": "q4_0"}).report.bytes_by_type()
    assert by_type[("q8_0", "q8_0")] == (1, 4 * 8 * 768, 8 * 768 // 32 * 34)
    assert by_type[("q4_0", "q4_0")][0] == 1


def test_sources(tmp_path):
    value = adapter(((64, 32),))
    ml.save(value, tmp_path / "a.safetensors")
    report = ml.quantize(value, "q8_0").report
    assert ml.quantize(tmp_path / "a.safetensors", "q8_0").report == report
    lora = ml.MicroLoRA(value.config, dims=value.dims)
    lora.import_weights(value.to_bytes())
    assert ml.quantize(lora, "q8_0").report == report
    ml.save(ml.quantize(value, "q8_0").adapter, tmp_path / "q.safetensors")
    with pytest.raises(ml.MicroLoraError, match="quantised"):
        ml.quantize(tmp_path / "q.safetensors", "q4_0")


def test_relative_of_nothing():
    assert relative((0.0, 0.0)) == 0.0
    assert relative((1.0, 4.0)) == 0.25
