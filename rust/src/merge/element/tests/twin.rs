//! The methods in float64 on dense deltas, from their papers.

use super::*;

/// Magnitudes, largest first.
pub(super) fn sorted(d: &[f64]) -> Vec<f64> {
    let mut s: Vec<f64> = d.iter().map(|v| v.abs()).collect();
    s.sort_by(|a, b| b.total_cmp(a));
    s
}

pub(super) fn count(share: f64, n: usize) -> usize {
    (share * n as f64 + 1e-9).floor() as usize
}

/// The entries of magnitude rank `skip` to `skip + keep`, and their equals.
pub(super) fn band(d: &[f64], skip: usize, keep: usize) -> Vec<f64> {
    let s = sorted(d);
    let keep = keep.min(d.len() - skip.min(d.len()));
    if keep == 0 {
        return vec![0.0; d.len()];
    }
    let (lo, hi) = (s[skip + keep - 1], if skip == 0 { f64::INFINITY } else { s[skip] });
    d.iter().map(|v| if (lo..=hi).contains(&v.abs()) { *v } else { 0.0 }).collect()
}

pub(super) fn odds(d: &[f64], cols: usize, density: f64, half: f64) -> Vec<f64> {
    let mut out = Vec::new();
    for row in d.chunks_exact(cols) {
        let mut order: Vec<usize> = (0..cols).collect();
        order.sort_by(|&i, &j| row[i].abs().total_cmp(&row[j].abs()));
        let mut p = vec![density; cols];
        if cols > 1 {
            order
                .iter()
                .enumerate()
                .for_each(|(rank, &i)| p[i] = density - half + 2.0 * half * rank as f64 / (cols - 1) as f64);
        }
        out.extend(p);
    }
    out
}

pub(super) fn l1(d: &[f64]) -> f64 {
    d.iter().map(|v| v.abs()).sum()
}

/// Keeps what `keep` says, over `p` or so that the sum of magnitudes stays.
pub(super) fn drop_by(d: &[f64], keep: &[bool], p: &[f64], semantics: Semantics) -> Vec<f64> {
    let kept: Vec<f64> = d.iter().zip(keep).map(|(v, k)| if *k { *v } else { 0.0 }).collect();
    if semantics == Semantics::Mergekit {
        let by = if l1(&kept) > 0.0 { l1(d) / l1(&kept) } else { 0.0 };
        return kept.iter().map(|v| by * v).collect();
    }
    kept.iter().zip(p).map(|(v, p)| if *v == 0.0 { 0.0 } else { v / p }).collect()
}

pub(super) fn consensus(t: &[Vec<f64>], w: &[f64], s: &Spec) -> Vec<f64> {
    let at = |j: usize| {
        let vote = |(t, w): (&Vec<f64>, &f64)| {
            if s.majority == crate::merge::Majority::Frequency {
                w * f64::from((t[j] > 0.0) as i8 - (t[j] < 0.0) as i8)
            } else {
                w * t[j]
            }
        };
        let positive = t.iter().zip(w).map(vote).sum::<f64>() >= 0.0;
        let (mut sum, mut weight) = (0.0, 0.0);
        for (t, w) in t.iter().zip(w) {
            if w * t[j] != 0.0 && (w * t[j] > 0.0) == positive {
                sum += w * t[j];
                weight += w.abs();
            }
        }
        s.lam
            * if !s.normalize {
                sum
            } else if weight > 0.0 {
                sum / weight
            } else {
                0.0
            }
    };
    (0..t[0].len()).map(at).collect()
}

pub(super) fn sum(t: &[Vec<f64>], w: &[f64], s: &Spec) -> Vec<f64> {
    let by = if s.normalize { s.lam / w.iter().sum::<f64>() } else { s.lam };
    (0..t[0].len()).map(|j| by * t.iter().zip(w).map(|(t, w)| w * t[j]).sum::<f64>()).collect()
}

pub(super) fn twin(of: &[Made], d: &[Vec<f64>], cols: usize, s: &Spec) -> Vec<f64> {
    let (n, m) = (d[0].len(), d.len());
    let w: Vec<f64> = of.iter().map(|p| p.weight).collect();
    let each = |f: &dyn Fn(usize, &[f64]) -> Vec<f64>| {
        d.iter().enumerate().map(|(i, d)| f(i, d)).collect::<Vec<_>>()
    };
    let trim = || each(&|_, d| band(d, 0, count(s.density, n)));
    let crumbs = || each(&|_, d| band(d, count(s.gamma, n), count(s.density, n)));
    let dropped = || {
        each(&|i, d| {
            let keep = mask(s.seed, "mod", &of[i].name, n / cols, cols, s.density);
            drop_by(d, &keep, &vec![s.density; n], s.semantics)
        })
    };
    let by_rank = || {
        each(&|i, d| {
            let half = if s.semantics == Semantics::Mergekit { s.epsilon } else { s.epsilon / 2.0 };
            let (p, mut rng) = (odds(d, cols, s.density, half), mask::generator(s.seed, "mod", &of[i].name));
            let keep: Vec<bool> = p.iter().map(|p| f64::from(rng.uniform()) < *p).collect();
            drop_by(d, &keep, &p, s.semantics)
        })
    };
    match s.method.name {
        "ties" => consensus(&trim(), &w, s),
        "magnitude_prune" => sum(&trim(), &w, s),
        "breadcrumbs" => sum(&crumbs(), &w, s),
        "breadcrumbs_ties" => consensus(&crumbs(), &w, s),
        "dare_linear" => sum(&dropped(), &w, s),
        "dare_ties" => consensus(&dropped(), &w, s),
        "della" => consensus(&by_rank(), &w, s),
        "della_linear" => sum(&by_rank(), &w, s),
        "sce" => {
            let variance: Vec<f64> = (0..n)
                .map(|j| {
                    let mean = d.iter().map(|d| d[j]).sum::<f64>() / m as f64;
                    d.iter().map(|d| (d[j] - mean).powi(2)).sum::<f64>()
                })
                .collect();
            let keep = band(&variance, 0, count(s.density, n));
            let all_equal = m == 1 && count(s.density, n) > 0;
            let t = each(&|_, d| {
                d.iter().zip(&keep).map(|(v, k)| if *k > 0.0 || all_equal { *v } else { 0.0 }).collect()
            });
            let square = |t: &[f64]| t.iter().map(|v| v * v).sum::<f64>();
            let all: f64 = t.iter().map(|t| square(t)).sum();
            let at = |j: usize| {
                let positive = t.iter().map(|t| t[j]).sum::<f64>() >= 0.0;
                let (mut sum, mut weight) = (0.0, 0.0);
                for t in &t {
                    let eta = square(t) / all;
                    if t[j] != 0.0 && (t[j] > 0.0) == positive {
                        (sum, weight) = (sum + eta * t[j], weight + eta);
                    }
                }
                let divide = s.semantics == Semantics::Mergekit && weight > 0.0;
                s.lam * if divide { sum / weight } else { sum }
            };
            (0..n).map(at).collect()
        }
        "fisher" => {
            let f: Vec<Vec<f64>> = of
                .iter()
                .map(|p| {
                    let (a, c) = p.statistics.importance.as_ref().unwrap();
                    let mean = |v: &[f32]| v.iter().map(|v| f64::from(*v)).sum::<f64>() / v.len() as f64;
                    let unit = p.weight / (mean(a) * mean(c));
                    c.iter()
                        .flat_map(|c| a.iter().map(move |a| unit * f64::from(*c) * f64::from(*a)))
                        .collect()
                })
                .collect();
            let at = |j: usize| {
                let weight: f64 = f.iter().map(|f| f[j]).sum();
                let over: f64 = f.iter().zip(d).map(|(f, d)| f[j] * d[j]).sum();
                s.lam * if weight > 0.0 { over / weight } else { 0.0 }
            };
            (0..n).map(at).collect()
        }
        other => panic!("no twin of {other}"),
    }
}
