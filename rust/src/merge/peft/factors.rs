//! PEFT's operators on lists of tensors: trim, random drop, elected signs, sums.

use std::ops::Range;

use crate::algebra::Stack;
use crate::merge::element::mask;
use crate::merge::spec::{Majority, Parent, Spec};

/// What is done with the tensors of the parents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    Sum,
    Ties,
    DareLinear,
    DareTies,
    Prune,
}

/// A and B of the result, rank-major; scaling 1.
pub(super) fn combine(
    stack: &Stack,
    groups: &[Range<usize>],
    parents: &[Parent<'_>],
    module: &str,
    spec: &Spec,
    op: Op,
) -> (Vec<f32>, Vec<f32>) {
    let rank = groups[0].len();
    let strength = |p: &Parent<'_>| p.weight * p.layer.exact_scaling();
    let roots: Vec<f64> = parents.iter().map(|p| strength(p).abs().sqrt()).collect();
    let signed: Vec<f64> =
        parents.iter().zip(&roots).map(|(p, r)| if strength(p) >= 0.0 { *r } else { -r }).collect();
    let rows = |m: &[f32], n: usize, g: &Range<usize>| m[g.start * n..g.end * n].to_vec();
    let a: Vec<Vec<f32>> = groups.iter().map(|g| rows(&stack.a, stack.n_in, g)).collect();
    // PEFT's lora_B is (out, rank): masks and ties of magnitude go by that order.
    let turn = |m: &[f32], r: usize, c: usize| (0..r * c).map(|i| m[i % r * c + i / r]).collect::<Vec<f32>>();
    let b: Vec<Vec<f32>> =
        groups.iter().map(|g| turn(&rows(&stack.b, stack.n_out, g), rank, stack.n_out)).collect();
    let part = |tensors, weights: &[f64], what: &str, (rows, cols)| {
        tensor(tensors, weights, spec, op, &|i| {
            mask(spec.seed, &format!("{module}.{what}"), parents[i].name, rows, cols, spec.density)
        })
    };
    let a = part(a, &signed, "lora_a", (rank, stack.n_in));
    let b = part(b, &roots, "lora_b", (stack.n_out, rank));
    (a, turn(&b, stack.n_out, rank))
}

fn tensor(
    mut t: Vec<Vec<f32>>,
    weights: &[f64],
    spec: &Spec,
    op: Op,
    mask: &dyn Fn(usize) -> Vec<bool>,
) -> Vec<f32> {
    let n = t[0].len();
    if spec.density < 1.0 {
        for (i, t) in t.iter_mut().enumerate() {
            match op {
                Op::Ties | Op::Prune => trim(t, (spec.density * n as f64) as usize),
                Op::DareLinear | Op::DareTies => {
                    for (v, keep) in t.iter_mut().zip(mask(i)) {
                        *v = if keep { (f64::from(*v) / spec.density) as f32 } else { 0.0 };
                    }
                }
                Op::Sum => {}
            }
        }
    }
    let elect = matches!(op, Op::Ties | Op::DareTies);
    (0..n)
        .map(|j| {
            let values = t.iter().map(|t| f64::from(t[j]));
            if !elect {
                return values.zip(weights).map(|(v, w)| v * w).sum::<f64>() as f32;
            }
            let sign = |v: f64| if v == 0.0 { 0.0 } else { v.signum() };
            let votes: f64 = match spec.majority {
                Majority::Total => values.clone().sum(),
                Majority::Frequency => values.clone().map(sign).sum(),
            };
            let elected = if votes >= 0.0 { 1.0 } else { -1.0 };
            let agree = values.zip(weights).filter(|(v, _)| sign(*v) == elected);
            let (sum, count) = agree.fold((0.0, 0.0), |(s, c), (v, w)| (s + v * w, c + 1.0));
            (sum / f64::max(count, 1.0)) as f32
        })
        .collect()
}

/// Zeroes all but the `keep` largest magnitudes; among equal ones the first stay.
fn trim(t: &mut [f32], keep: usize) {
    let mut order: Vec<usize> = (0..t.len()).collect();
    if keep < t.len() {
        order.select_nth_unstable_by(keep, |&i, &j| t[j].abs().total_cmp(&t[i].abs()).then(i.cmp(&j)));
        for &i in &order[keep..] {
            t[i] = 0.0;
        }
    }
}
