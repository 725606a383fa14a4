//! Settings of the three loops, as the Python layer hands them over.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Everything the loops need to know; every key is always given.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Least time between the starts of two consolidations, milliseconds.
    pub background_interval_ms: f64,
    /// Least events of a window.
    pub background_min_samples: usize,
    /// Accumulated quality that asks for a deep run.
    pub deep_trigger_threshold: f64,
    /// Name of the strategy.
    pub consolidation: String,
    /// Most events of a window; older ones leave it unconsolidated.
    pub max_pending_samples: usize,
    /// Targets of lower quality are passed over.
    pub quality_threshold: f64,
    /// Time that one call of `maybe_background` may take; `None`: all it needs.
    pub max_ms: Option<f64>,
    /// Most samples of the reservoir.
    pub reservoir_capacity: usize,
    /// Most bytes of it.
    pub reservoir_max_bytes: Option<usize>,
    /// `f32` or `f16`.
    pub reservoir_dtype: String,
    /// Whether rare patterns keep their place.
    pub reservoir_balance: bool,
    /// Share of the events that no loop trains on.
    pub holdout: f64,
    /// How much the held-out loss may rise, as a share.
    pub gate_tolerance: f64,
    /// Least held-out samples to judge by.
    pub gate_min_samples: usize,
    /// Strength of the penalty where there is no reservoir, canonical units.
    pub ewc_lambda: f64,
    /// Weight of stored outputs beside stored targets.
    pub logit_weight: f64,
    /// Weight of the reservoir's mean loss beside the window's.
    pub replay_ratio: f64,
    /// Newton steps of a consolidation.
    pub consolidation_steps: usize,
    /// Share of a window that `best_only` trains on.
    pub best_share: f64,
    /// Most members of an ensemble.
    pub ensemble_size: usize,
    /// Temperature of its weights.
    pub ensemble_temperature: f64,
    /// All weight to the nearest member.
    pub ensemble_hard: bool,
    /// Most patterns of the bank.
    pub patterns: usize,
    /// Cosine under which an input starts a new pattern.
    pub pattern_threshold: f64,
    /// Inputs that A is chosen from, once; 0 leaves it as it was drawn.
    pub warmup_inputs: usize,
    /// Seed of every draw.
    pub seed: u64,
}

impl Settings {
    /// Parses and checks the JSON object.
    ///
    /// # Errors
    /// An unknown, missing or misplaced key, a value out of its range.
    pub fn from_json(json: &str) -> Result<Self> {
        let settings: Settings =
            serde_json::from_str(json).map_err(|e| Error::config("settings", e, "the settings of a loop"))?;
        settings.validate()
    }

    /// Refuses values out of their ranges.
    ///
    /// # Errors
    /// [`Error::Config`] that names the setting.
    pub fn validate(self) -> Result<Self> {
        let check = |ok: bool, name: &str, got: f64, want: &str| {
            if ok { Ok(()) } else { Err(Error::config(name, got, want)) }
        };
        let positive = |v: f64| v.is_finite() && v > 0.0;
        let counted = |v: f64| v.is_finite() && v >= 0.0;
        let share = |v: f64| (0.0..=1.0).contains(&v);
        let interval = self.background_interval_ms;
        check(counted(interval), "background_interval_ms", interval, "milliseconds, 0 or above")?;
        let least = self.background_min_samples;
        check(least >= 1, "background_min_samples", least as f64, "at least 1")?;
        let deep = self.deep_trigger_threshold;
        check(positive(deep), "deep_trigger_threshold", deep, "a number above 0")?;
        let most = self.max_pending_samples;
        check(most >= least, "max_pending_samples", most as f64, "at least background_min_samples")?;
        let threshold = self.quality_threshold;
        check((0.0..1.0).contains(&threshold), "quality_threshold", threshold, "0 <= threshold < 1")?;
        if let Some(ms) = self.max_ms {
            check(positive(ms), "max_ms", ms, "milliseconds above 0, or None")?;
        }
        check((0.0..=0.5).contains(&self.holdout), "holdout", self.holdout, "0 <= holdout <= 0.5")?;
        check(counted(self.gate_tolerance), "gate_tolerance", self.gate_tolerance, "0 or above")?;
        check(self.gate_min_samples >= 1, "gate_min_samples", self.gate_min_samples as f64, "at least 1")?;
        for (name, v) in [
            ("ewc_lambda", self.ewc_lambda),
            ("logit_weight", self.logit_weight),
            ("replay_ratio", self.replay_ratio),
        ] {
            check(counted(v), name, v, "a finite number, 0 or above")?;
        }
        check(
            share(self.best_share) && self.best_share > 0.0,
            "best_share",
            self.best_share,
            "0 < share <= 1",
        )?;
        check(self.ensemble_size >= 1, "ensemble_size", self.ensemble_size as f64, "at least 1")?;
        let t = self.ensemble_temperature;
        check(positive(t), "ensemble_temperature", t, "a number above 0")?;
        check(self.patterns >= 1, "patterns", self.patterns as f64, "at least 1")?;
        let cosine = self.pattern_threshold;
        check((-1.0..=1.0).contains(&cosine), "pattern_threshold", cosine, "a cosine, -1 to 1")?;
        Ok(self)
    }

    /// Whether the members of an ensemble are kept apart.
    pub fn is_ensemble(&self) -> bool {
        self.consolidation == "ensemble"
    }
}
