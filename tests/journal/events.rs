//! Events: every kind of feedback, bit for bit; damaged ones are refused.

use std::sync::Arc;

use microlora::Error;
use microlora::journal::event::{Event, decode, record_bytes};
use microlora::learn::{Feedback, TargetLoss};
use microlora::replay::Sample;
use proptest::prelude::*;

use super::{entry, support::*};

fn bits(s: &Sample) -> Vec<u32> {
    let mut all = vec![];
    let mut push = |v: &[f32]| all.extend(v.iter().map(|v| v.to_bits()));
    push(&s.x);
    push(s.base.as_deref().unwrap_or(&[]));
    push(&[s.quality.unwrap_or(0.0), s.weight, s.advantage]);
    match &*s.feedback {
        Feedback::Target { target, .. } => push(target),
        Feedback::Gradient { gradient } => push(gradient),
        Feedback::Reward { reward, response } => {
            push(response);
            push(&[*reward]);
        }
        Feedback::Preference { chosen, rejected, p, beta } => {
            push(chosen);
            push(rejected);
            push(&[*p, *beta]);
        }
        Feedback::Contrastive { rows, width, tau } => {
            push(rows);
            push(&[*tau, *width as f32]);
        }
    }
    all
}

fn numbers(n: usize) -> impl Strategy<Value = Vec<f32>> {
    // Zeros of both signs, subnormal numbers and large ones too.
    let number = prop_oneof![
        3 => -2.0f32..2.0,
        1 => prop::sample::select(vec![0.0, -0.0, 1e-42, -1e15, 3.5]),
    ];
    prop::collection::vec(number, n).prop_map(|mut v| {
        v[0] = 0.5;
        v
    })
}

fn feedback(out: usize) -> impl Strategy<Value = Feedback> {
    let rows = (numbers(out), 1usize..4, 0.01f32..2.0).prop_flat_map(move |(first, n, tau)| {
        (Just(first), prop::collection::vec(numbers(out), n), Just(tau))
    });
    prop_oneof![
        numbers(out).prop_map(|t| Feedback::target(t, TargetLoss::Mse).unwrap()),
        numbers(out).prop_map(|t| Feedback::target(t, TargetLoss::Cosine).unwrap()),
        numbers(out).prop_map(|g| Feedback::gradient(g).unwrap()),
        (-3.0f32..3.0, numbers(out)).prop_map(|(r, e)| Feedback::reward(r, e).unwrap()),
        (numbers(out), numbers(out), 0.0f32..=1.0, 0.1f32..20.0)
            .prop_map(|(c, r, p, beta)| Feedback::preference(c, r, p, beta).unwrap()),
        rows.prop_map(|(p, n, tau)| Feedback::contrastive(p, n.concat(), tau).unwrap()),
    ]
}

fn samples() -> impl Strategy<Value = Sample> {
    (1usize..20, 1usize..20).prop_flat_map(|(inputs, out)| {
        let module = prop::option::of(any::<u32>());
        let quality = prop::option::of(0.0f32..=1.0);
        let scalars = (module, quality, 0.0f32..2.0, -3.0f32..3.0);
        (any::<u64>(), scalars, numbers(inputs), prop::option::of(numbers(out)), feedback(out)).prop_map(
            |(event, (module, quality, weight, advantage), x, base, feedback)| Sample {
                event,
                module,
                x,
                base,
                feedback: Arc::new(feedback),
                quality,
                weight,
                advantage,
            },
        )
    })
}

proptest! {
    #[test]
    fn events_are_the_same_bit_for_bit(sample in samples()) {
        let event = Event::new(&sample).unwrap();
        let payload = event.parts().concat();
        prop_assert_eq!(payload.len(), event.bytes());
        let again = decode(sample.event, &payload).unwrap();
        prop_assert_eq!(&again, &sample);
        prop_assert_eq!(bits(&again), bits(&sample));
        prop_assert_eq!(Event::new(&again).unwrap().parts().concat(), payload);
    }

    /// Cut off anywhere, or with any byte changed: refused, or an event that has just these bytes.
    #[test]
    fn damaged_events_are_refused(sample in samples(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let payload = Event::new(&sample).unwrap().parts().concat();
        let cut = at.index(payload.len());
        let refused = |bytes: &[u8]| matches!(decode(1, bytes), Err(Error::Format { .. }));
        prop_assert!(refused(&payload[..cut]));
        let longer = [&payload[..], &[0; 4]].concat();
        prop_assert!(refused(&longer));
        let mut changed = payload;
        changed[cut] = byte;
        entry::event(&changed);
    }

    #[test]
    fn any_bytes_at_all(data in prop::collection::vec(any::<u8>(), 0..400)) {
        entry::event(&data);
        entry::segment(&data);
    }
}

/// A good file with a few bytes changed: closer to what disks do than bytes at random.
#[test]
fn changed_bytes_of_a_good_segment() {
    let dir = tempfile::tempdir().unwrap();
    let (mut journal, _) = open(dir.path(), 4096);
    fill(&mut journal, 1..9);
    drop(journal);
    let good = std::fs::read(segment(dir.path(), 1)).unwrap();
    entry::segment(&good);
    let mut rng = microlora::rng::Rng::new(3, 0);
    let mut draw = |n: usize| (rng.uniform() * n as f32) as usize;
    for _ in 0..300 {
        let mut bytes = good.clone();
        for _ in 0..=draw(3) {
            let at = draw(2000);
            bytes[at] = [0, 1, 0x7f, 0xff][draw(4)];
        }
        bytes.truncate(if draw(3) == 0 { draw(bytes.len()) } else { bytes.len() });
        entry::segment(&bytes);
    }
}

/// The figure of the module's documentation.
#[test]
fn bytes_of_an_event_are_as_stated() {
    let wide = vec![0.5; 768];
    let sample = Sample {
        event: 1,
        module: Some(0),
        x: wide.clone(),
        base: None,
        feedback: Arc::new(Feedback::target(wide, TargetLoss::Mse).unwrap()),
        quality: Some(1.0),
        weight: 1.0,
        advantage: 0.0,
    };
    let dir = tempfile::tempdir().unwrap();
    let (mut journal, _) = open(dir.path(), 16 << 20);
    let before = journal.bytes();
    journal.append(1, 1, &Event::new(&sample).unwrap().parts()).unwrap();
    assert_eq!(journal.bytes() - before, 6224);
    assert_eq!(record_bytes(768, 768, false, 1), 6224);
    assert_eq!(record_bytes(768, 768, true, 2), 6224 + 2 * 3072);
    assert_eq!(((16 << 20) - before as usize - 32) / 6224, 2695);
}
