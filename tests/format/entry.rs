//! What a fuzzer calls: any bytes at all must give a value or a typed error, and a value must survive
//! being written and read again. Shared by the fuzz targets and the plain loops of the tests.

use microlora::Error;
use microlora::format::{Loaded, from_bytes, peft, read_bytes, to_bytes};

fn known<T>(result: Result<T, Error>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(Error::Format { file, reason } | Error::Unsupported { file, reason }) => {
            assert!(!file.is_empty() && !reason.is_empty() && reason.len() < 20_000);
            None
        }
        Err(other) => panic!("not an error of a file: {other:?}"),
    }
}

fn survives(loaded: Loaded) {
    match to_bytes(&loaded.parts) {
        Ok(bytes) => {
            let again = read_bytes(&bytes, false).expect("what is written can be read");
            assert_eq!(to_bytes(&again.parts).expect("and written again"), bytes);
        }
        // Two names may become one in the other container: an error, not a loss.
        Err(Error::Config { arg, .. }) => assert_eq!(arg, "tensors"),
        Err(other) => panic!("read but not written: {other:?}"),
    }
}

/// Our single file.
pub fn single(data: &[u8]) {
    for strict in [true, false] {
        if let Some(loaded) = known(from_bytes(data, strict)) {
            survives(loaded);
        }
    }
}

/// `adapter_config.json` alone.
pub fn config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Some(config) = known(peft::config::parse(text, "adapter_config.json")) {
        for path in ["", "q_proj", "model.layers.10.self_attn.q_proj", "é.base_layer.x\n"] {
            assert!(config.rank_for(path).0 > 0);
            assert!(config.alpha_for(path).is_finite());
        }
    }
}

/// Both files of a PEFT directory: two bytes of configuration length, the configuration, the weights.
pub fn peft_dir(data: &[u8]) {
    let Some((len, rest)) = data.split_first_chunk::<2>() else { return };
    let (text, weights) = rest.split_at(rest.len().min(usize::from(u16::from_le_bytes(*len))));
    let Ok(text) = std::str::from_utf8(text) else { return };
    for strict in [true, false] {
        if let Some(loaded) = known(peft::from_memory(text, weights, strict)) {
            survives(loaded);
        }
    }
}
