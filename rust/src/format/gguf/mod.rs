//! GGUF adapters, version 3, as llama.cpp loads them.
//!
//! Tensors are `<base tensor>.lora_a` (rank, in) and `.lora_b` (out, rank), of `token_embd.weight` (vocab, rank)
//! and (dim, rank), of experts with a dimension in front; one `adapter.lora.alpha` (f32) scales all by
//! alpha / rank. Names are those of GGUF, and rows of q and k lie in llama.cpp's order where the architecture
//! has one ([`order`]): [`translate`] gives both back, with what only the base's configuration knows.

mod adapter;
mod container;
mod encode;
pub mod order;
mod save;
mod stack;

use std::path::Path;

use super::source::{Content, Source};
use super::tensor::Bytes;
use super::{LoadOptions, Loaded};
use crate::error::Result;

pub use adapter::{Place, ROW_ORDER, keep_names, translate};
pub use encode::Encoding;
pub use save::{GgufOptions, Target, common_alpha, lost_blocks, save};
pub use stack::stack;

pub(super) fn knows(source: &Source) -> bool {
    source.head().starts_with(container::MAGIC)
}

pub(super) fn read(source: Source, opts: &LoadOptions) -> Result<Loaded> {
    match &source.content {
        Content::Other(bytes) => adapter::from_bytes(bytes, &source.file, opts),
        _ => Err(source.unknown()),
    }
}

/// Reads an adapter from the bytes of a file.
///
/// # Errors
/// As [`super::read`].
pub fn from_memory(bytes: &[u8], opts: &LoadOptions) -> Result<Loaded> {
    adapter::from_bytes(&Bytes::from(bytes.to_vec()), "bytes", opts)
}

/// Writes to `path` and says what is worth knowing, without progress.
///
/// # Errors
/// As [`save`].
pub fn save_gguf(path: &Path, parts: &super::AdapterParts, opts: &GgufOptions) -> Result<Vec<String>> {
    save(path, parts, opts, &mut |_, _| Ok(()))
}
