//! A bandit as tensors, bit for bit.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};

use super::arm::Arm;
use super::{Bandit, BanditSettings, Logged, Open};
use crate::error::{Error, Result};
use crate::format::{Tensor, TensorDtype};

/// The layout written; a newer one is refused.
const VERSION: u32 = 1;
const WHAT: &str = "bandit state";

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StateJson {
    version: u32,
    rank: usize,
    /// Width of the inputs that are kept; 0 where none are.
    width: usize,
    settings: BanditSettings,
    unit: Option<f64>,
    basis: Option<u64>,
    next: u64,
    dropped: u64,
    restarts: u64,
    open: usize,
    log: usize,
    arms: Vec<ArmJson>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ArmJson {
    name: String,
    count: u64,
    total: f64,
    learned: bool,
}

/// Numbers as a tensor holds them.
trait Number: Copy {
    const DTYPE: TensorDtype;
    const SIZE: usize;
    fn put(self, to: &mut Vec<u8>);
    fn get(from: &[u8]) -> Self;
    fn is_sound(self) -> bool;
}

macro_rules! number {
    ($t:ty, $dtype:ident, $sound:expr) => {
        impl Number for $t {
            const DTYPE: TensorDtype = TensorDtype::$dtype;
            const SIZE: usize = size_of::<$t>();
            fn put(self, to: &mut Vec<u8>) {
                to.extend(self.to_le_bytes());
            }
            fn get(from: &[u8]) -> Self {
                <$t>::from_le_bytes(from.try_into().expect("chunks of this size"))
            }
            fn is_sound(self) -> bool {
                $sound(self)
            }
        }
    };
}
number!(f64, F64, f64::is_finite);
number!(f32, F32, f32::is_finite);
number!(u64, U64, |_| true);

fn tensor<T: Number>(name: String, shape: Vec<usize>, values: impl Iterator<Item = T>) -> Tensor {
    let mut data = Vec::with_capacity(shape.iter().product::<usize>() * T::SIZE);
    values.for_each(|v| v.put(&mut data));
    Tensor { name, dtype: T::DTYPE, shape, data: data.into() }
}

/// The tensors of one bandit by their names without the prefix.
struct Reader<'a>(HashMap<&'a str, &'a Tensor>);

fn wrong(reason: impl Into<String>) -> Error {
    Error::format(WHAT, reason)
}

impl Reader<'_> {
    fn take<T: Number>(&self, name: &str, shape: &[usize]) -> Result<Vec<T>> {
        let t = self.0.get(name).ok_or_else(|| wrong(format!("tensor {name}: missing")))?;
        if t.dtype != T::DTYPE || t.shape != shape {
            let (got, want) = (&t.shape, T::DTYPE);
            return Err(wrong(format!("tensor {name}: {} {got:?}, expected {want} {shape:?}", t.dtype)));
        }
        let values: Vec<T> = t.data.chunks_exact(T::SIZE).map(T::get).collect();
        let whole = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)) == Some(values.len());
        if whole && values.iter().all(|v| v.is_sound()) {
            Ok(values)
        } else {
            Err(wrong(format!("tensor {name}: cut off, NaN or infinity")))
        }
    }
}

impl Bandit {
    /// Width of the inputs that are kept, where any are.
    pub fn width(&self) -> Option<usize> {
        let kept = self.log.back().map(|l| l.x.len());
        kept.or(self.open.values().next().map(|o| o.x.len())).filter(|&n| n > 0)
    }

    /// Everything, as tensors whose names start with `prefix`.
    pub fn to_tensors(&self, prefix: &str) -> Vec<Tensor> {
        let name = |what: &str| format!("{prefix}{what}");
        let (rank, width) = (self.rank, self.width().unwrap_or(0));
        let learned = || self.arms.iter().filter(|a| !a.p.is_empty());
        let (arms, open, log) = (learned().count(), self.open.len(), self.log.len());
        let arm = |a: &Arm| ArmJson {
            name: a.name.clone(),
            count: a.count,
            total: a.total,
            learned: !a.p.is_empty(),
        };
        let state = StateJson {
            version: VERSION,
            rank,
            width,
            settings: self.settings.clone(),
            unit: self.unit,
            basis: self.basis,
            next: self.next,
            dropped: self.dropped,
            restarts: self.restarts,
            open,
            log,
            arms: self.arms.iter().map(arm).collect(),
        };
        let json = serde_json::to_vec(&state).expect("plain numbers and names");
        let waiting = || self.open.values();
        vec![
            Tensor {
                name: name("state"),
                dtype: TensorDtype::U8,
                shape: vec![json.len()],
                data: json.into(),
            },
            tensor(name("theta"), vec![arms, rank], learned().flat_map(|a| a.theta.iter().copied())),
            tensor(name("p"), vec![arms, rank, rank], learned().flat_map(|a| a.p.iter().copied())),
            tensor(name("open_id"), vec![open], self.open.keys().copied()),
            tensor(name("open_arm"), vec![open], waiting().map(|o| o.arm as u64)),
            tensor(name("open_propensity"), vec![open], waiting().map(|o| o.propensity)),
            tensor(name("open_u"), vec![open, rank], waiting().flat_map(|o| o.u.iter().copied())),
            tensor(name("open_x"), vec![open, width], waiting().flat_map(|o| o.x.iter().copied())),
            tensor(name("log_id"), vec![log], self.log.iter().map(|l| l.id)),
            tensor(name("log_arm"), vec![log], self.log.iter().map(|l| l.arm as u64)),
            tensor(name("log_propensity"), vec![log], self.log.iter().map(|l| l.propensity)),
            tensor(name("log_reward"), vec![log], self.log.iter().map(|l| l.reward)),
            tensor(name("log_x"), vec![log, width], self.log.iter().flat_map(|l| l.x.iter().copied())),
        ]
    }

    /// Takes what [`Bandit::to_tensors`] gave; later choices and rewards are bit-identical.
    ///
    /// # Errors
    /// Tensors of anything else, cut off or damaged; a newer layout.
    pub fn from_tensors(prefix: &str, tensors: &[Tensor]) -> Result<Self> {
        let named = tensors.iter().filter_map(|t| Some((t.name.strip_prefix(prefix)?, t)));
        let from = Reader(named.collect());
        let json = from.0.get("state").ok_or_else(|| wrong("tensor state: missing"))?;
        let version = |v: &serde_json::Value| v.get("version").and_then(serde_json::Value::as_u64);
        let json: serde_json::Value = serde_json::from_slice(&json.data).map_err(|e| wrong(e.to_string()))?;
        match version(&json) {
            Some(n) if n == u64::from(VERSION) => {}
            Some(n) => {
                let reason = format!("format version {n}, this build reads {VERSION}; upgrade microlora");
                return Err(Error::unsupported(WHAT, reason));
            }
            None => return Err(wrong("no usable version")),
        }
        let s: StateJson = serde_json::from_value(json).map_err(|e| wrong(e.to_string()))?;
        let mut bandit = Bandit::new(s.rank, s.settings).map_err(|e| wrong(e.to_string()))?;
        if !s.unit.is_none_or(|u| u.is_finite() && u > 0.0) {
            return Err(wrong("its unit is not a finite number above 0"));
        }
        (bandit.unit, bandit.basis) = (s.unit, s.basis);
        (bandit.next, bandit.dropped, bandit.restarts) = (s.next, s.dropped, s.restarts);
        bandit.take_arms(s.arms, &from)?;
        bandit.take_events(s.open, s.log, s.width, &from)?;
        Ok(bandit)
    }

    fn take_arms(&mut self, arms: Vec<ArmJson>, from: &Reader<'_>) -> Result<()> {
        let rank = self.rank;
        if arms.len() > self.settings.max_arms {
            return Err(wrong(format!("{} arms, its settings allow {}", arms.len(), self.settings.max_arms)));
        }
        let learned = arms.iter().filter(|a| a.learned).count();
        let theta: Vec<f64> = from.take("theta", &[learned, rank])?;
        let p: Vec<f64> = from.take("p", &[learned, rank, rank])?;
        if p.chunks_exact(rank * rank).any(|p| p.iter().step_by(rank + 1).any(|&d| d < 0.0)) {
            return Err(wrong("tensor p: a variance below zero"));
        }
        let mut rows = theta.chunks_exact(rank).zip(p.chunks_exact(rank * rank));
        for (at, a) in arms.into_iter().enumerate() {
            let (theta, p) = match a.learned {
                true => rows.next().ok_or_else(|| wrong("fewer rows than arms that learned"))?,
                false => (&[][..], &[][..]),
            };
            if a.name.is_empty() || self.index.insert(a.name.clone(), at).is_some() || !a.total.is_finite() {
                return Err(wrong(format!("arm {:?}: empty, named twice, or its sum is not finite", a.name)));
            }
            let (theta, p) = (theta.to_vec(), p.to_vec());
            self.arms.push(Arm { name: a.name, theta, p, count: a.count, total: a.total, turn: 0 });
        }
        Ok(())
    }

    fn take_events(&mut self, open: usize, log: usize, width: usize, from: &Reader<'_>) -> Result<()> {
        let (arms, next) = (self.arms.len(), self.next);
        if open > self.settings.max_open || log > self.settings.history {
            return Err(wrong(format!(
                "{open} waiting and {log} logged choices, more than its settings allow"
            )));
        }
        let check = |ids: &[u64], at: &[u64], propensities: &[f64]| {
            let ids = ids.iter().all(|&id| id > 0 && id < next);
            let at = at.iter().all(|&a| a < arms as u64);
            let drawn = propensities.iter().all(|&p| p > 0.0 && p <= 1.0);
            if ids && at && drawn { Ok(()) } else { Err(wrong("a choice that cannot have been")) }
        };
        let ids: Vec<u64> = from.take("open_id", &[open])?;
        let at: Vec<u64> = from.take("open_arm", &[open])?;
        let propensity: Vec<f64> = from.take("open_propensity", &[open])?;
        let u: Vec<f32> = from.take("open_u", &[open, self.rank])?;
        let x: Vec<f32> = from.take("open_x", &[open, width])?;
        check(&ids, &at, &propensity)?;
        let row = |v: &[f32], i: usize, n: usize| -> Box<[f32]> { v[i * n..(i + 1) * n].into() };
        let mut waiting = BTreeMap::new();
        for (i, &id) in ids.iter().enumerate() {
            let (u, x) = (row(&u, i, self.rank), row(&x, i, width));
            waiting.insert(id, Open { arm: at[i] as usize, propensity: propensity[i], u, x });
        }
        if waiting.len() != open {
            return Err(wrong("a choice that waits twice"));
        }
        let ids: Vec<u64> = from.take("log_id", &[log])?;
        let at: Vec<u64> = from.take("log_arm", &[log])?;
        let propensity: Vec<f64> = from.take("log_propensity", &[log])?;
        let reward: Vec<f64> = from.take("log_reward", &[log])?;
        let x: Vec<f32> = from.take("log_x", &[log, width])?;
        check(&ids, &at, &propensity)?;
        let entry = |i: usize| Logged {
            id: ids[i],
            arm: at[i] as usize,
            propensity: propensity[i],
            reward: reward[i],
            x: row(&x, i, width),
        };
        self.log = (0..log).map(entry).collect();
        self.open = waiting;
        Ok(())
    }
}
