//! Settings of the instant update; validated when made, read on every event.

use std::str::FromStr;

use crate::error::{Error, Result};

/// Which one-event rule `instant` uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// RLS for squared-error targets, NLMS for everything else.
    Auto,
    /// RLS only; feedback without a squared-error target is refused.
    Rls,
    /// Normalised LMS with a line check, for every feedback.
    Nlms,
}

/// Which factors an NLMS step moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Train {
    /// B only: the new error is exactly `1 - mu` times the old one.
    B,
    /// Both factors.
    Both,
}

impl FromStr for Rule {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        match s {
            "auto" => Ok(Rule::Auto),
            "rls" => Ok(Rule::Rls),
            "nlms" => Ok(Rule::Nlms),
            _ => Err(Error::config("instant.rule", format!("{s:?}"), "auto, rls or nlms")),
        }
    }
}

impl FromStr for Train {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        match s {
            "b" => Ok(Train::B),
            "both" => Ok(Train::Both),
            _ => Err(Error::config("instant.train", format!("{s:?}"), "b or both")),
        }
    }
}

/// Everything `instant` needs to know.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Instant {
    /// Rule.
    pub rule: Rule,
    /// Factors an NLMS step moves.
    pub train: Train,
    /// RLS forgetting factor phi in (0, 1]; 1 never forgets.
    pub forgetting: f64,
    /// RLS ridge prior, in units of the mean `|u|^2`.
    pub rho: f64,
    /// NLMS step in (0, 2); `None`: 0.3, or `4 tau^2` for contrastive losses, 0.1 for rewards.
    pub mu: Option<f32>,
    /// How strongly a reward above the baseline pulls the score: target score `kappa (R - b)`.
    pub kappa: f32,
    /// Rate of the reward baseline's moving average.
    pub baseline_rate: f64,
    /// NLMS clips the output gradient to this norm (Huber); `None` does not.
    pub max_grad_norm: Option<f32>,
}

impl Default for Instant {
    fn default() -> Self {
        Instant {
            rule: Rule::Auto,
            train: Train::B,
            forgetting: 1.0,
            rho: 1.0,
            mu: None,
            kappa: 0.3,
            baseline_rate: 0.02,
            max_grad_norm: None,
        }
    }
}

impl Instant {
    /// Refuses settings outside their ranges.
    ///
    /// # Errors
    /// [`Error::Config`] that names the setting.
    pub fn validate(self) -> Result<Self> {
        let check = |ok: bool, name: &str, got: f64, want: &str| {
            if ok { Ok(()) } else { Err(Error::config(format!("instant.{name}"), got, want)) }
        };
        check(
            self.forgetting > 0.0 && self.forgetting <= 1.0,
            "forgetting",
            self.forgetting,
            "0 < phi <= 1",
        )?;
        check(self.rho.is_finite() && self.rho > 0.0, "rho", self.rho, "a finite number above 0")?;
        if let Some(mu) = self.mu {
            check(mu > 0.0 && mu < 2.0, "mu", mu.into(), "0 < mu < 2")?;
        }
        check(
            self.kappa.is_finite() && self.kappa > 0.0,
            "kappa",
            self.kappa.into(),
            "a finite number above 0",
        )?;
        let rate = self.baseline_rate;
        check(rate > 0.0 && rate <= 1.0, "baseline_rate", rate, "0 < rate <= 1")?;
        if let Some(c) = self.max_grad_norm {
            check(c > 0.0 && c.is_finite(), "max_grad_norm", c.into(), "a finite number above 0")?;
        }
        Ok(self)
    }
}
