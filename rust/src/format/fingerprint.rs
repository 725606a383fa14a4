//! What an adapter's weights are called: one SHA-256 over names, shapes, dtypes, scaling and data.
//!
//! The same whatever file holds the adapter: the text below, hashed, one line per record, lines sorted by
//! name, each ended by a line feed. Factors are in PEFT's orientation; `<path>.scaling` stands for alpha and
//! for 1.0 (rsLoRA) or 0.0, two little-endian float64.
//!
//! ```text
//! microlora weights 1
//! "<path>.lora_a" F32 [8, 64] <SHA-256 of its bytes>
//! "<path>.lora_b" F32 [64, 8] <SHA-256 of its bytes>
//! "<path>.scaling" F64 [2] <SHA-256 of its bytes>
//! "extra.<name>" ...
//! ```

use std::collections::HashMap;
use std::io::{self, Write};

use sha2::{Digest, Sha256};

use super::tensor::Bytes;
use super::{ModuleParts, Tensor};
use crate::error::{Error, Result};

/// First line of what is hashed.
const HEAD: &str = "microlora weights 1\n";

/// What a header says until its tensors are written and their hash is known.
pub(crate) const UNKNOWN: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// SHA-256 of tensors' bytes, by where these are owned: a tensor that goes under several names is hashed once.
#[derive(Default)]
pub(crate) struct Digests(HashMap<*const Bytes, String>);

impl Digests {
    /// The hash of bytes that may never lie in memory as a whole.
    fn of(&mut self, bytes: &Bytes) -> Result<String> {
        let key: *const Bytes = bytes;
        if let Some(known) = self.0.get(&key) {
            return Ok(known.clone());
        }
        let mut hashing = Hashing(Sha256::new());
        bytes.write_to(&mut hashing).map_err(|e| Error::io("fingerprint", e))?;
        let found = hex(&hashing.0.finalize());
        self.0.insert(key, found.clone());
        Ok(found)
    }
}

struct Hashing(Sha256);

impl Write for Hashing {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.update(buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The fingerprint of modules under those paths and of tensors that are no factors: 64 hex digits.
pub(crate) fn fingerprint<'a>(
    modules: impl Iterator<Item = (&'a str, &'a ModuleParts)>,
    extra: &[Tensor],
    digests: &mut Digests,
) -> Result<String> {
    let mut lines: Vec<(String, String)> = Vec::new();
    let mut add = |name: String, dtype: &str, shape: &[usize], digest: String| {
        let quoted = serde_json::Value::String(name.clone());
        lines.push((name, format!("{quoted} {dtype} {shape:?} {digest}\n")));
    };
    for (path, m) in modules {
        for (which, t) in [("lora_a", &m.a), ("lora_b", &m.b)] {
            add(format!("{path}.{which}"), &t.dtype.to_string(), &t.shape, digests.of(&t.data)?);
        }
        let scaling = [m.alpha, f64::from(u8::from(m.use_rslora))].map(f64::to_le_bytes).concat();
        add(format!("{path}.scaling"), "F64", &[2], hex(&Sha256::digest(scaling)));
    }
    for t in extra {
        add(format!("extra.{}", t.name), &t.dtype.to_string(), &t.shape, digests.of(&t.data)?);
    }
    lines.sort();
    let mut all = Sha256::new_with_prefix(HEAD);
    lines.iter().for_each(|(_, line)| all.update(line));
    Ok(hex(&all.finalize()))
}

fn hex(digest: &[u8]) -> String {
    digest.iter().map(|b| format!("{b:02x}")).collect()
}
