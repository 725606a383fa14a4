//! Settings of the consolidation; validated when made.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{KINDS, Kind, Statistic};
use crate::error::{Error, Result};

/// An enum whose names are public, with its error when another one comes.
macro_rules! named {
    ($(#[$doc:meta])* $name:ident, $arg:literal { $($(#[$vdoc:meta])* $variant:ident = $text:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum $name { $($(#[$vdoc])* $variant),+ }

        impl $name {
            /// The public name.
            pub const fn as_str(self) -> &'static str {
                match self { $($name::$variant => $text),+ }
            }
        }

        impl FromStr for $name {
            type Err = Error;
            fn from_str(s: &str) -> Result<Self> {
                match s {
                    $($text => Ok($name::$variant),)+
                    _ => Err(Error::config($arg, format!("{s:?}"), [$($text),+].join(", "))),
                }
            }
        }
    };
}

named! {
    /// Over which outcomes the squares of the gradient are averaged (van de Ven, arXiv 2502.11756).
    Fisher, "fisher" {
        /// Exact up to [`super::fisher::EXACT_CLASSES`] outcomes, else one draw.
        Auto = "auto",
        /// Every outcome, weighted by the model's probability.
        Exact = "exact",
        /// One outcome drawn from the model.
        Sample = "sample",
        /// The outcome that was observed.
        Empirical = "empirical",
    }
}
named! {
    /// Unit of a task's importance when it joins the sum.
    Normalize, "fisher_normalize" {
        /// As measured.
        None = "none",
        /// Divided by its largest value over all modules.
        Max = "max",
    }
}
named! {
    /// How the penalty acts on a step.
    Step, "step" {
        /// Its gradient joins the loss's.
        Gradient = "gradient",
        /// An implicit step after the optimiser's.
        Proximal = "proximal",
    }
}
named! {
    /// Which weights are remembered.
    Anchors, "anchors" {
        /// The latest optimum only (Schwarz 2018, arXiv 1805.06370).
        Online = "online",
        /// Every task's optimum (Kirkpatrick 2017).
        Separate = "separate",
    }
}

/// Everything a consolidation needs to know.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EwcSettings {
    /// Strength of the penalty: mean loss + lambda/2 sum F d^2 with F a mean over samples.
    pub lambda: f64,
    /// What is measured and where it acts.
    pub kind: Kind,
    /// How much of the earlier tasks' importance a new task keeps, in [0, 1].
    pub gamma: f64,
    /// Outcomes that the squares are averaged over.
    pub fisher: Fisher,
    /// Unit of a task's importance.
    pub normalize: Normalize,
    /// Moving average over batches instead of a mean per task (Chaudhry 2018, arXiv 1801.10112).
    pub decay: Option<f64>,
    /// How the penalty acts.
    pub step: Step,
    /// Which weights are remembered.
    pub anchors: Anchors,
    /// Most samples that are counted per module and task.
    pub samples: Option<u64>,
    /// Seed of drawn outcomes.
    pub seed: u64,
}

impl EwcSettings {
    /// The defaults of a kind.
    pub fn of(kind: Kind) -> Self {
        EwcSettings {
            lambda: kind.row().lambda,
            kind,
            gamma: 1.0,
            fisher: Fisher::Auto,
            normalize: Normalize::None,
            decay: None,
            step: Step::Gradient,
            anchors: Anchors::Online,
            samples: None,
            seed: 0,
        }
    }

    /// Refuses settings outside their ranges and combinations without a meaning.
    ///
    /// # Errors
    /// [`Error::Config`] that names the setting.
    pub fn validate(self) -> Result<Self> {
        let check = |ok: bool, name: &str, got: &dyn ToString, want: &str| match ok {
            true => Ok(()),
            false => Err(Error::config(name, got.to_string(), want)),
        };
        let row = self.kind.row();
        let measures =
            matches!(row.statistic, Statistic::Squares | Statistic::Moments | Statistic::Magnitudes);
        let lambda_fits = self.lambda.is_finite() && (0.0..=f64::from(f32::MAX)).contains(&self.lambda);
        check(lambda_fits, "ewc_lambda", &self.lambda, "a finite number, 0 or above")?;
        check((0.0..=1.0).contains(&self.gamma), "gamma", &self.gamma, "0 <= gamma <= 1")?;
        check(self.samples != Some(0), "fisher_samples", &0, "at least 1, or None")?;
        check(
            self.step != Step::Proximal || row.proximal,
            "step",
            &"\"proximal\"",
            "\"gradient\" for kind \"delta\": its penalty is not a sum over weights",
        )?;
        let unsummed = row.name == "l2" && self.anchors == Anchors::Online;
        check(
            self.gamma == 1.0 || !unsummed,
            "gamma",
            &self.gamma,
            "1.0 for kind \"l2\" with one anchor: its importance is 1 and is not summed",
        )?;
        check(
            self.normalize == Normalize::None || row.name != "l2",
            "fisher_normalize",
            &"\"max\"",
            "\"none\" for kind \"l2\": its importance is 1",
        )?;
        let Some(decay) = self.decay else { return Ok(self) };
        check(decay > 0.0 && decay < 1.0, "fisher_decay", &decay, "0 < decay < 1, or None")?;
        let want = format!("None for kind {:?}, which measures no samples", row.name);
        check(measures, "fisher_decay", &decay, &want)?;
        check(
            self.gamma == 1.0,
            "gamma",
            &self.gamma,
            "1.0 with fisher_decay: a moving average forgets by itself",
        )?;
        check(
            self.anchors == Anchors::Online,
            "anchors",
            &"\"separate\"",
            "\"online\" with fisher_decay: a moving average is of no one task",
        )?;
        Ok(self)
    }
}

impl FromStr for Kind {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        let found = KINDS.iter().position(|row| row.name == s);
        let names = || KINDS.map(|row| row.name).join(", ");
        found.map(Kind).ok_or_else(|| Error::config("kind", format!("{s:?}"), names()))
    }
}
