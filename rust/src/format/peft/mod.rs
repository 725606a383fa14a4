//! PEFT adapter directories: `adapter_config.json` and `adapter_model.safetensors`.

pub mod config;
mod experts;
mod names;
mod read;
pub(super) mod variants;
mod write;

pub use experts::unpack_experts;
pub(crate) use names::is_only_for_training;
pub use read::from_memory;
pub(super) use read::{is_key, knows, read};
pub(crate) use write::placed;
pub(super) use write::set_scaling;
pub use write::{PeftOptions, save_peft};

/// The configuration's file name.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The weights' file name.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// The prefix that PEFT puts before a module's path.
pub const PREFIX: &str = "base_model.model.";

/// Header keys under which a PEFT weights file carries what PEFT has no place for.
const HEADER_CONFIG: &str = "microlora.config";
const HEADER_METADATA: &str = "microlora.metadata";
