//! A bandit alone as safetensors bytes.

use std::collections::BTreeMap;

use super::LiveBandit;
use crate::error::{Error, Result};
use crate::format::{Bytes, container};
use crate::micro_lora::MicroLora;

/// The header's `format`.
const FORMAT: &str = "microlora-bandit";
const FILE: &str = "bandit bytes";

/// Everything as bytes.
///
/// # Errors
/// Those of the container.
pub fn to_bytes(live: &LiveBandit) -> Result<Vec<u8>> {
    let tensors = live.to_tensors("");
    let metadata = BTreeMap::from([("format".to_owned(), FORMAT.to_owned())]);
    let named = tensors.iter().map(|t| (t.name.clone(), t)).collect();
    let layout = container::lay_out(&metadata, named, FILE)?;
    let mut bytes = Vec::with_capacity(layout.len());
    layout.write_to(&mut bytes).map_err(|e| Error::io(FILE, e))?;
    Ok(bytes)
}

/// Takes what [`to_bytes`] wrote, on a module of the same shape.
///
/// # Errors
/// Bytes of anything else.
pub fn from_bytes(lora: &MicroLora, module: usize, bytes: &[u8]) -> Result<LiveBandit> {
    let found = container::parse(&Bytes::from(bytes.to_vec()), FILE)?;
    if found.metadata.get("format").map(String::as_str) != Some(FORMAT) {
        return Err(Error::format(FILE, format!("safetensors, but its format is not {FORMAT:?}")));
    }
    LiveBandit::from_tensors(lora, module, "", &found.tensors)
}
