//! A reservoir as tensors, and back: an exact round trip, places and counters included.

use std::collections::BTreeMap;

use half::f16;
use serde::{Deserialize, Serialize};

use super::Part;
use super::entry::{Numbers, SECTIONS, Slot};
use super::holdout::Keys;
use super::part::{Class, UNBOUNDED};
use super::reservoir::{Reservoir, Settings};
use super::said::Kind;
use super::tensors::{Reader, document, tensor};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::format::Tensor;
use crate::learn::Feedback;

const VERSION: u32 = 1;
const NAMES: [&str; 2] = ["train", "held_out"];
/// Columns of `index`: pattern, module, flags, kind, row width, and the numbers of each section.
const COLUMNS: usize = 5 + SECTIONS;
/// Columns of `scalars`: quality (NaN: none), weight, advantage, and two of the feedback's kind.
const SCALARS: usize = 5;
const HAS_MODULE: u32 = 1;
const HAS_BASE: u32 = 2;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    version: u32,
    capacity: usize,
    max_bytes: Option<usize>,
    dtype: String,
    holdout: f64,
    balance: bool,
    seed: u64,
    parts: Vec<PartDocument>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PartDocument {
    seen: u64,
    too_large: u64,
    classes: Vec<ClassDocument>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ClassDocument {
    pattern: u32,
    seen: u64,
    full: bool,
    bound: u64,
}

impl Reservoir {
    /// Everything as tensors whose names start with `prefix`.
    pub fn to_tensors(&self, prefix: &str) -> Vec<Tensor> {
        let s = self.settings();
        let mut out = Vec::new();
        let mut parts = Vec::new();
        for (name, held) in NAMES.into_iter().zip([false, true]) {
            let part = self.part(held);
            let class = |(&pattern, c): (&u32, &Class)| ClassDocument {
                pattern,
                seen: c.seen,
                full: c.full,
                bound: c.bound,
            };
            let classes = part.classes.iter().map(class).collect();
            parts.push(PartDocument { seen: part.seen, too_large: part.too_large, classes });
            save(part.slots(), s.dtype, |what| format!("{prefix}{name}/{what}"), &mut out);
        }
        let state = Document {
            version: VERSION,
            capacity: s.capacity,
            max_bytes: s.max_bytes,
            dtype: s.dtype.to_string(),
            holdout: s.holdout,
            balance: s.balance,
            seed: s.seed,
            parts,
        };
        out.push(document(format!("{prefix}state"), &state));
        out
    }

    /// Reads what [`Reservoir::to_tensors`] gave; other tensors are not looked at.
    ///
    /// # Errors
    /// Tensors that are missing, of another shape or dtype, or that contradict each other.
    pub fn from_tensors(prefix: &str, tensors: &[Tensor]) -> Result<Self> {
        let r = Reader { what: "reservoir", prefix, tensors };
        let state: Document = r.document("state")?;
        if state.version != VERSION {
            let reason = format!("version {}, this build reads {VERSION}", state.version);
            return Err(Error::unsupported("reservoir", reason));
        }
        let wrong = |e: Error| r.wrong("state", e);
        let dtype: Dtype = state.dtype.parse().map_err(wrong)?;
        let settings = Settings {
            capacity: state.capacity,
            max_bytes: state.max_bytes,
            dtype,
            holdout: state.holdout,
            balance: state.balance,
            seed: state.seed,
        };
        let mut out = Reservoir::new(settings).map_err(wrong)?;
        if state.parts.len() != NAMES.len() {
            return Err(r.wrong("state", "two parts are expected"));
        }
        let mut keys = Keys::new(state.seed);
        for (held, (name, p)) in NAMES.into_iter().zip(&state.parts).enumerate() {
            let held = held == 1;
            let slots = load(&r, name, dtype)?;
            for slot in &slots {
                let feedback = Part::entry(slot).feedback();
                if out.is_held_out(slot.event, &feedback) != held {
                    return Err(r.wrong(name, format!("event {} belongs to the other part", slot.event)));
                }
            }
            let part = out.part_mut(held);
            let class = |c: &ClassDocument| {
                (c.pattern, Class { seen: c.seen, kept: 0, full: c.full, bound: c.bound })
            };
            let classes: BTreeMap<u32, Class> = p.classes.iter().map(class).collect();
            let seen = classes.values().try_fold(0u64, |n, c| n.checked_add(c.seen));
            let bounded = classes.values().all(|c| c.bound <= UNBOUNDED);
            if classes.len() != p.classes.len() || seen != Some(p.seen) || !bounded || p.too_large > p.seen {
                return Err(r.wrong("state", format!("the counters of {name} contradict each other")));
            }
            if slots.len() > part.capacity {
                let reason = format!("{} events of {name} in {} places", slots.len(), part.capacity);
                return Err(r.wrong("state", reason));
            }
            (part.seen, part.too_large, part.classes) = (p.seen, p.too_large, classes);
            for mut slot in slots {
                slot.key = keys.of(slot.event);
                let (id, event) = (part.class_of(slot.pattern), slot.event);
                if part.classes.get(&id).is_none_or(|c| slot.key >= c.bound) {
                    return Err(r.wrong(name, format!("event {event} is one that is not kept")));
                }
                part.insert(slot);
            }
            if part.classes.values().any(|c| u64::from(c.kept) > c.seen) {
                return Err(r.wrong(name, "more events than were seen"));
            }
            if part.sample_bytes() > part.max_bytes {
                return Err(r.wrong(name, "more bytes than the settings allow"));
            }
        }
        Ok(out)
    }
}

fn save(slots: &[Slot], dtype: Dtype, name: impl Fn(&str) -> String, out: &mut Vec<Tensor>) {
    let n = slots.len();
    let kind = |s: &Slot| match &s.numbers {
        Numbers::F32 { feedback, .. } => Kind::of(feedback).0,
        Numbers::F16 { kind, .. } => *kind,
    };
    out.push(tensor(name("events"), vec![n], slots.iter().map(|s| s.event)));
    let index = slots.iter().flat_map(|s| {
        let flags = s.module.map_or(0, |_| HAS_MODULE) | if s.has_base { HAS_BASE } else { 0 };
        let (code, width, _) = kind(s).code();
        let [x, base, stored, said] = s.lens;
        [s.pattern, s.module.unwrap_or(0), flags, code, width, x, base, stored, said]
    });
    out.push(tensor(name("index"), vec![n, COLUMNS], index));
    let scalars = slots.iter().flat_map(|s| {
        let [a, b] = kind(s).code().2;
        [s.quality.unwrap_or(f32::NAN), s.weight, s.advantage, a, b]
    });
    out.push(tensor(name("scalars"), vec![n, SCALARS], scalars));
    let total: usize = slots.iter().flat_map(|s| s.lens).map(|n| n as usize).sum();
    if dtype == Dtype::F32 {
        let mut all: Vec<f32> = Vec::with_capacity(total);
        for s in slots {
            if let Numbers::F32 { values, feedback } = &s.numbers {
                all.extend_from_slice(values);
                Kind::of(feedback).1.iter().for_each(|v| all.extend_from_slice(v));
            }
        }
        out.push(tensor(name("numbers"), vec![total], all));
    } else {
        let (mut all, mut every): (Vec<f16>, Vec<i16>) = (Vec::with_capacity(total), Vec::new());
        for s in slots {
            if let Numbers::F16 { values, shifts, .. } = &s.numbers {
                all.extend_from_slice(values);
                every.extend_from_slice(shifts);
            }
        }
        out.push(tensor(name("numbers"), vec![total], all));
        out.push(tensor(name("shifts"), vec![n, SECTIONS], every));
    }
}

/// The numbers of a part in its dtype, and the shifts of halves.
enum All {
    F32(Vec<f32>),
    F16(Vec<f16>, Vec<i16>),
}

fn load(r: &Reader<'_>, part: &str, dtype: Dtype) -> Result<Vec<Slot>> {
    let name = |what: &str| format!("{part}/{what}");
    let events: Vec<u64> = r.numbers(&name("events"), &[None])?;
    let n = events.len();
    let index: Vec<u32> = r.numbers(&name("index"), &[Some(n), Some(COLUMNS)])?;
    let scalars: Vec<f32> = r.numbers(&name("scalars"), &[Some(n), Some(SCALARS)])?;
    let (all, total) = if dtype == Dtype::F32 {
        let v = r.finite(&name("numbers"), &[None])?;
        let total = v.len();
        (All::F32(v), total)
    } else {
        let v: Vec<f16> = r.numbers(&name("numbers"), &[None])?;
        let shifts: Vec<i16> = r.numbers(&name("shifts"), &[Some(n), Some(SECTIONS)])?;
        if !v.iter().all(|v| v.is_finite()) {
            return Err(r.wrong(&name("numbers"), "contains NaN or infinity"));
        }
        if !shifts.iter().all(|s| (-113..=126).contains(s)) {
            return Err(r.wrong(&name("shifts"), "a power that no array needs"));
        }
        let total = v.len();
        (All::F16(v, shifts), total)
    };
    let mut slots = Vec::with_capacity(n);
    let mut from = 0usize;
    for (i, &event) in events.iter().enumerate() {
        let row: &[u32; COLUMNS] = index[i * COLUMNS..][..COLUMNS].try_into().expect("columns");
        let bad = |reason: &str| r.wrong(&name("index"), format!("row {i} {reason}"));
        let [pattern, module, flags, code, width, lens @ ..] = *row;
        let [quality, weight, advantage, a, b] = scalars[i * SCALARS..][..SCALARS] else { unreachable!() };
        let kind = Kind::from_code(code, width, [a, b]).ok_or_else(|| bad("has no known feedback"))?;
        let said = lens[3] as usize;
        let width = kind.width(said).ok_or_else(|| bad("has no feedback of a known width"))?;
        let has_base = flags & HAS_BASE != 0;
        if flags & !(HAS_MODULE | HAS_BASE) != 0
            || lens[1] as usize != if has_base { width } else { 0 }
            || !(lens[2] as usize).is_multiple_of(width)
        {
            return Err(bad("does not fit its feedback"));
        }
        let numbers = lens.iter().map(|&n| n as usize).sum::<usize>();
        let to = from.checked_add(numbers).filter(|&to| to <= total);
        let to = to.ok_or_else(|| bad("reads beyond the numbers"))?;
        if !((quality.is_nan() || (0.0..=1.0).contains(&quality))
            && weight.is_finite()
            && weight >= 0.0
            && advantage.is_finite())
        {
            return Err(r.wrong(&name("scalars"), format!("row {i} is out of range")));
        }
        let numbers = match &all {
            All::F32(v) => {
                let (kept, said) = v[from..to].split_at(numbers - said);
                let feedback: Feedback = kind.build(said.to_vec());
                Numbers::F32 { values: kept.into(), feedback: feedback.into() }
            }
            All::F16(v, shifts) => {
                let shifts = shifts[i * SECTIONS..][..SECTIONS].try_into().expect("columns");
                Numbers::F16 { values: v[from..to].into(), shifts, kind }
            }
        };
        from = to;
        slots.push(Slot {
            event,
            key: 0,
            pattern,
            module: (flags & HAS_MODULE != 0).then_some(module),
            quality: (!quality.is_nan()).then_some(quality),
            weight,
            advantage,
            has_base,
            lens,
            numbers,
        });
    }
    if from == total {
        Ok(slots)
    } else {
        Err(r.wrong(&name("numbers"), "more numbers than the events have"))
    }
}
