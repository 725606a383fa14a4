//! Who is kept: every event as likely as any other, in both parts, whatever limits them.

use microlora::replay::{Reservoir, Settings, held_out};

use crate::{events, filled, rich, settings, small};

const SEEDS: u64 = 2000;

/// `sum (kept - expected)^2 / variance`, near its degrees of freedom where all are equally likely.
fn z_of_chi2(kept: &[u32], offered: &[u32], rate: f64) -> f64 {
    let terms = kept.iter().zip(offered).filter(|(_, n)| **n > 0).map(|(&k, &n)| {
        let n = f64::from(n);
        (f64::from(k) - n * rate).powi(2) / (n * rate * (1.0 - rate))
    });
    let (sum, n) = terms.fold((0.0, 0.0), |(s, n), t| (s + t, n + 1.0));
    (sum - n) / f64::sqrt(2.0 * n)
}

#[test]
fn every_event_is_as_likely_to_be_kept_in_both_parts() {
    const N: usize = 300;
    let mut kept = [vec![0u32; N], vec![0u32; N]];
    let mut offered = [vec![0u32; N], vec![0u32; N]];
    for seed in 0..SEEDS {
        let r = filled(settings(60, 0.2, seed), 1..=N as u64);
        assert_eq!((r.part(false).len(), r.part(true).len()), (48, 12));
        assert_eq!((r.part(false).seen(), r.part(true).seen()), (240, 60));
        for e in 1..=N as u64 {
            offered[usize::from(held_out(seed, 0.2, e))][e as usize - 1] += 1;
        }
        for (part, kept) in kept.iter_mut().enumerate() {
            events(&r, part == 1).iter().for_each(|e| kept[*e as usize - 1] += 1);
        }
    }
    for part in 0..2 {
        let z = z_of_chi2(&kept[part], &offered[part], 0.2);
        assert!(z.abs() < 4.0, "part {part}: chi-square is {z} sigma from what it should be");
        let half: u32 = kept[part][..N / 2].iter().sum();
        let (n, all) = (f64::from(half), f64::from(kept[part].iter().sum::<u32>()));
        assert!((n / all - 0.5).abs() < 3.5 * 0.5 / all.sqrt(), "the first half holds {n} of {all}");
    }
}

#[test]
fn neighbours_are_kept_independently_of_each_other() {
    // Keys of one block come from one stream: pairs must be as frequent as without replacement.
    let mut both = 0u32;
    for seed in 0..SEEDS {
        let kept = events(&filled(settings(25, 0.0, seed), 1..=100), false);
        both += kept.windows(2).filter(|w| w[1] == w[0] + 1).count() as u32;
    }
    let p = 25.0 * 24.0 / (100.0 * 99.0);
    let want = f64::from(99 * SEEDS as u32) * p;
    assert!((f64::from(both) - want).abs() < 4.0 * want.sqrt(), "{both} pairs, {want} expected");
}

#[test]
fn bytes_instead_of_counts_are_as_unbiased() {
    const N: usize = 200;
    let one = filled(settings(9, 0.0, 0), 1..=1).part(false).sample_bytes();
    let (mut kept, offered) = (vec![0u32; N], vec![SEEDS as u32; N]);
    for seed in 0..SEEDS {
        let s = Settings { max_bytes: Some(one * 40 + one / 2), ..settings(1000, 0.0, seed) };
        let r = filled(s, 1..=N as u64);
        assert_eq!(r.part(false).len(), 40);
        events(&r, false).iter().for_each(|e| kept[*e as usize - 1] += 1);
    }
    let z = z_of_chi2(&kept, &offered, 0.2);
    assert!(z.abs() < 4.0, "{z}");
}

#[test]
fn what_comes_after_forgetting_is_not_favoured() {
    // The even events of a full reservoir are forgotten: all others, older and newer, must be as likely.
    const N: u64 = 200;
    let (mut kept, mut offered) = (vec![0u32; N as usize], vec![0u32; N as usize]);
    let stays = |e: u64| e % 2 == 1 || e > 100;
    for seed in 0..SEEDS {
        let mut r = filled(settings(40, 0.0, seed), 1..=100);
        for e in events(&r, false).into_iter().filter(|&e| !stays(e)) {
            assert!(r.forget(e) && !r.forget(e));
        }
        for e in 101..=N {
            r.offer(&small(e), &[], 0).unwrap();
        }
        assert!((30..=40).contains(&r.part(false).len()));
        events(&r, false).iter().for_each(|e| kept[*e as usize - 1] += 1);
        (1..=N).filter(|&e| stays(e)).for_each(|e| offered[e as usize - 1] += 1);
    }
    assert!((1..=N).all(|e| stays(e) || kept[e as usize - 1] == 0));
    let sum = |v: &[u32]| f64::from(v.iter().sum::<u32>());
    let z = z_of_chi2(&kept, &offered, sum(&kept) / sum(&offered));
    assert!(z.abs() < 4.0, "{z}");
    let [old, new] = [0..100, 100..200].map(|half| sum(&kept[half.clone()]) / sum(&offered[half]));
    assert!((old / new - 1.0).abs() < 0.02, "{old} of the older, {new} of the newer");
}

#[test]
fn what_was_evicted_does_not_come_back_by_another_offer() {
    for (balance, seed) in (0..40).flat_map(|seed| [(false, seed), (true, seed)]) {
        let class = |e: u64| u32::from(e.is_multiple_of(3));
        let mut r = Reservoir::new(Settings { balance, ..settings(40, 0.1, seed) }).unwrap();
        (1..=50).for_each(|e| drop(r.offer(&small(e), &[], class(e))));
        let kept = [events(&r, false), events(&r, true)].concat();
        assert!(kept.iter().all(|&e| r.forget(e)));
        assert!(r.part(false).is_empty() && r.part(true).is_empty());
        for e in 1..=50 {
            assert_eq!(
                r.offer(&small(e), &[], class(e)).unwrap(),
                kept.contains(&e),
                "event {e}, seed {seed}"
            );
        }
    }
}

#[test]
fn held_out_events_are_one_of_every_block_and_never_trained_on() {
    for seed in 0..20 {
        let r = filled(settings(10_000, 0.1, seed), 1..=1000);
        let (train, held) = (events(&r, false), events(&r, true));
        assert_eq!((train.len(), held.len()), (900, 100));
        let blocks: Vec<u64> = held.iter().map(|e| (e - 1) / 10).collect();
        assert_eq!(blocks, (0..100).collect::<Vec<_>>());
        assert!(held.iter().all(|&e| held_out(seed, 0.1, e) && train.binary_search(&e).is_err()));
    }
    assert!(filled(settings(50, 0.0, 1), 1..=99).part(true).is_empty());
}

#[test]
fn a_gradient_has_no_loss_and_is_never_held_out() {
    let mut r = Reservoir::new(settings(1000, 0.5, 3)).unwrap();
    for e in 1..=200 {
        r.offer(&rich(e, 3), &[], 0).unwrap();
    }
    let gradients = |held| r.part(held).iter().filter(|e| e.event % 6 == 2).count();
    assert_eq!((gradients(false), gradients(true)), (34, 0));
}

#[test]
fn the_same_offers_give_the_same_bits() {
    for balance in [false, true] {
        let make = |seed| {
            let mut r = Reservoir::new(Settings { balance, ..settings(64, 0.1, seed) }).unwrap();
            for e in 1..=900 {
                let kept = r.offer(&rich(e, 4), &[e as f32; 4], (e % 7) as u32).unwrap();
                assert!(!kept || r.part(false).iter().chain(r.part(true).iter()).any(|x| x.event == e));
            }
            r.to_tensors("")
        };
        assert_eq!(make(5), make(5));
        assert_ne!(make(5), make(6));
    }
}

#[test]
fn unbalanced_the_order_of_offers_does_not_matter() {
    let up = filled(settings(30, 0.1, 9), 1..=500);
    let down = filled(settings(30, 0.1, 9), (1..=500).rev());
    for held in [false, true] {
        assert_eq!(events(&up, held), events(&down, held));
    }
}

#[test]
fn a_refusal_beforehand_is_kept_to() {
    let mut r = Reservoir::new(settings(20, 0.1, 4)).unwrap();
    let mut refused = 0;
    for e in 1..=2000 {
        let wanted = r.wants(&small(e), 0);
        let kept = r.offer(&small(e), &[], 0).unwrap();
        assert!(wanted || !kept);
        refused += u32::from(!wanted);
    }
    assert!(refused > 1700, "{refused}");
}

/// Pattern 1 is one event of 50; the others are of pattern 0.
fn rare(e: u64) -> u32 {
    u32::from(e.is_multiple_of(50))
}

#[test]
fn balanced_a_rare_pattern_keeps_its_share() {
    let counts = |balance| {
        let mut r = Reservoir::new(Settings { balance, ..settings(100, 0.1, 2) }).unwrap();
        for e in 1..=5000 {
            r.offer(&small(e), &[], rare(e)).unwrap();
        }
        [false, true].map(|held| r.part(held).iter().filter(|x| x.pattern == 1).count())
    };
    let (plain, balanced) = (counts(false), counts(true));
    assert!(plain[0] <= 8 && plain[1] <= 3, "{plain:?}");
    assert!((40..=45).contains(&balanced[0]), "{balanced:?}");
    assert_eq!(balanced[1], 5);
}

#[test]
fn balanced_every_event_of_a_class_is_as_likely() {
    const N: u64 = 300;
    let class = |e: u64| (e % 10 / 4) as u32; // 4, 4 and 2 of ten
    let mut kept = vec![0u32; N as usize];
    for seed in 0..SEEDS {
        let mut r = Reservoir::new(Settings { balance: true, ..settings(45, 0.0, seed) }).unwrap();
        for e in 1..=N {
            r.offer(&small(e), &[], class(e)).unwrap();
        }
        assert_eq!(r.part(false).len(), 45);
        events(&r, false).iter().for_each(|e| kept[*e as usize - 1] += 1);
    }
    for c in 0..3 {
        let of: Vec<u32> = (1..=N).filter(|&e| class(e) == c).map(|e| kept[e as usize - 1]).collect();
        let rate = f64::from(of.iter().sum::<u32>()) / (of.len() as f64 * SEEDS as f64);
        let z = z_of_chi2(&of, &vec![SEEDS as u32; of.len()], rate);
        assert!(z.abs() < 4.0, "class {c}: {z}");
        let share = rate * of.len() as f64;
        assert!((share - 15.0).abs() <= 1.0, "class {c} keeps {share} of 45");
    }
}

#[test]
fn more_patterns_than_places_all_get_their_turn() {
    let mut r = Reservoir::new(Settings { balance: true, ..settings(4, 0.0, 1) }).unwrap();
    let mut seen = std::collections::BTreeSet::new();
    for e in 1..=400 {
        r.offer(&small(e), &[], (e % 9) as u32).unwrap();
        assert!(r.part(false).len() <= 4);
        seen.extend(r.part(false).iter().filter(|_| e > 200).map(|x| x.pattern));
    }
    assert_eq!(seen.len(), 9);
}

#[test]
fn merged_patterns_share_one_place() {
    let mut r = Reservoir::new(Settings { balance: true, ..settings(60, 0.0, 8) }).unwrap();
    for e in 1..=600 {
        r.offer(&small(e), &[], (e % 3) as u32).unwrap();
    }
    let before = events(&r, false);
    r.merge_patterns(2, 1);
    r.merge_patterns(1, 1);
    assert_eq!(events(&r, false), before);
    let of = |r: &Reservoir, p: u32| r.part(false).iter().filter(|x| x.pattern == p).count();
    assert_eq!((of(&r, 0), of(&r, 1), of(&r, 2)), (20, 40, 0));
    for e in 601..=3000 {
        r.offer(&small(e), &[], (e % 2) as u32 * 5).unwrap();
    }
    assert_eq!((of(&r, 0), of(&r, 1), of(&r, 5)), (20, 20, 20));
    let copy = Reservoir::from_tensors("", &r.to_tensors("")).unwrap();
    assert_eq!(copy.to_tensors(""), r.to_tensors(""));

    let mut plain = filled(settings(60, 0.0, 8), 1..=600);
    let before = plain.part(false).clone();
    plain.merge_patterns(0, 3);
    plain.merge_patterns(3, 0);
    assert_eq!(*plain.part(false), before);
}

#[test]
fn capacities_from_none_to_two() {
    for (capacity, train, held) in [(0, 0, 0), (1, 1, 0), (2, 1, 1), (3, 2, 1), (512, 461, 51)] {
        let r = filled(settings(capacity, 0.1, 0), 1..=999);
        assert_eq!((r.part(false).len(), r.part(true).len()), (train, held), "{capacity}");
    }
}
