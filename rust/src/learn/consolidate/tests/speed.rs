//! Times, printed and never asserted: `cargo nextest run --release --run-ignored only consolidate::tests::speed --no-capture`.

use std::time::Instant;

use super::fixtures::*;
use crate::learn::consolidate::{Run, mean_loss};

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

#[test]
#[ignore = "prints times"]
fn window_64_and_replay_512_at_rank_16_and_768_outputs() {
    let k = kernels();
    for (name, kinds) in [
        ("squared errors", &[0][..]),
        ("contrastive", &[5]),
        ("preference", &[4]),
        ("mixed", &[0, 1, 2, 3, 4, 5]),
    ] {
        let p = problem(1, settings("ewc_merge"), (16, 768), [64, 512], kinds);
        let (mut totals, mut longest, mut new, mut slices) = (Vec::new(), Vec::new(), Vec::new(), 0);
        for _ in 0..200 {
            let given = p.clone();
            let start = Instant::now();
            let mut run = Run::new(k, given).unwrap();
            new.push(start.elapsed().as_secs_f64() * 1e6);
            let (mut most, mut last, mut n) = (0.0f64, Instant::now(), 0);
            loop {
                let outcome = run.advance().unwrap();
                let now = Instant::now();
                most = most.max((now - last).as_secs_f64() * 1e6);
                (last, n) = (now, n + 1);
                if outcome.is_some() {
                    break;
                }
            }
            totals.push(start.elapsed().as_secs_f64() * 1e6);
            longest.push(most);
            slices = n;
        }
        let held: Vec<f64> = (0..200)
            .map(|_| {
                let start = Instant::now();
                std::hint::black_box(mean_loss(k, &p.slow.b, &p.window));
                start.elapsed().as_secs_f64() * 1e6
            })
            .collect();
        println!(
            "{name} on {}: {:.0} us in {slices} slices, longest {:.0} us, new {:.0} us; mean loss of 64: {:.0} us",
            k.isa(),
            median(totals),
            median(longest),
            median(new),
            median(held),
        );
    }
}
