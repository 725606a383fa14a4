//! LoRA adapters that learn per request: the core, free of Python.
//!
//! Row vectors: `y = x W0 + dY`, `dY = s (x A) B`. Both factors are held rank-major: `rank` rows of
//! `in_features` (A) or `out_features` (B), so that forward and backward are dots and axpys on rows.
#![deny(unsafe_code)]

pub mod dtype;
pub mod error;
pub mod factor;
pub mod kernels;
pub mod layer;
pub mod parallel;
pub mod probe;

pub use dtype::Dtype;
pub use error::{Error, Result};
