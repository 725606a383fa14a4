//! Feedback as numbers: its kind and scalars, and the vectors that may be stored narrow.

use crate::learn::{Feedback, TargetLoss};

/// What a piece of feedback is, without its vectors.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Kind {
    Target(TargetLoss),
    Gradient,
    Reward(f32),
    Preference { p: f32, beta: f32 },
    Contrastive { width: u32, tau: f32 },
}

impl Kind {
    /// The kind, and the vectors in the order in which they are stored.
    pub fn of(f: &Feedback) -> (Kind, [&[f32]; 2]) {
        match f {
            Feedback::Target { target, loss } => (Kind::Target(*loss), [target, &[]]),
            Feedback::Gradient { gradient } => (Kind::Gradient, [gradient, &[]]),
            Feedback::Reward { reward, response } => (Kind::Reward(*reward), [response, &[]]),
            Feedback::Preference { chosen, rejected, p, beta } => {
                (Kind::Preference { p: *p, beta: *beta }, [chosen, rejected])
            }
            Feedback::Contrastive { rows, width, tau } => {
                (Kind::Contrastive { width: *width as u32, tau: *tau }, [rows, &[]])
            }
        }
    }

    /// Number in files, row width where it is a setting of the kind, and the two scalars.
    pub fn code(self) -> (u32, u32, [f32; 2]) {
        match self {
            Kind::Target(TargetLoss::Mse) => (0, 0, [0.0; 2]),
            Kind::Target(TargetLoss::Cosine) => (1, 0, [0.0; 2]),
            Kind::Gradient => (2, 0, [0.0; 2]),
            Kind::Reward(r) => (3, 0, [r, 0.0]),
            Kind::Preference { p, beta } => (4, 0, [p, beta]),
            Kind::Contrastive { width, tau } => (5, width, [tau, 0.0]),
        }
    }

    /// What [`Kind::code`] gave, if it can be.
    pub fn from_code(code: u32, width: u32, [a, b]: [f32; 2]) -> Option<Kind> {
        let kind = match code {
            0 => Kind::Target(TargetLoss::Mse),
            1 => Kind::Target(TargetLoss::Cosine),
            2 => Kind::Gradient,
            3 => Kind::Reward(a),
            4 => Kind::Preference { p: a, beta: b },
            5 => Kind::Contrastive { width, tau: a },
            _ => return None,
        };
        let above_zero = |v: f32| v.is_finite() && v > 0.0;
        let sound = match kind {
            Kind::Target(_) | Kind::Gradient => true,
            Kind::Reward(r) => r.is_finite(),
            Kind::Preference { p, beta } => (0.0..=1.0).contains(&p) && above_zero(beta),
            Kind::Contrastive { width, tau } => width > 0 && above_zero(tau),
        };
        sound.then_some(kind)
    }

    /// Width of the output that `numbers` stored numbers speak of; `None`: no such feedback.
    pub fn width(self, numbers: usize) -> Option<usize> {
        let width = match self {
            Kind::Target(_) | Kind::Gradient | Kind::Reward(_) => numbers,
            Kind::Preference { .. } => numbers / 2,
            Kind::Contrastive { width, .. } => width as usize,
        };
        let rows = match self {
            Kind::Preference { .. } => numbers == 2 * width,
            Kind::Contrastive { .. } => numbers.is_multiple_of(width) && numbers >= 2 * width,
            _ => true,
        };
        (width > 0 && rows).then_some(width)
    }

    /// The feedback again, of the numbers as they are.
    pub fn build(self, mut numbers: Vec<f32>) -> Feedback {
        match self {
            Kind::Target(loss) => Feedback::Target { target: numbers, loss },
            Kind::Gradient => Feedback::Gradient { gradient: numbers },
            Kind::Reward(reward) => Feedback::Reward { reward, response: numbers },
            Kind::Preference { p, beta } => {
                let rejected = numbers.split_off(numbers.len() / 2);
                numbers.shrink_to_fit();
                Feedback::Preference { chosen: numbers, rejected, p, beta }
            }
            Kind::Contrastive { width, tau } => {
                Feedback::Contrastive { rows: numbers, width: width as usize, tau }
            }
        }
    }

    /// Unit length again for directions: rounding moves it by some 1e-5, and losses take rows as unit.
    pub fn normalise(self, numbers: &mut [f32]) {
        let width = match self {
            Kind::Target(TargetLoss::Mse) | Kind::Gradient => return,
            _ => self.width(numbers.len()).unwrap_or(numbers.len()),
        };
        for row in numbers.chunks_exact_mut(width.max(1)) {
            let norm2: f64 = row.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
            if norm2 > 0.0 {
                let inv = 1.0 / norm2.sqrt();
                row.iter_mut().for_each(|v| *v = (f64::from(*v) * inv) as f32);
            }
        }
    }
}
