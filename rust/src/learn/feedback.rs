//! Feedback, its loss and the gradient dL/dy that every update rule starts from.
//!
//! `y = base + dY` is the layer's whole output, `dY` the adapter's part. Directions (responses, preferred and
//! contrasted embeddings) are normalised when the feedback is made, so scores are cosines.

use crate::error::{Error, Result};
use crate::kernels::Kernels;

/// Squares beyond this would overflow f32; no useful embedding is that large.
const MAX_NORM2: f64 = 1e36;

/// How a target is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetLoss {
    /// `1/2 |y - t|^2`, summed over features.
    Mse,
    /// `1 - cos(y, t)`.
    Cosine,
}

impl TargetLoss {
    /// The public name.
    pub const fn as_str(self) -> &'static str {
        match self {
            TargetLoss::Mse => "mse",
            TargetLoss::Cosine => "cosine",
        }
    }
}

impl std::str::FromStr for TargetLoss {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        match s {
            "mse" => Ok(TargetLoss::Mse),
            "cosine" => Ok(TargetLoss::Cosine),
            _ => Err(Error::config("loss", format!("{s:?}"), "mse or cosine")),
        }
    }
}

/// One piece of feedback on one output.
#[derive(Clone, Debug, PartialEq)]
pub enum Feedback {
    /// The output that was wanted.
    Target {
        /// Wanted output (unit length for the cosine loss).
        target: Vec<f32>,
        /// How it is compared.
        loss: TargetLoss,
    },
    /// An exact upstream gradient dL/dy.
    Gradient {
        /// dL/dy.
        gradient: Vec<f32>,
    },
    /// A scalar with the direction it was earned by: advantage regression on the adapter's own score.
    Reward {
        /// Reward R.
        reward: f32,
        /// Unit direction of the response.
        response: Vec<f32>,
    },
    /// `chosen` was preferred to `rejected` with probability `p` (Bradley-Terry on cosines).
    Preference {
        /// Unit direction.
        chosen: Vec<f32>,
        /// Unit direction.
        rejected: Vec<f32>,
        /// Probability that chosen is better.
        p: f32,
        /// Inverse temperature.
        beta: f32,
    },
    /// InfoNCE: the positive among negatives.
    Contrastive {
        /// Unit rows: the positive first, then the negatives.
        rows: Vec<f32>,
        /// Width of a row.
        width: usize,
        /// Temperature.
        tau: f32,
    },
}

fn finite(arg: &str, v: &[f32]) -> Result<f64> {
    if v.is_empty() {
        return Err(Error::shape(arg, "(0,)", "at least one element"));
    }
    let norm2: f64 = v.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
    if !norm2.is_finite() {
        return Err(Error::non_finite(arg));
    }
    if norm2 > MAX_NORM2 {
        return Err(Error::NonFinite { arg: arg.into(), detail: " once squared in float32".into() });
    }
    Ok(norm2)
}

fn unit(arg: &str, mut v: Vec<f32>) -> Result<Vec<f32>> {
    let norm2 = finite(arg, &v)?;
    if norm2 == 0.0 {
        return Err(Error::Feedback(format!("{arg} is all zeros, so it has no direction")));
    }
    // Unit vectors stay as they are, so that feedback made again from its own parts is the same bit for bit.
    if (norm2 - 1.0).abs() < 1e-6 {
        return Ok(v);
    }
    let inv = 1.0 / norm2.sqrt();
    for v in &mut v {
        *v = (f64::from(*v) * inv) as f32;
    }
    Ok(v)
}

fn positive(arg: &str, v: f32) -> Result<f32> {
    if v.is_finite() && v > 0.0 {
        Ok(v)
    } else {
        Err(Error::Feedback(format!("{arg}: got {v}, expected a finite number above 0")))
    }
}

impl Feedback {
    /// A wanted output.
    ///
    /// # Errors
    /// Empty or non-finite target; all zeros with the cosine loss.
    pub fn target(target: Vec<f32>, loss: TargetLoss) -> Result<Self> {
        let target = match loss {
            TargetLoss::Mse => {
                finite("target", &target)?;
                target
            }
            TargetLoss::Cosine => unit("target", target)?,
        };
        Ok(Feedback::Target { target, loss })
    }

    /// An upstream gradient.
    ///
    /// # Errors
    /// Empty or non-finite gradient.
    pub fn gradient(gradient: Vec<f32>) -> Result<Self> {
        finite("gradient", &gradient)?;
        Ok(Feedback::Gradient { gradient })
    }

    /// A scalar with a direction.
    ///
    /// # Errors
    /// NaN reward; empty, zero or non-finite response.
    pub fn reward(reward: f32, response: Vec<f32>) -> Result<Self> {
        if !reward.is_finite() {
            return Err(Error::Feedback(format!("reward: got {reward}, expected a finite number")));
        }
        Ok(Feedback::Reward { reward, response: unit("response", response)? })
    }

    /// A preference.
    ///
    /// # Errors
    /// Unequal widths, zero vectors, p outside [0, 1], beta not above 0.
    pub fn preference(chosen: Vec<f32>, rejected: Vec<f32>, p: f32, beta: f32) -> Result<Self> {
        if chosen.len() != rejected.len() {
            return Err(Error::shape(
                "rejected",
                format!("({},)", rejected.len()),
                format!("({},) as chosen", chosen.len()),
            ));
        }
        if !(0.0..=1.0).contains(&p) {
            return Err(Error::Feedback(format!("p: got {p}, expected a probability in [0, 1]")));
        }
        let beta = positive("beta", beta)?;
        Ok(Feedback::Preference {
            chosen: unit("chosen", chosen)?,
            rejected: unit("rejected", rejected)?,
            p,
            beta,
        })
    }

    /// A positive and `negatives.len() / positive.len()` negatives.
    ///
    /// # Errors
    /// No negative, unequal widths, zero vectors, tau not above 0.
    pub fn contrastive(positive_row: Vec<f32>, negatives: Vec<f32>, tau: f32) -> Result<Self> {
        let width = positive_row.len();
        if width == 0 || negatives.is_empty() || !negatives.len().is_multiple_of(width) {
            let got = format!("{} numbers", negatives.len());
            return Err(Error::shape("negatives", got, format!("(k, {width}) with k at least 1")));
        }
        let tau = positive("tau", tau)?;
        let mut rows = unit("positive", positive_row)?;
        for (i, n) in negatives.chunks_exact(width).enumerate() {
            rows.extend(unit(&format!("negatives[{i}]"), n.to_vec())?);
        }
        Ok(Feedback::Contrastive { rows, width, tau })
    }

    /// What it is called.
    pub fn name(&self) -> &'static str {
        match self {
            Feedback::Target { .. } => "target",
            Feedback::Gradient { .. } => "gradient",
            Feedback::Reward { .. } => "reward",
            Feedback::Preference { .. } => "preference",
            Feedback::Contrastive { .. } => "contrastive",
        }
    }

    /// Bytes of its arrays.
    pub fn memory_bytes(&self) -> usize {
        let numbers = match self {
            Feedback::Target { target, .. } => target.len(),
            Feedback::Gradient { gradient } => gradient.len(),
            Feedback::Reward { response, .. } => response.len(),
            Feedback::Preference { chosen, .. } => 2 * chosen.len(),
            Feedback::Contrastive { rows, .. } => rows.len(),
        };
        4 * numbers + std::mem::size_of::<Self>()
    }

    /// Width of the output this feedback is about.
    pub fn width(&self) -> usize {
        match self {
            Feedback::Target { target, .. } => target.len(),
            Feedback::Gradient { gradient } => gradient.len(),
            Feedback::Reward { response, .. } => response.len(),
            Feedback::Preference { chosen, .. } => chosen.len(),
            Feedback::Contrastive { width, .. } => *width,
        }
    }

    /// What this feedback's arrays are called in errors.
    pub fn argument(&self) -> &'static str {
        match self {
            Feedback::Target { .. } => "target",
            Feedback::Gradient { .. } => "gradient",
            Feedback::Reward { .. } => "response",
            Feedback::Preference { .. } => "chosen",
            Feedback::Contrastive { .. } => "positive",
        }
    }

    /// Step of NLMS where the user set none: the inverse of the loss's curvature in y, in safe units.
    pub(crate) fn default_mu(&self) -> f32 {
        match self {
            Feedback::Target { .. } | Feedback::Gradient { .. } => 0.3,
            Feedback::Reward { .. } => 0.1,
            Feedback::Preference { beta, .. } => (4.0 / (beta * beta)).min(0.3),
            Feedback::Contrastive { tau, .. } => (4.0 * tau * tau).min(0.3),
        }
    }

    /// Whether the loss sees only the direction of y, so that its curvature scales with `1 / |y|^2`.
    pub(crate) fn is_angular(&self) -> bool {
        !matches!(
            self,
            Feedback::Target { loss: TargetLoss::Mse, .. }
                | Feedback::Gradient { .. }
                | Feedback::Reward { .. }
        )
    }

    /// Loss at the output, and dL/dy into `g` when given. `None`: y is zero and has no direction.
    ///
    /// `advantage` is `kappa (R - b)` for rewards, unused otherwise. A bare gradient has loss NaN.
    pub(crate) fn evaluate(
        &self,
        k: &Kernels,
        at: Output<'_>,
        advantage: f32,
        g: Option<&mut [f32]>,
    ) -> Option<f32> {
        match self {
            Feedback::Target { target, loss: TargetLoss::Mse } => {
                let mut sum = 0.0;
                match g {
                    Some(g) => {
                        g.copy_from_slice(at.y);
                        k.axpy(-1.0, target, g);
                        sum += k.dot(g, g);
                    }
                    None => {
                        let mut lanes = [0.0f32; 8];
                        for (i, (y, t)) in at.y.iter().zip(target).enumerate() {
                            lanes[i % 8] += (y - t) * (y - t);
                        }
                        sum += lanes.iter().sum::<f32>();
                    }
                }
                Some(0.5 * sum)
            }
            Feedback::Gradient { gradient } => {
                if let Some(g) = g {
                    g.copy_from_slice(gradient);
                }
                Some(f32::NAN)
            }
            Feedback::Reward { response, .. } => {
                let error = k.dot(response, at.delta) - advantage;
                if let Some(g) = g {
                    g.fill(0.0);
                    k.axpy(error, response, g);
                }
                Some(0.5 * error * error)
            }
            Feedback::Target { target, loss: TargetLoss::Cosine } => cosines(k, at.y, target, g, |c, dc| {
                dc[0] = -1.0;
                1.0 - c[0]
            }),
            Feedback::Preference { chosen, rejected, p, beta } => {
                // L = -p log s(m) - (1-p) log s(-m), m = beta (c+ - c-); dL/dm = s(m) - p.
                let norm = k.dot(at.y, at.y).sqrt();
                if norm == 0.0 {
                    return None;
                }
                let c = [k.dot(at.y, chosen) / norm, k.dot(at.y, rejected) / norm];
                let m = beta * (c[0] - c[1]);
                if let Some(g) = g {
                    let d = beta * (sigmoid(m) - p);
                    angular_gradient(k, at.y, norm, &[(chosen, d, c[0]), (rejected, -d, c[1])], g);
                }
                Some(p * softplus(-m) + (1.0 - p) * softplus(m))
            }
            Feedback::Contrastive { rows, tau, .. } => cosines(k, at.y, rows, g, |c, dc| {
                let top = c.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
                let total: f32 = c.iter().map(|c| ((c - top) / tau).exp()).sum();
                for (j, dc) in dc.iter_mut().enumerate() {
                    let p = ((c[j] - top) / tau).exp() / total;
                    *dc = (p - f32::from(u8::from(j == 0))) / tau;
                }
                total.ln() - (c[0] - top) / tau
            }),
        }
    }
}

/// The output a loss is taken at.
#[derive(Clone, Copy)]
pub(crate) struct Output<'a> {
    /// base + dY.
    pub y: &'a [f32],
    /// dY alone.
    pub delta: &'a [f32],
}

pub(crate) fn sigmoid(m: f32) -> f32 {
    1.0 / (1.0 + (-m).exp())
}

fn softplus(m: f32) -> f32 {
    m.max(0.0) + (-m.abs()).exp().ln_1p()
}

/// `dL/dy` from `dL/dc_j` of cosines with unit rows: `(sum dc_j d_j - (sum dc_j c_j) y/|y|) / |y|`.
pub(crate) fn angular_gradient(
    k: &Kernels,
    y: &[f32],
    norm: f32,
    terms: &[(&[f32], f32, f32)],
    g: &mut [f32],
) {
    let inv = 1.0 / norm;
    let along: f32 = terms.iter().map(|(_, dc, c)| dc * c).sum();
    g.copy_from_slice(y);
    k.scale(-along * inv * inv, g);
    for (d, dc, _) in terms {
        k.axpy(dc * inv, d, g);
    }
}

/// `|y|` and the cosines between y and unit rows; `None` where y is zero.
pub(crate) fn cosines_of(k: &Kernels, y: &[f32], rows: &[f32]) -> Option<(f32, Vec<f32>)> {
    let norm = k.dot(y, y).sqrt();
    (norm != 0.0).then(|| (norm, rows.chunks_exact(y.len()).map(|d| k.dot(y, d) / norm).collect()))
}

/// Evaluates a loss of the cosines between y and unit rows; `loss(c, dc)` fills dL/dc and returns L.
fn cosines(
    k: &Kernels,
    y: &[f32],
    rows: &[f32],
    g: Option<&mut [f32]>,
    loss: impl FnOnce(&[f32], &mut [f32]) -> f32,
) -> Option<f32> {
    let (norm, c) = cosines_of(k, y, rows)?;
    let mut dc = vec![0.0; c.len()];
    let value = loss(&c, &mut dc);
    if let Some(g) = g {
        let terms: Vec<_> =
            rows.chunks_exact(y.len()).zip(dc.iter().zip(&c)).map(|(d, (dc, c))| (d, *dc, *c)).collect();
        angular_gradient(k, y, norm, &terms, g);
    }
    Some(value)
}
