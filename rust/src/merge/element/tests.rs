//! Every method against its float64 twin on the same entries, on every ISA; laws; memory is in tests/merge_memory.rs.

use super::super::spec::{ModulePlan, Plan, Semantics, Statistics};
use super::*;
use crate::dtype::Dtype;
use crate::factor::Factor;
use crate::merge::METHODS;

mod twin;

use twin::*;

/// One parent as a test makes it.
struct Made {
    name: String,
    layer: Layer,
    weight: f64,
    statistics: Statistics,
}

fn numbers(n: usize, rng: &mut Rng) -> Vec<f32> {
    (0..n).map(|_| rng.symmetric(1.0) + rng.symmetric(1.0)).collect()
}

/// Parents of different ranks, dtypes and scalings; the third is zero.
fn parents(m: usize, rows: usize, cols: usize, seed: u64) -> Vec<Made> {
    let mut rng = Rng::new(seed, 9);
    let of = |i: usize| {
        let rank = [3, 1, 2, 5, 4][i];
        let dtype = [Dtype::F32, Dtype::F16, Dtype::Bf16, Dtype::F32, Dtype::F16][i];
        let a = Factor::from_rows(&numbers(rank * cols, &mut rng), rank, cols, dtype);
        let b = if i == 2 { vec![0.0; rank * rows] } else { numbers(rank * rows, &mut rng) };
        let b = Factor::from_rows(&b, rank, rows, dtype);
        let squares = |n: usize, rng: &mut Rng| numbers(n, rng).iter().map(|v| v * v).collect::<Vec<_>>();
        let statistics =
            Statistics { gram: None, importance: Some((squares(cols, &mut rng), squares(rows, &mut rng))) };
        Made {
            name: ["m", "z", "a", "q", "b"][i].into(),
            layer: Layer::new(a, b, 1.5 * (i + 1) as f64, i % 2 == 1).unwrap(),
            weight: 1.0,
            statistics,
        }
    };
    (0..m).map(of).collect()
}

fn borrowed(of: &[Made]) -> Vec<Parent<'_>> {
    of.iter()
        .map(|p| Parent { name: &p.name, layer: &p.layer, weight: p.weight, statistics: Some(&p.statistics) })
        .collect()
}

/// A checked spec from settings in JSON: `"density": 0.3, ...`.
fn spec(method: &str, settings: &str, semantics: &str) -> Spec {
    let comma = if settings.is_empty() { "" } else { "," };
    let module =
        format!(r#"{{"name": "m", "parents": [], "weights": [], "method": "{method}"{comma} {settings}}}"#);
    let module: ModulePlan = serde_json::from_str(&module).unwrap();
    let plan: Plan =
        serde_json::from_str(&format!(r#"{{"semantics": "{semantics}", "modules": []}}"#)).unwrap();
    Spec::new(&module, &plan).unwrap()
}

fn prepare_of(spec: &Spec) -> Prepare {
    match spec.method.run {
        crate::merge::method::Run::Element(prepare) => prepare,
        _ => panic!("{} is not element-wise", spec.method.name),
    }
}

/// The whole merged change before truncation.
fn whole_of(k: &Kernels, of: &[Made], spec: &Spec) -> Vec<f32> {
    let mut parents = borrowed(of);
    parents.sort_by_key(|p| p.name);
    let deltas = Deltas::new("mod", &parents).unwrap();
    let c = Context { k, module: "mod", parents: &parents, deltas: &deltas, spec, peak: Cell::new(0) };
    let method = prepare_of(spec)(&c, &mut |_, _| Ok(())).unwrap();
    let mut blocks = Blocks::new(k, &deltas, method);
    let mut out = vec![0.0; deltas.entries()];
    // Twice, because every pass must see the same.
    for _ in 0..2 {
        let before = out.clone();
        for block in crate::algebra::blocks(deltas.rows(), deltas.cols()) {
            let span = block.start * deltas.cols()..block.end * deltas.cols();
            blocks.tile(block.start, &mut out[span]).unwrap();
        }
        assert!(before.iter().all(|v| *v == 0.0) || before == out, "passes differ");
    }
    out
}

/// Each parent's change as the crate streams it, in f64: so that thresholds meet the same numbers.
fn changes(k: &Kernels, of: &[Made]) -> Vec<Vec<f64>> {
    let parents = borrowed(of);
    let deltas = Deltas::new("mod", &parents).unwrap();
    let mut out = vec![Vec::new(); parents.len()];
    deltas
        .stream(k, 0..parents.len(), &mut |_, _| Ok(()), &mut |_, tiles| {
            out.iter_mut().zip(tiles).for_each(|(o, t)| o.extend(t.iter().map(|v| f64::from(*v))));
            Ok(())
        })
        .unwrap();
    out
}

// -- twins --

/// Settings that the methods take, in turn.
fn settings(method: &str, turn: usize) -> String {
    let row = METHODS.iter().find(|m| m.name == method).unwrap();
    let mut out = vec![format!(r#""lam": {}"#, [1.0, -0.7, 2.5][turn % 3])];
    let mut add = |name: &str, value: String| {
        if row.default(name).is_some() {
            out.push(format!(r#""{name}": {value}"#));
        }
    };
    let least = if method.starts_with("della") { 0.4 } else { 0.07 };
    add("density", [0.3, 0.55, least, 0.8][turn % 4].to_string());
    add("gamma", [0.01, 0.0, 0.15][turn % 3].to_string());
    add("epsilon", [0.1, 0.0, 0.12][turn % 3].to_string());
    add("normalize", turn.is_multiple_of(2).to_string());
    add("majority", [r#""total""#, r#""frequency""#][turn / 2 % 2].into());
    add("seed", (turn % 5).to_string());
    out.join(", ")
}

fn element_methods() -> impl Iterator<Item = &'static str> {
    METHODS.iter().filter(|m| m.family == crate::merge::Family::Element).map(|m| m.name)
}

#[test]
fn every_method_is_its_float64_twin_on_every_isa() {
    assert!(element_methods().count() >= 10);
    for k in Kernels::available() {
        for method in element_methods() {
            for turn in 0..24 {
                // Blocks of 96 rows: several of them, the last one partial; rows of one and of many columns.
                let (rows, cols) = [(1, 7), (9, 1), (13, 37), (230, 66), (5, 400)][turn % 5];
                let mut of = parents(1 + turn % 5, rows, cols, turn as u64);
                for (i, p) in of.iter_mut().enumerate() {
                    p.weight = [1.0, 2.5, 1.0, 0.5, 0.0][(i + turn) % 5];
                    if turn % 4 == 3 && i == 1 && method != "fisher" {
                        p.weight = -0.6;
                    }
                }
                if of.len() == 1 {
                    of[0].weight = 1.0;
                }
                let semantics = ["exact", "mergekit"][turn / 3 % 2];
                let settings = settings(method, turn);
                let s = spec(method, &settings, semantics);
                let got = whole_of(k, &of, &s);
                let want = twin(&of, &changes(k, &of), cols, &s);
                let size = want.iter().fold(0.0f64, |a, v| a.max(v.abs())).max(1e-3);
                for (j, (g, w)) in got.iter().zip(&want).enumerate() {
                    let off = (f64::from(*g) - w).abs();
                    assert!(
                        off <= 3e-6 * size,
                        "{method} {settings} {semantics} on {}: entry {j} is {g}, not {w}",
                        k.isa()
                    );
                }
            }
        }
    }
}

#[test]
fn blocks_are_the_products_of_the_factors() {
    for k in Kernels::available() {
        for (rows, cols) in [(1, 1), (7, 40), (200, 33), (3, 9000)] {
            let of = parents(5, rows, cols, 4);
            for (p, got) in of.iter().zip(changes(k, &of)) {
                let (a, b) = (p.layer.a.to_f32(false), p.layer.b.to_f32(false));
                let at = |j: usize, i: usize| -> f64 {
                    let terms =
                        (0..p.layer.rank()).map(|r| f64::from(a[r * cols + i]) * f64::from(b[r * rows + j]));
                    p.layer.exact_scaling() * terms.sum::<f64>()
                };
                for (n, got) in got.iter().enumerate() {
                    assert!((got - at(n / cols, n % cols)).abs() <= 1e-5, "{} {rows}x{cols}", k.isa());
                }
            }
        }
    }
}

#[test]
fn nothing_dropped_is_the_plain_sum_and_one_parent_is_itself() {
    let k = Kernels::detect().unwrap();
    for method in element_methods().filter(|m| *m != "fisher") {
        let row = METHODS.iter().find(|m| m.name == method).unwrap();
        let all = ["density", "gamma", "epsilon"]
            .map(|name| row.default(name).map(|_| format!(r#""{name}": {}"#, u8::from(name == "density"))));
        let s = spec(method, &all.into_iter().flatten().collect::<Vec<_>>().join(", "), "exact");
        let one = &parents(2, 20, 30, 1)[1..];
        let own = &changes(k, one)[0];
        for (got, own) in whole_of(k, one, &s).iter().zip(own) {
            assert!((f64::from(*got) - own).abs() <= 1e-6 * own.abs(), "{method}: {got} {own}");
        }
        if row.laws.contains(&"weights_linear") {
            let of = parents(5, 20, 30, 1);
            let d = changes(k, &of);
            for (j, got) in whole_of(k, &of, &s).iter().enumerate() {
                let want: f64 = d.iter().map(|d| d[j]).sum();
                assert!((f64::from(*got) - want).abs() <= 1e-5, "{method}");
            }
        }
    }
}

#[test]
fn the_order_of_parents_changes_no_bit_and_a_power_of_two_only_the_exponent() {
    let k = Kernels::detect().unwrap();
    for method in element_methods() {
        let mut of = parents(5, 60, 50, 2);
        of.iter_mut().enumerate().for_each(|(i, p)| p.weight = 1.0 + 0.3 * i as f64);
        let s = spec(method, "", "exact");
        let one = whole_of(k, &of, &s);
        let run =
            |of: &[Made]| merge(k, prepare_of(&s), "mod", &borrowed(of), &s, &mut |_, _| Ok(())).unwrap();
        let a = run(&of);
        of.swap(0, 3);
        of.reverse();
        assert_eq!(one, whole_of(k, &of, &s), "{method}");
        let b = run(&of);
        assert_eq!(
            (a.factors.a, a.factors.b, a.peak_bytes),
            (b.factors.a, b.factors.b, b.peak_bytes),
            "{method}"
        );
        for p in &mut of {
            p.layer.alpha *= -0.125;
        }
        let scaled = whole_of(k, &of, &s);
        // A draw goes to the positive side, which a change of sign turns around; there is none here.
        assert!(one.iter().zip(&scaled).all(|(a, b)| -0.125 * a == *b), "{method}");
    }
}

#[test]
fn weights_count_as_the_table_says() {
    let k = Kernels::detect().unwrap();
    for method in element_methods() {
        let laws = METHODS.iter().find(|m| m.name == method).unwrap().laws;
        let s = spec(method, "", "exact");
        let mut of = parents(4, 40, 50, 3);
        let one = whole_of(k, &of, &s);
        of.iter_mut().for_each(|p| p.weight = 3.0);
        let more = whole_of(k, &of, &s);
        let by = if laws.contains(&"weights_linear") { 3.0 } else { 1.0 };
        for (a, b) in one.iter().zip(&more) {
            assert!((by * a - b).abs() <= 1e-5 * b.abs(), "{method}: {a} {b}");
        }
    }
}

#[test]
fn the_residual_is_that_of_the_best_rank_and_memory_is_told() {
    for k in Kernels::available() {
        for method in element_methods() {
            let of = parents(4, 150, 110, 6);
            let mut s = spec(method, "", "exact");
            s.rank = Some(6);
            s.full = true;
            let made = merge(k, prepare_of(&s), "mod", &borrowed(&of), &s, &mut |_, _| Ok(())).unwrap();
            let whole = nalgebra::DMatrix::from_row_iterator(
                150,
                110,
                whole_of(k, &of, &s).iter().map(|v| f64::from(*v)),
            );
            let f = &made.factors;
            let a = nalgebra::DMatrix::from_row_iterator(f.rank, 110, f.a.iter().map(|v| f64::from(*v)));
            let b = nalgebra::DMatrix::from_row_iterator(f.rank, 150, f.b.iter().map(|v| f64::from(*v)));
            let got = (&whole - b.transpose() * a).norm();
            let mut values: Vec<f64> = whole.singular_values().iter().copied().collect();
            values.sort_by(|a, b| b.total_cmp(a));
            let best = values[6..].iter().map(|v| v * v).sum::<f64>().sqrt();
            assert!(got <= 1.001 * best, "{method}: {got} {best}");
            assert!((f.error() * f.norm2.sqrt() - got).abs() <= 1e-3 * got, "{method}");
            assert!(made.peak_bytes > 0 && made.rank == 6);
            let d = changes(k, &of);
            let (mut opposite, mut some) = (0, 0);
            for j in 0..d[0].len() {
                let (up, down) = (d.iter().any(|d| d[j] > 0.0), d.iter().any(|d| d[j] < 0.0));
                opposite += usize::from(up && down);
                some += usize::from(up || down);
            }
            assert_eq!(made.sign_conflict, Some(opposite as f64 / some as f64));
        }
    }
}

#[test]
fn zeros_stay_zeros() {
    let k = Kernels::detect().unwrap();
    for method in element_methods() {
        let zero = || {
            let mut of = parents(3, 30, 20, 1);
            of.drain(..2);
            of
        };
        let mut of = zero();
        of.extend(zero());
        of[1].name = "other".into();
        let s = spec(method, "", "exact");
        assert!(whole_of(k, &of, &s).iter().all(|v| *v == 0.0), "{method}");
        let made = merge(k, prepare_of(&s), "mod", &borrowed(&of), &s, &mut |_, _| Ok(())).unwrap();
        assert_eq!((made.factors.norm2, made.factors.kept2), (0.0, 0.0), "{method}");
        assert!(!made.notes.is_empty());
    }
}

#[test]
fn equal_entries_stay_or_go_together() {
    // A rank-one change of equal magnitudes: no entry is larger than another.
    let (rows, cols) = (40, 50);
    let sign = |n: usize, s: usize| {
        (0..n).map(|i| if (i * s).is_multiple_of(3) { -0.5 } else { 0.5 }).collect::<Vec<f32>>()
    };
    let layer = Layer::new(
        Factor::from_rows(&sign(cols, 1), 1, cols, Dtype::F32),
        Factor::from_rows(&sign(rows, 2), 1, rows, Dtype::F32),
        1.0,
        false,
    );
    let of =
        [Made { name: "a".into(), layer: layer.unwrap(), weight: 1.0, statistics: Statistics::default() }];
    for k in Kernels::available() {
        for method in ["ties", "magnitude_prune", "breadcrumbs"] {
            let got = whole_of(k, &of, &spec(method, r#""density": 0.2"#, "exact"));
            assert!(got.iter().zip(&changes(k, &of)[0]).all(|(g, d)| f64::from(*g) == *d), "{method}");
        }
    }
}

#[test]
fn what_cannot_be_merged_is_a_typed_error() {
    let k = Kernels::detect().unwrap();
    let run = |of: &[Made], method: &str| {
        let s = spec(method, "", "exact");
        merge(k, prepare_of(&s), "mod", &borrowed(of), &s, &mut |_, _| Ok(())).err().map(|e| e.to_string())
    };
    let mut of = parents(2, 30, 20, 1);
    of[1].layer.alpha = 1e38;
    let text = run(&of, "ties").unwrap();
    assert!(text.contains("\"z\"") && text.contains("mod"), "{text}");

    let mut of = parents(2, 30, 20, 1);
    of[0].weight = 1e38;
    let text = run(&of, "magnitude_prune").unwrap();
    assert!(text.contains("module mod"), "{text}");

    for (change, want) in [
        (Statistics::default(), "none"),
        (Statistics { gram: None, importance: Some((vec![1.0; 20], vec![1.0; 29])) }, "(29,)"),
        (Statistics { gram: None, importance: Some((vec![-1.0; 20], vec![1.0; 30])) }, "negative"),
    ] {
        let mut of = parents(2, 30, 20, 1);
        of[1].statistics = change;
        let text = run(&of, "fisher").unwrap();
        assert!(text.contains(want) && text.contains("statistics[\"z\"]"), "{text}");
    }
    let mut of = parents(2, 30, 20, 1);
    of[1].weight = -1.0;
    assert!(run(&of, "fisher").unwrap().contains("weights[\"z\"]"));
}

#[test]
fn every_method_can_be_cancelled_at_any_time() {
    let k = Kernels::detect().unwrap();
    let of = parents(3, 200, 150, 1);
    for method in element_methods() {
        let s = spec(method, "", "exact");
        let mut after = 0;
        loop {
            let mut left = after;
            let tick = &mut |_: usize, _: usize| {
                left -= 1;
                if left < 0 { Err(Error::Cancelled("now".into())) } else { Ok(()) }
            };
            match merge(k, prepare_of(&s), "mod", &borrowed(&of), &s, tick) {
                Ok(_) => break,
                Err(e) => assert!(matches!(e, Error::Cancelled(_))),
            }
            after += 1;
        }
        assert!(after >= 4, "{method} ticked {after} times");
    }
}
