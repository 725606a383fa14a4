//! LoRA adapters that learn per request: the core, free of Python.
//!
//! Row vectors: `y = x W0 + dY`, `dY = s (x A) B`. Both factors are held rank-major: `rank` rows of
//! `in_features` (A) or `out_features` (B), so that forward and backward are dots and axpys on rows.
#![deny(unsafe_code)]

pub mod adapter;
pub mod algebra;
pub mod chain;
pub mod dtype;
pub mod error;
pub mod ewc;
pub mod factor;
pub mod format;
pub mod fuse;
pub mod journal;
pub mod kernels;
pub mod layer;
pub mod learn;
pub mod low_rank;
pub mod mapping;
pub mod merge;
pub mod micro_lora;
pub mod parallel;
pub mod probe;
pub mod quant;
pub mod replay;
pub mod rng;
pub mod snapshot;
pub mod sona;
pub mod swap;

#[cfg(feature = "python")]
mod python;

pub use adapter::Adapter;
pub use dtype::Dtype;
pub use error::{Error, Result};
pub use micro_lora::MicroLora;
pub use snapshot::Snapshot;
pub use swap::HotSwap;
