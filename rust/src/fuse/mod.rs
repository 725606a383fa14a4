//! Adapters added to the weights of a base model on disk, and taken off again bit for bit.
//!
//! Files are streamed in blocks; what a block becomes is decided by [`Kernels::fuse`] in one order of
//! operations, so the same files give the same files on every machine. The side-car of [`fuse`] holds the
//! adapter, SHA-256 of every touched tensor before and after, and what rounding lost; [`unfuse`] checks all
//! hashes before a file gets its name.
//!
//! [`Kernels::fuse`]: crate::kernels::Kernels::fuse

mod block;
mod output;
mod plan;
mod residual;
mod run;
mod sidecar;

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;

pub use run::{fuse, unfuse};

/// Called with bytes done and bytes in all; an error stops the work before any file has its name.
pub type Tick<'a> = dyn FnMut(usize, usize) -> crate::Result<()> + 'a;

/// How to fuse.
#[derive(Clone, Copy, Debug, Default)]
pub struct FuseOptions<'a> {
    /// Where the side-car goes; `None`: there is none, and nothing is hashed.
    pub sidecar: Option<&'a Path>,
    /// Paths in the model of each short module name.
    pub layer_paths: Option<&'a BTreeMap<String, Vec<String>>>,
    /// Whether square weights are stored (in, out); `None`: as the adapter's PEFT configuration says.
    pub fan_in_fan_out: Option<bool>,
}

/// One weight that was changed.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FusedTensor {
    /// The tensor's name.
    pub tensor: String,
    /// The adapter's module.
    pub module: String,
    /// `F32`, `F16` or `BF16`.
    pub dtype: String,
    /// As in the file.
    pub shape: Vec<usize>,
    /// `out_in` (a torch Linear) or `in_out` (Conv1D, embeddings).
    pub layout: String,
    /// What decided the layout: `shape`, `argument`, `peft_config` or `default`.
    pub layout_from: String,
    /// Bytes of the residual in the side-car.
    pub residual_bytes: usize,
    /// Weights that rounding lost and the residual brings back.
    pub lossy: usize,
}

/// What was done.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct FuseReport {
    /// In the order of the files.
    pub tensors: Vec<FusedTensor>,
    /// Bytes of all weight files.
    pub model_bytes: usize,
    /// Bytes of the tensors that were changed.
    pub touched_bytes: usize,
    /// Bytes of the side-car, 0 without one.
    pub sidecar_bytes: usize,
    /// Bytes of the adapter in the side-car.
    pub adapter_bytes: usize,
    /// SHA-256 of the adapter's bytes, empty without a side-car.
    pub adapter_sha256: String,
    /// Largest memory that the streaming asked for: blocks, one module's factors, headers.
    pub peak_bytes: usize,
    /// Wall-clock time.
    pub seconds: f64,
    /// What is worth knowing and no error.
    pub notes: Vec<String>,
}
