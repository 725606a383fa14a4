//! Bottleneck LinUCB: which of some named arms to choose, learned from scalar rewards.
//!
//! LinUCB with one model per arm (Li et al. 2010, arXiv 1003.0146, algorithm 1) in the bottleneck
//! `u = s x A` of a module: recursive least squares of the reward on u, and the arm with the largest
//! `theta . u + alpha sqrt(u P u)` is chosen. Rank r instead of the width of x makes an event `O(arms r^2)`.

mod arm;
mod bytes;
pub mod evaluate;
mod live;
mod settings;
mod state;

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};

pub use bytes::{from_bytes, to_bytes};
pub use evaluate::{OffPolicy, off_policy};
pub use live::LiveBandit;
pub use settings::BanditSettings;

use crate::error::{Error, Result};
use crate::kernels::Kernels;
use crate::learn::learner::{LIMIT, TINY};
use crate::rng::Rng;
use arm::Arm;

/// What was chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// Number of the choice, from 1; the reward names it.
    pub id: u64,
    /// Position of the chosen arm in the arms that were asked for.
    pub arm: usize,
    /// Its name.
    pub name: String,
    /// Probability that this arm would be chosen here.
    pub propensity: f64,
    /// Expected reward plus exploration bonus of every arm that was asked for.
    pub scores: Vec<f64>,
}

/// What a reward did.
#[derive(Clone, Debug, PartialEq)]
pub struct Rewarded {
    /// Name of the arm.
    pub name: String,
    /// Reward that was expected of it there, before this one.
    pub expected: f64,
    /// Rewards of the arm so far.
    pub count: u64,
}

/// A choice with its reward, as off-policy evaluation wants it.
#[derive(Clone, Debug, PartialEq)]
pub struct Logged {
    /// Number of the choice.
    pub id: u64,
    /// Which arm; see [`Bandit::arm_name`].
    pub arm: usize,
    /// Probability that it was chosen.
    pub propensity: f64,
    /// Its reward.
    pub reward: f64,
    /// Input of the choice, where it is kept.
    x: Box<[f32]>,
}

/// A choice that waits for its reward.
#[derive(Clone, Debug)]
struct Open {
    arm: usize,
    propensity: f64,
    u: Box<[f32]>,
    x: Box<[f32]>,
}

/// LinUCB over named arms in a bottleneck of fixed width; arms are made when they are first asked for.
#[derive(Clone, Debug)]
pub struct Bandit {
    rank: usize,
    settings: BanditSettings,
    /// `|u|^2` that counts as 1: the prior of every arm is `P = I / (ridge unit)`.
    unit: Option<f64>,
    arms: Vec<Arm>,
    index: HashMap<String, usize>,
    open: BTreeMap<u64, Open>,
    next: u64,
    dropped: u64,
    log: VecDeque<Logged>,
    /// Digest of the A that the bottlenecks come from, for whoever makes them.
    basis: Option<u64>,
    restarts: u64,
    /// Calls so far; marks the arms of one call. Not part of the state.
    turn: u64,
    scratch: Vec<f64>,
}

/// Arms of a call: those that exist by their place, and how many are new.
struct Asked {
    places: Vec<usize>,
    fresh: usize,
}

impl Bandit {
    /// A bandit that has seen nothing.
    ///
    /// # Errors
    /// A rank of 0, settings out of range.
    pub fn new(rank: usize, settings: BanditSettings) -> Result<Self> {
        if rank == 0 {
            return Err(Error::config("rank", rank, "at least 1"));
        }
        Ok(Bandit {
            rank,
            settings: settings.validate()?,
            unit: None,
            arms: Vec::new(),
            index: HashMap::new(),
            open: BTreeMap::new(),
            next: 1,
            dropped: 0,
            log: VecDeque::new(),
            basis: None,
            restarts: 0,
            turn: 0,
            scratch: Vec::new(),
        })
    }

    /// Settings it was made with.
    pub fn settings(&self) -> &BanditSettings {
        &self.settings
    }

    /// Width of the bottleneck.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Chooses among `arms` for the bottleneck `u`. Ties, and the exploration share, are drawn by the number of
    /// the choice, so that the same history gives the same choices.
    ///
    /// The oldest choice without a reward is given up when more than `max_open` wait.
    ///
    /// # Errors
    /// Another width, NaN or infinity; no arms, an arm twice, an empty name, more arms than `max_arms`.
    /// Nothing changes then.
    pub fn choose(&mut self, u: &[f32], arms: &[&str]) -> Result<Choice> {
        self.choose_for(u, arms, Box::default(), None)
    }

    /// As [`Bandit::choose`], keeping the input that `u` was made from; `unit` is what `|u|^2` is on average,
    /// where that is known.
    fn choose_for(&mut self, u: &[f32], arms: &[&str], x: Box<[f32]>, unit: Option<f64>) -> Result<Choice> {
        if u.len() != self.rank {
            return Err(Error::shape("u", format!("({},)", u.len()), format!("({},)", self.rank)));
        }
        let norm2: f64 = u.iter().map(|&u| f64::from(u) * f64::from(u)).sum();
        if !norm2.is_finite() {
            return Err(Error::non_finite("u"));
        }
        let asked = self.ask(arms)?;
        if self.unit.is_none() {
            self.unit = unit.or((norm2 >= TINY).then_some(norm2));
        }
        let scores = self.scores(u, norm2, &asked.places);
        for name in arms.iter().filter(|_| asked.fresh > 0) {
            if !self.index.contains_key(*name) {
                self.index.insert((*name).to_owned(), self.arms.len());
                self.arms.push(Arm::new(name));
            }
        }
        let (arm, propensity) = self.pick(&scores);
        let id = self.next;
        self.next += 1;
        let at = asked.places[arm];
        self.open.insert(id, Open { arm: at, propensity, u: u.into(), x });
        while self.open.len() > self.settings.max_open {
            self.open.pop_first();
            self.dropped += 1;
        }
        Ok(Choice { id, arm, name: arms[arm].to_owned(), propensity, scores })
    }

    /// Says which arm an open choice was in truth: one that was made before, and comes again from a journal.
    pub(crate) fn assign(&mut self, choice: u64, name: &str, propensity: f64) {
        if let (Some(open), Some(&arm)) = (self.open.get_mut(&choice), self.index.get(name)) {
            (open.arm, open.propensity) = (arm, propensity);
        }
    }

    /// Looks the arms up and refuses what cannot be asked for.
    fn ask(&mut self, arms: &[&str]) -> Result<Asked> {
        if arms.is_empty() {
            return Err(Error::config("arms", "none", "at least one name"));
        }
        self.turn += 1;
        let mut places = Vec::with_capacity(arms.len());
        let mut fresh: HashSet<&str> = HashSet::new();
        for &name in arms {
            let twice = match self.index.get(name) {
                Some(&at) => {
                    places.push(at);
                    std::mem::replace(&mut self.arms[at].turn, self.turn) == self.turn
                }
                None if name.is_empty() => {
                    return Err(Error::config("arms", "an empty name", "names that are not empty"));
                }
                None => {
                    places.push(self.arms.len() + fresh.len());
                    !fresh.insert(name)
                }
            };
            if twice {
                return Err(Error::config("arms", format!("{name:?} twice"), "each arm once"));
            }
        }
        let (all, most) = (self.arms.len() + fresh.len(), self.settings.max_arms);
        if all > most {
            let got = format!("{} new names, {all} arms in all", fresh.len());
            return Err(Error::config("arms", got, format!("at most {most} arms (max_arms)")));
        }
        Ok(Asked { places, fresh: fresh.len() })
    }

    /// `theta . u + alpha sqrt(u P u)` of arms by place; places beyond the last are arms to be.
    fn scores(&mut self, u: &[f32], norm2: f64, places: &[usize]) -> Vec<f64> {
        let mut wide = std::mem::take(&mut self.scratch);
        wide.clear();
        wide.extend(u.iter().map(|&u| f64::from(u)));
        // Nothing is known of a context without length, whatever the prior.
        let blank = if norm2 < TINY { 0.0 } else { norm2 * self.prior() };
        let score = |&at: &usize| {
            let (mean, variance) = match self.arms.get(at) {
                Some(arm) if !arm.p.is_empty() => arm.predict(&wide),
                _ => (0.0, blank),
            };
            mean + self.settings.alpha * variance.max(0.0).sqrt()
        };
        let scores = places.iter().map(score).collect();
        self.scratch = wide;
        scores
    }

    /// Variance of every direction before the first reward.
    fn prior(&self) -> f64 {
        1.0 / (self.settings.ridge * self.unit.unwrap_or(1.0))
    }

    /// Draws from `(1 - epsilon) / ties` on the best arms plus `epsilon / n` on all.
    fn pick(&self, scores: &[f64]) -> (usize, f64) {
        let best = scores.iter().fold(f64::NEG_INFINITY, |m, &s| m.max(s));
        let ties = scores.iter().filter(|&&s| s == best).count();
        let (n, epsilon) = (scores.len(), self.settings.epsilon);
        let nth_best = |i: usize| {
            let best = scores.iter().enumerate().filter(|&(_, &s)| s == best).nth(i);
            best.map_or(0, |(at, _)| at)
        };
        let arm = if ties == 1 && epsilon == 0.0 {
            nth_best(0)
        } else {
            let mut rng = Rng::new(self.settings.seed, self.next);
            // 48 bits, so that a small share is met.
            let mut draw = || f64::from(rng.uniform()) + f64::from(rng.uniform()) / 16_777_216.0;
            let explores = draw() < epsilon;
            let of = |n: usize, draw: f64| (draw * n as f64) as usize;
            if explores { of(n, draw()) } else { nth_best(of(ties, draw())) }
        };
        let greedy = if scores[arm] == best { (1.0 - epsilon) / ties as f64 } else { 0.0 };
        (arm, (greedy + epsilon / n as f64).min(1.0))
    }

    /// The reward of a choice: one step of recursive least squares on its arm.
    ///
    /// # Errors
    /// A reward that is no finite number, or a choice that does not wait for one. Nothing changes then.
    pub fn reward(&mut self, k: &Kernels, choice: u64, reward: f64) -> Result<Rewarded> {
        if !reward.is_finite() {
            return Err(Error::non_finite("reward"));
        }
        if reward.abs() > LIMIT {
            return Err(Error::config(
                "reward",
                format!("{reward:e}"),
                format!("a number within {LIMIT:e} of zero"),
            ));
        }
        let Some(Open { arm, propensity, u, x }) = self.open.remove(&choice) else {
            return Err(self.unknown(choice));
        };
        let (prior, scratch) = (self.prior(), &mut self.scratch);
        let known = &mut self.arms[arm];
        let expected = known.learn(k, &u, prior, reward, scratch);
        known.count += 1;
        known.total += reward;
        let rewarded = Rewarded { name: known.name.clone(), expected, count: known.count };
        self.log.push_back(Logged { id: choice, arm, propensity, reward, x });
        while self.log.len() > self.settings.history {
            self.log.pop_front();
        }
        Ok(rewarded)
    }

    fn unknown(&self, choice: u64) -> Error {
        let why = if choice == 0 || choice >= self.next {
            "no choice has that number".to_owned()
        } else {
            format!(
                "it has its reward, or was given up as one of more than {} (max_open)",
                self.settings.max_open
            )
        };
        Error::UnknownChoice { got: choice, why }
    }

    /// Learns again in another bottleneck what the log holds: `rows` gives the u of an input.
    fn restart(&mut self, k: &Kernels, unit: Option<f64>, mut rows: impl FnMut(&[f32]) -> Box<[f32]>) {
        let logged: Vec<_> = self.log.iter().map(|l| rows(&l.x)).collect();
        for open in self.open.values_mut() {
            open.u = rows(&open.x);
        }
        let us = logged.iter().chain(self.open.values().map(|o| &o.u));
        let (mut sum, mut n) = (0.0, 0usize);
        for u in us {
            let norm2: f64 = u.iter().map(|&u| f64::from(u) * f64::from(u)).sum();
            if norm2 >= TINY {
                (sum, n) = (sum + norm2, n + 1);
            }
        }
        self.unit = unit.or((n > 0).then(|| sum / n as f64));
        for arm in &mut self.arms {
            arm.theta.clear();
            arm.p.clear();
        }
        let prior = self.prior();
        for (kept, u) in self.log.iter().zip(&logged) {
            self.arms[kept.arm].learn(k, u, prior, kept.reward, &mut self.scratch);
        }
        self.restarts += 1;
    }

    /// The latest rewarded choices, oldest first, at most `history` of them.
    pub fn log(&self) -> impl ExactSizeIterator<Item = &Logged> {
        self.log.iter()
    }

    /// Name, rewards and their sum of every arm, in the order of their making.
    pub fn arms(&self) -> impl ExactSizeIterator<Item = (&str, u64, f64)> {
        self.arms.iter().map(|a| (a.name.as_str(), a.count, a.total))
    }

    /// Name of an arm of the log.
    pub fn arm_name(&self, arm: usize) -> &str {
        &self.arms[arm].name
    }

    /// Choices that wait for a reward.
    pub fn waiting(&self) -> usize {
        self.open.len()
    }

    /// Choices that were given up because more than `max_open` waited.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// How often the arms were learned again because A had changed.
    pub fn restarts(&self) -> u64 {
        self.restarts
    }

    /// Bytes resident: arms, waiting choices and log.
    pub fn memory_bytes(&self) -> usize {
        let arm = |a: &Arm| 2 * (a.name.len() + 24) + size_of::<Arm>() + 8 * (a.p.len() + a.theta.len());
        let arms: usize = self.arms.iter().map(arm).sum();
        let open: usize =
            self.open.values().map(|o| size_of::<Open>() + 8 + 4 * (o.u.len() + o.x.len())).sum();
        let log: usize = self.log.iter().map(|l| 4 * l.x.len()).sum();
        size_of::<Self>()
            + arms
            + open
            + log
            + self.log.capacity() * size_of::<Logged>()
            + 8 * self.scratch.len()
    }
}
