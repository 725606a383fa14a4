//! Arithmetic of weight changes `D = sum_r c_r b_r^T a_r` (out, in) that never makes the matrix itself.
//!
//! A [`Stack`] holds the rows of several layers; inner products, norms and the singular value decomposition
//! come from the Gram matrices of its rows, `O((in + out) k^2 + k^3)` for k rows. A matrix that has no such rows is
//! read in [`Tiles`] and decomposed by a sketch.

mod angles;
mod gram;
mod refactor;
mod sketch;
mod stack;
mod tiles;

pub use angles::{Angles, principal_angles};
pub use gram::Grams;
pub use refactor::{Factors, Keep, refactor, refactor_with};
pub use sketch::{SketchOptions, decompose, decompose_from};
pub use stack::Stack;
pub use tiles::{Dense, Tiles, block_rows, blocks};
