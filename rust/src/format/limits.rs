//! How much a file may ask for before it is refused.

use super::container::{MAX_HEADER, MAX_TENSORS};
use crate::error::{Error, Result};

/// Bounds on what is read; every reader checks them before it takes memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of a header: of safetensors its JSON, of GGUF everything before the data.
    pub header_bytes: usize,
    /// Tensors in one file.
    pub tensors: usize,
    /// Bytes of one file that is copied to memory (a larger one can be mapped).
    pub total_bytes: u64,
    /// Rank of one module.
    pub rank: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { header_bytes: MAX_HEADER, tensors: MAX_TENSORS, total_bytes: 64 << 30, rank: 1 << 20 }
    }
}

impl Limits {
    pub(crate) fn check_header(&self, bytes: u64, file: &str) -> Result<()> {
        within("header", bytes, self.header_bytes as u64, "header_bytes", file)
    }

    pub(crate) fn check_tensors(&self, count: u64, file: &str) -> Result<()> {
        within("tensor count", count, self.tensors as u64, "tensors", file)
    }

    pub(crate) fn check_rank(&self, rank: usize, module: &str, file: &str) -> Result<()> {
        within(&format!("rank of {module}"), rank as u64, self.rank as u64, "rank", file)
    }
}

fn within(what: &str, got: u64, most: u64, setting: &str, file: &str) -> Result<()> {
    if got <= most {
        return Ok(());
    }
    Err(Error::format(file, format!("{what} of {got}, the limit is {most} (limits: {setting})")))
}
