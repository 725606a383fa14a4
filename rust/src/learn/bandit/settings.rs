//! Settings of a bandit; validated when made.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// How a bandit explores, and how much it keeps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BanditSettings {
    /// Weight of the exploration bonus `sqrt(u P u)`, in units of the rewards; 0 is greedy.
    pub alpha: f64,
    /// Ridge of every arm, in units of the mean `|u|^2`.
    pub ridge: f64,
    /// Share of choices that are drawn evenly from all arms: what off-policy evaluation lives on.
    pub epsilon: f64,
    /// Arms that may be named.
    pub max_arms: usize,
    /// Choices that may wait for a reward; the oldest is given up beyond it.
    pub max_open: usize,
    /// Rewarded choices kept, for off-policy evaluation and to learn again from where A changes.
    pub history: usize,
    /// Seed of ties and exploration.
    pub seed: u64,
}

impl Default for BanditSettings {
    fn default() -> Self {
        BanditSettings {
            alpha: 0.3,
            ridge: 1.0,
            epsilon: 0.0,
            max_arms: 256,
            max_open: 1000,
            history: 1000,
            seed: 0,
        }
    }
}

impl BanditSettings {
    /// Refuses settings outside their ranges.
    ///
    /// # Errors
    /// [`Error::Config`] that names the setting.
    pub fn validate(self) -> Result<Self> {
        let check = |ok: bool, name: &str, got: f64, want: &str| {
            if ok { Ok(()) } else { Err(Error::config(name, got, want)) }
        };
        let (wide, small) = (1e-12..=1e12, 0.0..=1e12);
        check(small.contains(&self.alpha), "alpha", self.alpha, "a number from 0 to 1e12")?;
        check(wide.contains(&self.ridge), "ridge", self.ridge, "a number from 1e-12 to 1e12")?;
        check((0.0..=1.0).contains(&self.epsilon), "epsilon", self.epsilon, "a number from 0 to 1")?;
        check(self.max_arms > 0, "max_arms", self.max_arms as f64, "at least 1")?;
        check(self.max_open > 0, "max_open", self.max_open as f64, "at least 1")?;
        Ok(self)
    }
}
