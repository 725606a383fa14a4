//! The only home of pyo3: extract, call the core, map the error.

#[cfg(Py_GIL_DISABLED)]
compile_error!(
    "microlora does not support free-threaded CPython yet: build it with a standard CPython 3.11 or newer"
);

mod adaptation;
mod adapter;
mod adapter_file;
mod anchor;
mod array;
mod bandit;
mod calls;
mod chain;
mod dataset;
mod error;
mod ewc;
mod extract;
mod feedback;
mod files;
mod fuse;
mod gguf;
mod handle;
mod long;
mod machine;
mod merge;
mod micro_lora;
mod quant;
mod quantized;
mod replay_memory;
mod scan;
mod sona;
mod step;
mod swap;
mod train;

use pyo3::prelude::*;

/// The compiled core of microlora.
#[pymodule(gil_used = true)]
mod _core {
    #[pymodule_export]
    use super::adaptation::PyAdaptation;
    #[pymodule_export]
    use super::adapter::{PyAdapter, PySnapshot};
    #[pymodule_export]
    use super::adapter_file::PyAdapterFile;
    #[pymodule_export]
    use super::bandit::{PyBandit, PyChoice, off_policy};
    #[pymodule_export]
    use super::chain::PyChain;
    #[pymodule_export]
    use super::ewc::PyEwc;
    #[pymodule_export]
    use super::extract::{extract_from_arrays, extract_from_files, list_tensors};
    #[pymodule_export]
    use super::feedback::{PyContrastive, PyFeedback, PyGradient, PyPreference, PyReward, PyTarget};
    #[pymodule_export]
    use super::files::{
        adapter_file_formats, adapter_file_kinds, adapter_from_factors, from_bytes, load, save_peft,
        save_single, write_file,
    };
    #[pymodule_export]
    use super::fuse::{fuse_model, unfuse_model};
    #[pymodule_export]
    use super::gguf::{
        gguf_alpha, gguf_interleaves, gguf_keep_names, gguf_lost_blocks, gguf_stack, gguf_translate,
        save_gguf,
    };
    #[pymodule_export]
    use super::handle::ModuleHandle;
    #[pymodule_export]
    use super::machine::{
        available_isas, isa, num_threads, probe_fma_gflops, probe_forward_ns, probe_read_gbps,
        set_num_threads,
    };
    #[pymodule_export]
    use super::merge::{combine, compose, diff, merge_adapters, merge_mask, merge_methods, resize};
    #[pymodule_export]
    use super::micro_lora::PyMicroLora;
    #[pymodule_export]
    use super::quant::{block_types, dequantize_blocks, quantize_blocks};
    #[pymodule_export]
    use super::quantized::{PyQuantizedAdapter, gguf_adapter, load_any};
    #[pymodule_export]
    use super::replay_memory::PyReplayMemory;
    #[pymodule_export]
    use super::scan::{PyScan, match_patterns, match_whole, scan_file, write_safetensors};
    #[pymodule_export]
    use super::sona::{PySona, sona_config};
    #[pymodule_export]
    use super::step::PyStepResult;
    #[pymodule_export]
    use super::swap::{PyGeneration, PyHotSwap, SwapHandle, probe_swap};
    #[pymodule_export]
    use super::train::{PyOptimizer, evaluate};

    #[pymodule_export]
    #[allow(non_upper_case_globals)]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
