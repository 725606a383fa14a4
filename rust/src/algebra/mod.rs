//! Arithmetic of weight changes `D = sum_r c_r b_r^T a_r` (out, in) that never makes the matrix itself.
//!
//! A [`Stack`] holds the rows of several layers; inner products, norms and the singular value decomposition
//! come from the Gram matrices of its rows, `O((in + out) k^2 + k^3)` for k rows.

mod angles;
mod gram;
mod refactor;
mod stack;

pub use angles::{Angles, principal_angles};
pub use gram::Grams;
pub use refactor::{Factors, Keep, refactor, refactor_with};
pub use stack::Stack;
