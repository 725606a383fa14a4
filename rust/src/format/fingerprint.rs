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

use sha2::{Digest, Sha256};

use super::{ModuleParts, Tensor};

/// First line of what is hashed.
const HEAD: &str = "microlora weights 1\n";

/// The fingerprint of modules under those paths and of tensors that are no factors: 64 hex digits.
pub(crate) fn fingerprint<'a>(
    modules: impl Iterator<Item = (&'a str, &'a ModuleParts)>,
    extra: &[Tensor],
) -> String {
    let mut lines: Vec<(String, String)> = Vec::new();
    let mut add = |name: String, dtype: &str, shape: &[usize], data: &[u8]| {
        let quoted = serde_json::Value::String(name.clone());
        lines.push((name, format!("{quoted} {dtype} {shape:?} {}\n", hex(&Sha256::digest(data)))));
    };
    for (path, m) in modules {
        for (which, t) in [("lora_a", &m.a), ("lora_b", &m.b)] {
            add(format!("{path}.{which}"), &t.dtype.to_string(), &t.shape, &t.data);
        }
        let scaling = [m.alpha, f64::from(u8::from(m.use_rslora))].map(f64::to_le_bytes).concat();
        add(format!("{path}.scaling"), "F64", &[2], &scaling);
    }
    for t in extra {
        add(format!("extra.{}", t.name), &t.dtype.to_string(), &t.shape, &t.data);
    }
    lines.sort();
    let mut all = Sha256::new_with_prefix(HEAD);
    lines.iter().for_each(|(_, line)| all.update(line));
    hex(&all.finalize())
}

fn hex(digest: &[u8]) -> String {
    digest.iter().map(|b| format!("{b:02x}")).collect()
}
