//! Patterns: bounded, means right, the nearest become one, and weights that sum to one.

use microlora::Error;
use microlora::kernels::Kernels;
use microlora::replay::PatternBank;
use microlora::rng::Rng;

use crate::numbers;

fn unit(x: &[f32]) -> Vec<f64> {
    let norm = x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
    x.iter().map(|&v| f64::from(v) / norm).collect()
}

fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// The bank in float64, each pattern as the list of its members.
#[derive(Default)]
struct Twin {
    members: Vec<Vec<(Vec<f64>, Option<f32>)>>,
}

impl Twin {
    fn mean(&self, i: usize) -> Vec<f64> {
        let m = &self.members[i];
        let width = m[0].0.len();
        (0..width).map(|j| m.iter().map(|x| x.0[j]).sum::<f64>() / m.len() as f64).collect()
    }

    /// Returns the pattern, and how far the closest decision was from going the other way.
    fn observe(&mut self, x: &[f32], q: Option<f32>, capacity: usize, threshold: f64) -> (usize, f64) {
        let x = unit(x);
        let means: Vec<_> = (0..self.members.len()).map(|i| self.mean(i)).collect();
        let mut to: Vec<(f64, usize)> = means.iter().map(|m| cosine(m, &x)).zip(0..).collect();
        to.sort_by(|a, b| b.0.total_cmp(&a.0));
        let best = to.first().copied();
        let second = to.get(1).map_or(f64::NEG_INFINITY, |t| t.0);
        let mut margin = best.map_or(1.0, |b| (b.0 - threshold).abs().min(b.0 - second));
        let at = match best {
            Some((c, i)) if c >= threshold => i,
            _ if means.len() < capacity => {
                self.members.push(Vec::new());
                means.len()
            }
            Some((c, i)) => {
                let n = means.len();
                let pairs = (0..n).flat_map(|a| (a + 1..n).map(move |b| (a, b)));
                let mut pairs: Vec<_> = pairs.map(|(a, b)| (cosine(&means[a], &means[b]), a, b)).collect();
                pairs.sort_by(|a, b| b.0.total_cmp(&a.0));
                margin = margin.min(pairs.first().map_or(1.0, |p| (p.0 - c).abs()));
                margin = margin.min(pairs.get(1).map_or(1.0, |p| pairs[0].0 - p.0));
                match pairs.first() {
                    Some(&(between, a, b)) if between > c => {
                        let (into, from) =
                            if self.members[b].len() > self.members[a].len() { (b, a) } else { (a, b) };
                        let gone = std::mem::take(&mut self.members[from]);
                        self.members[into].extend(gone);
                        from
                    }
                    _ => i,
                }
            }
            None => unreachable!(),
        };
        self.members[at].push((x, q));
        (at, margin)
    }
}

#[test]
fn patterns_are_those_of_a_float64_twin() {
    let (mut checked, mut merges) = (0, 0);
    for (seed, capacity, threshold, width) in
        [(1, 4, 0.6, 5), (2, 8, 0.3, 20), (3, 1, 0.9, 7), (4, 3, 0.95, 33), (5, 6, -0.4, 3)]
    {
        let mut bank = PatternBank::new(capacity, threshold, width).unwrap();
        let mut twin = Twin::default();
        for e in 0..400 {
            let mut rng = Rng::new(seed, e);
            let x = numbers(&mut rng, width, 10f32.powi(e as i32 % 7 - 3));
            let q = (e % 3 > 0).then(|| rng.uniform());
            let (want, margin) = twin.observe(&x, q, capacity, f64::from(threshold));
            if margin < 1e-5 {
                break; // a tie that rounding may decide
            }
            assert_eq!(bank.observe(&x, q), Some(want), "event {e} of seed {seed}");
            merges += u32::from(bank.merged().is_some());
            checked += 1;
            assert!(bank.len() <= capacity);
        }
        for i in 0..bank.len() {
            let members = &twin.members[i];
            assert_eq!(bank.counts()[i], members.len() as u64);
            for (got, want) in bank.centroids()[i * width..].iter().zip(twin.mean(i)) {
                assert!((f64::from(*got) - want).abs() < 2e-6, "{got} for {want}");
            }
            let known: Vec<f64> = members.iter().filter_map(|m| m.1).map(f64::from).collect();
            match bank.qualities()[i] {
                Some(q) => assert!((q - known.iter().sum::<f64>() / known.len() as f64).abs() < 1e-12),
                None => assert!(known.is_empty()),
            }
        }
    }
    assert!(checked > 1000 && merges > 30, "{checked} events, {merges} merges");
}

#[test]
fn the_two_nearest_become_one_and_the_newcomer_takes_the_place() {
    let mut bank = PatternBank::new(3, 0.999, 3).unwrap();
    for x in [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.1, 1.0, 0.0], [0.0, 2.0, 0.0]] {
        bank.observe(&x, None);
        assert_eq!(bank.merged(), None);
    }
    assert_eq!(bank.observe(&[0.0, 0.0, 5.0], Some(1.0)), Some(2));
    assert_eq!(bank.merged(), Some((2, 1)));
    assert_eq!(bank.counts(), [1, 3, 1]);
    // Nearer to a pattern than any two patterns are to each other: it joins, however far.
    assert_eq!(bank.observe(&[0.0, 0.3, 1.0], None), Some(2));
    assert_eq!((bank.merged(), bank.counts()), (None, [1u64, 3, 2].as_slice()));
}

#[test]
fn nearest_is_by_cosine_and_zeros_are_nowhere() {
    let mut bank = PatternBank::new(2, 0.5, 2).unwrap();
    assert_eq!(bank.assign(&[1.0, 0.0]), None);
    bank.observe(&[100.0, 0.0], None);
    bank.observe(&[0.0, 0.001], None);
    for scale in [1e-25f32, 1e-3, 1.0, 1e25] {
        let (i, c) = bank.assign(&[0.6 * scale, 0.8 * scale]).unwrap();
        assert!(i == 1 && (c - 0.8).abs() < 1e-6, "{i} {c} at {scale}");
    }
    let before = bank.to_tensors("");
    assert_eq!((bank.assign(&[0.0; 2]), bank.observe(&[0.0; 2], Some(1.0))), (None, None));
    assert_eq!(bank.to_tensors(""), before);
}

#[test]
fn weights_are_a_softmax_of_cosines_or_one_hot() {
    let k = Kernels::detect().unwrap();
    let mut bank = PatternBank::new(5, 0.9, 6).unwrap();
    for e in 0..5 {
        bank.observe(&numbers(&mut Rng::new(1, e), 6, 1.0), None);
    }
    assert_eq!(bank.len(), 5);
    let x = numbers(&mut Rng::new(2, 0), 6, 1.0);
    let centroids = bank.centroids();
    assert_eq!(bank.centroid(2), centroids[12..18]);
    let cosines: Vec<f64> = centroids
        .chunks_exact(6)
        .map(|c| cosine(&c.iter().map(|&v| f64::from(v)).collect::<Vec<_>>(), &unit(&x)))
        .collect();
    for t in [0.01, 0.1, 1.0, 100.0] {
        let mut got = vec![0.0; 5];
        bank.weights(k, &x, t, false, &mut got);
        let total: f64 = cosines.iter().map(|c| (c / f64::from(t)).exp()).sum();
        for (g, c) in got.iter().zip(&cosines) {
            let want = (c / f64::from(t)).exp() / total;
            assert!((f64::from(*g) - want).abs() < 1e-4, "{g} for {want} at {t}");
        }
    }
    let mut hard = vec![0.5; 5];
    bank.weights(k, &x, 0.1, true, &mut hard);
    assert_eq!(hard.iter().sum::<f32>(), 1.0);
    assert_eq!(hard[bank.assign(&x).unwrap().0], 1.0);
    bank.weights(k, &[0.0; 6], 0.1, false, &mut hard);
    assert!(hard.iter().all(|w| (w - 0.2).abs() < 1e-6));
}

#[test]
fn bounded_whatever_comes() {
    let mut bank = PatternBank::new(8, 0.99, 16).unwrap();
    let mut bytes = 0;
    for e in 0..3000 {
        bank.observe(&numbers(&mut Rng::new(4, e), 16, 1.0), None);
        if e == 500 {
            bytes = bank.memory_bytes();
        }
    }
    assert_eq!((bank.len(), bank.memory_bytes()), (8, bytes));
    assert_eq!(bank.counts().iter().sum::<u64>(), 3000);
}

#[test]
fn settings_that_cannot_work_are_refused_by_name() {
    for (capacity, threshold, width, name) in [
        (0, 0.5, 3, "patterns"),
        (5000, 0.5, 3, "patterns"),
        (2, 1.5, 3, "pattern_threshold"),
        (2, f32::NAN, 3, "pattern_threshold"),
        (2, 0.5, 0, "width"),
    ] {
        let e = PatternBank::new(capacity, threshold, width).unwrap_err();
        assert!(matches!(&e, Error::Config { arg, .. } if arg == name), "{e}");
    }
}
