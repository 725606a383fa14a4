//! What stands between two layers of a chain.

use std::str::FromStr;

use crate::error::{Error, Result};

/// An element-wise function between layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `max(z, 0)`.
    Relu,
    /// `z Phi(z)` with the exact Gaussian (arXiv 1606.08415), as torch's default.
    Gelu,
    /// `tanh(z)`.
    Tanh,
}

impl FromStr for Activation {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        match s {
            "relu" => Ok(Activation::Relu),
            "gelu" => Ok(Activation::Gelu),
            "tanh" => Ok(Activation::Tanh),
            _ => Err(Error::config("activation", format!("{s:?}"), "relu, gelu or tanh")),
        }
    }
}

/// `erf` to 1.2e-7 (Numerical Recipes in C, 2nd edition, 6.2: a Chebyshev fit of erfc).
fn erf(x: f32) -> f32 {
    const C: [f64; 10] = [
        -1.265_512_23,
        1.000_023_68,
        0.374_091_96,
        0.096_784_18,
        -0.186_288_06,
        0.278_868_07,
        -1.135_203_98,
        1.488_515_87,
        -0.822_152_23,
        0.170_872_77,
    ];
    let z = f64::from(x.abs());
    let t = 1.0 / (1.0 + 0.5 * z);
    let poly = C.iter().rev().fold(0.0, |p, c| p * t + c);
    let erfc = t * (poly - z * z).exp();
    (if x < 0.0 { erfc - 1.0 } else { 1.0 - erfc }) as f32
}

fn gaussian_cdf(z: f32) -> f32 {
    0.5 * (1.0 + erf(z * std::f32::consts::FRAC_1_SQRT_2))
}

impl Activation {
    /// Whether backward needs the numbers before the function (otherwise those after it are enough).
    pub(super) fn needs_input(self) -> bool {
        self == Activation::Gelu
    }

    /// `z = f(z)`.
    pub(super) fn apply(self, z: &mut [f32]) {
        match self {
            Activation::Relu => z.iter_mut().for_each(|z| *z = z.max(0.0)),
            Activation::Gelu => z.iter_mut().for_each(|z| *z *= gaussian_cdf(*z)),
            Activation::Tanh => z.iter_mut().for_each(|z| *z = z.tanh()),
        }
    }

    /// `g *= f'`, from the numbers after the function, or before it where [`Activation::needs_input`].
    pub(super) fn backward(self, seen: &[f32], g: &mut [f32]) {
        match self {
            Activation::Relu => {
                for (g, h) in g.iter_mut().zip(seen) {
                    *g = if *h > 0.0 { *g } else { 0.0 };
                }
            }
            Activation::Gelu => {
                let norm = 1.0 / (2.0 * std::f32::consts::PI).sqrt();
                for (g, &z) in g.iter_mut().zip(seen) {
                    *g *= gaussian_cdf(z) + z * norm * (-0.5 * z * z).exp();
                }
            }
            Activation::Tanh => {
                for (g, h) in g.iter_mut().zip(seen) {
                    *g *= 1.0 - h * h;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn erf_is_right_at_known_points() {
        for (x, want) in [(0.0, 0.0), (0.5, 0.520_499_9), (1.0, 0.842_700_8), (-2.0, -0.995_322_3)] {
            assert!((erf(x) - want).abs() < 3e-7, "{x}");
        }
    }

    #[test]
    fn derivatives_match_differences() {
        for f in [Activation::Relu, Activation::Gelu, Activation::Tanh] {
            for z in [-2.1f32, -0.6, 0.3, 1.7] {
                let at = |z: f32| {
                    let mut v = [z];
                    f.apply(&mut v);
                    v[0]
                };
                let mut g = [1.0];
                f.backward(&[if f.needs_input() { z } else { at(z) }], &mut g);
                let h = 1e-2;
                assert!((g[0] - (at(z + h) - at(z - h)) / (2.0 * h)).abs() < 1e-3, "{f:?} {z}");
            }
        }
    }
}
