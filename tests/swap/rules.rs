//! What each call promises by itself.

use std::sync::Arc;

use microlora::factor::Factor;
use microlora::layer::Layer;
use microlora::{Adapter, Dtype, Error, HotSwap};

use super::{N, READERS, adapter_of, layer, numbers, version};

fn swap_of(first: &Arc<Adapter>) -> HotSwap {
    let swap = HotSwap::new(true).unwrap();
    drop(swap.set_active(Arc::clone(first), false).unwrap());
    swap
}

#[test]
fn an_empty_manager_says_so() {
    let swap = HotSwap::new(true).unwrap();
    assert_eq!((swap.generation(), swap.live_generations()), (0, 1));
    assert!(swap.pin().adapter().is_none());
    let e = swap.load().layer("q_proj").unwrap_err().to_string();
    assert!(e.contains("generation 0") && e.contains("q_proj"), "{e}");
    for e in [swap.swap().unwrap_err(), swap.rollback().unwrap_err()] {
        assert!(matches!(e, Error::Swap { generation: 0, .. }), "{e}");
    }
    drop(swap.set_active(version(0), false).unwrap());
    assert!(swap.previous().is_none() && swap.rollback().is_err(), "generation 0 is nothing to go back to");
}

#[test]
fn refusals_change_nothing() {
    let first = version(0);
    let swap = swap_of(&first);
    let standby = version(1);
    swap.prepare_standby(Arc::clone(&standby), false, &mut |_, _| Ok(())).unwrap();
    let other = adapter_of(&[("v_proj", layer(1, 2, N, N)), ("q_proj", layer(2, 2, N, N / 2))]);
    let mut rows = numbers(3, 2 * N);
    rows[N] = f32::NAN;
    let nan = Factor::from_rows(&rows, 2, N, Dtype::Bf16);
    let nan = Layer::new(Factor::zeros(2, N, Dtype::F32), nan, 1.0, false).unwrap();
    let nan = adapter_of(&[("q_proj", Arc::new(nan))]);
    let cases = [(other, "of q_proj"), (nan, "lora_b of q_proj"), (adapter_of(&[]), "no modules")];
    for (bad, word) in cases {
        let errors = [
            swap.set_active(Arc::clone(&bad), false).unwrap_err(),
            swap.compare_and_swap(1, Arc::clone(&bad), false).unwrap_err(),
            swap.prepare_standby(bad, false, &mut |_, _| Ok(())).unwrap_err(),
        ];
        for e in errors {
            assert!(e.to_string().contains(word), "{e}");
        }
    }
    assert!(matches!(swap.compare_and_swap(0, version(2), false), Err(Error::Swap { generation: 1, .. })));
    let stop = swap.prepare_standby(version(2), false, &mut |done, _| {
        if done == 1 { Err(Error::Cancelled("preparing".into())) } else { Ok(()) }
    });
    assert!(matches!(stop, Err(Error::Cancelled(_))));
    assert_eq!(swap.generation(), 1);
    assert!(Arc::ptr_eq(swap.pin().adapter().unwrap(), &first));
    assert!(Arc::ptr_eq(&swap.standby().unwrap(), &standby));
}

#[test]
fn a_standby_is_compared_with_what_is_active_at_the_swap() {
    let swap = swap_of(&version(0));
    let narrow = adapter_of(&[("o_proj", layer(5, 3, N, 8))]);
    swap.prepare_standby(Arc::clone(&narrow), false, &mut |_, _| Ok(())).unwrap();
    drop(swap.set_active(adapter_of(&[("o_proj", layer(6, 3, N, 16))]), false).unwrap());
    let e = swap.swap().unwrap_err();
    assert!(matches!(e, Error::Shape { .. }) && e.to_string().contains("o_proj"), "{e}");
    assert!(Arc::ptr_eq(&swap.standby().unwrap(), &narrow) && swap.generation() == 2);
    swap.prepare_standby(Arc::clone(&narrow), true, &mut |_, _| Ok(())).unwrap();
    assert_eq!(swap.swap().unwrap().new, 3);
    assert!(swap.standby().is_none());
    // Back over a change of shapes that was wanted.
    assert_eq!(swap.rollback().unwrap().new, 4);
    assert_eq!(swap.load().layer("o_proj").unwrap().out_features(), 16);
}

#[test]
fn slots_serve_every_later_generation() {
    let swap = swap_of(&adapter_of(&[("q_proj", layer(1, 4, N, N))]));
    let q = swap.slot("q_proj").unwrap();
    assert!(matches!(swap.slot("up_proj"), Err(Error::UnknownModule { .. })));
    // Many modules, q_proj last, of another rank.
    let names: Vec<String> = (0..40).map(|i| format!("layers.{i}.up_proj")).collect();
    let mut many: Vec<_> = names.iter().map(|n| (n.as_str(), layer(3, 1, N, N))).collect();
    many.push(("q_proj", layer(2, 9, N, N)));
    drop(swap.set_active(adapter_of(&many), false).unwrap());
    assert_eq!(swap.load().slot(q).unwrap().rank(), 9);
    assert_eq!(swap.load().layer("q_proj").unwrap().rank(), 9);
    assert!(Arc::ptr_eq(swap.load().slot(swap.slot(&names[7]).unwrap()).unwrap(), &many[7].1));
    drop(swap.set_active(adapter_of(&[("up_proj", layer(1, 4, N, N))]), false).unwrap());
    assert!(swap.load().slot(q).is_none());
    assert!(swap.load().lacks("q_proj").to_string().contains("up_proj (the modules of generation 3)"));
    drop(swap.rollback().unwrap());
    assert!(Arc::ptr_eq(swap.load().slot(q).unwrap(), &many[40].1));
}

#[test]
fn a_generation_lives_as_long_as_its_last_reader() {
    let swap = swap_of(&version(0));
    let (held, weak) = (swap.pin(), Arc::downgrade(&swap.pin()));
    for i in 1..4 {
        drop(swap.set_active(version(i), false).unwrap());
    }
    assert_eq!(swap.live_generations(), 3, "active, the one before, and the one that is held");
    assert_eq!(held.number(), 1);
    drop(held);
    assert!(weak.upgrade().is_none());
    assert_eq!(swap.live_generations(), 2);
    assert!(swap.previous().is_some());
    drop(swap.set_keep_previous(false));
    assert_eq!(swap.live_generations(), 1);
    drop(swap.set_active(version(5), false).unwrap());
    assert_eq!(swap.live_generations(), 1);
    assert!(swap.rollback().unwrap_err().to_string().contains("keep_previous"));
}

#[test]
fn a_rollback_goes_back_once_under_a_new_number() {
    let (a, b) = (version(0), version(1));
    let swap = swap_of(&a);
    drop(swap.set_active(Arc::clone(&b), false).unwrap());
    let done = swap.rollback().unwrap();
    assert_eq!((done.old, done.new), (2, 3));
    assert!(Arc::ptr_eq(swap.pin().adapter().unwrap(), &a));
    drop(done);
    assert!(swap.rollback().is_err() && swap.previous().is_none());
    assert_eq!(Arc::strong_count(&b), 1, "what was rolled back is let go");
    assert_eq!(swap.live_generations(), 1);
}

#[test]
fn activity_counts_and_ends() {
    let swap = HotSwap::new(true).unwrap();
    assert!(!swap.activity.is_busy());
    swap.activity.begin();
    swap.activity.begin();
    swap.activity.end();
    assert!(swap.activity.is_busy());
    swap.activity.end();
    swap.activity.end();
    assert!(!swap.activity.is_busy());
}

#[test]
fn of_many_who_start_from_one_generation_one_wins() {
    // Large, so that all of them are looking their numbers over at the same time.
    let big = adapter_of(&[("q_proj", layer(1, 64, 8192, 8192))]);
    let (swap, start) = (swap_of(&big), std::sync::Barrier::new(READERS));
    for round in 1..=20 {
        let attempt = || {
            start.wait();
            swap.compare_and_swap(round, Arc::clone(&big), false).is_ok()
        };
        let won = std::thread::scope(|s| {
            let all: Vec<_> = (0..READERS).map(|_| s.spawn(attempt)).collect();
            all.into_iter().map(|t| usize::from(t.join().unwrap())).sum::<usize>()
        });
        assert_eq!((won, swap.generation()), (1, round + 1));
    }
}
