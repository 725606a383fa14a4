//! Laws of the memory of a stream: what is kept, how likely, and that it survives.

use std::sync::Arc;

use microlora::Dtype;
use microlora::learn::{Feedback, TargetLoss};
use microlora::replay::{Reservoir, Sample, Settings};
use microlora::rng::Rng;

mod bank;
mod sampling;
mod state;
mod storage;

fn numbers(rng: &mut Rng, n: usize, scale: f32) -> Vec<f32> {
    (0..n).map(|_| rng.symmetric(scale)).collect()
}

/// One feedback of each kind; 2 is the gradient, which has no loss.
fn feedback(kind: usize, rng: &mut Rng, n: usize) -> Feedback {
    let mut v = || numbers(rng, n, 1.0);
    match kind {
        0 => Feedback::target(v(), TargetLoss::Mse),
        1 => Feedback::target(v(), TargetLoss::Cosine),
        2 => Feedback::gradient(v()),
        3 => Feedback::reward(0.7, v()),
        4 => Feedback::preference(v(), v(), 0.9, 20.0),
        _ => {
            let negatives = [v(), v(), v()].concat();
            Feedback::contrastive(v(), negatives, 0.05)
        }
    }
    .unwrap()
}

/// A sample that says its own number, small enough for many.
fn small(event: u64) -> Sample {
    let value = vec![event as f32, 1.0];
    Sample {
        event,
        module: None,
        x: value.clone(),
        base: None,
        feedback: Arc::new(Feedback::target(value, TargetLoss::Mse).unwrap()),
        quality: None,
        weight: 1.0,
        advantage: 0.0,
    }
}

/// A sample with everything in it that the event's number decides.
fn rich(event: u64, width: usize) -> Sample {
    let mut rng = Rng::new(11, event);
    let kind = (event % 6) as usize;
    Sample {
        event,
        module: event.is_multiple_of(3).then_some((event % 5) as u32),
        x: numbers(&mut rng, width + 1, 2.0),
        base: event.is_multiple_of(2).then(|| numbers(&mut rng, width, 3.0)),
        feedback: Arc::new(feedback(kind, &mut rng, width)),
        quality: event.is_multiple_of(4).then(|| rng.uniform()),
        weight: rng.uniform(),
        advantage: if kind == 3 { rng.symmetric(1.0) } else { 0.0 },
    }
}

fn settings(capacity: usize, holdout: f64, seed: u64) -> Settings {
    Settings { capacity, max_bytes: None, dtype: Dtype::F32, holdout, balance: false, seed }
}

fn filled(settings: Settings, events: impl IntoIterator<Item = u64>) -> Reservoir {
    let mut r = Reservoir::new(settings).unwrap();
    for e in events {
        r.offer(&small(e), &[], 0).unwrap();
    }
    r
}

fn events(r: &Reservoir, held_out: bool) -> Vec<u64> {
    let mut all: Vec<u64> = r.part(held_out).iter().map(|e| e.event).collect();
    all.sort_unstable();
    all
}
