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
//!
//! A factor in blocks has their type, `/features` or `/rank` for the way that they lie, the shape in numbers
//! as they lie, and the SHA-256 of the blocks: `"<path>.lora_a" Q4_K/features [8, 256] ...`. The header of a
//! file has the fingerprint of what its reader gives, so that a writer asks the reader ([`stage`]).

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Write};
use std::path::Path;

use sha2::{Digest, Sha256};

use super::atomic::Staged;
use super::container::{self, Container};
use super::tensor::Bytes;
use super::{Along, FactorParts, LoadOptions, Loaded, ModuleParts, QuantModuleParts, Tensor};
use crate::error::{Error, Result};

/// First line of what is hashed.
const HEAD: &str = "microlora weights 1\n";

/// Header entry of files whose format is not ours.
pub(crate) const KEY: &str = "microlora.weights_sha256";
/// Header entry of our single file: of a file, not of bytes in memory, which stand for it in comparisons.
pub(crate) const OUR_KEY: &str = "weights_sha256";

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
    let mut lines = Lines { lines: Vec::new(), digests };
    for (path, m) in modules {
        lines.tensor(format!("{path}.lora_a"), &m.a)?;
        lines.tensor(format!("{path}.lora_b"), &m.b)?;
        lines.scaling(path, m.alpha, m.use_rslora);
    }
    lines.finish(extra)
}

/// [`fingerprint`] of modules of which a factor or more is blocks.
pub(crate) fn of_blocks(modules: &[QuantModuleParts], extra: &[Tensor]) -> Result<String> {
    let mut digests = Digests::default();
    let mut lines = Lines { lines: Vec::new(), digests: &mut digests };
    for m in modules {
        for (which, factor) in [("lora_a", &m.a), ("lora_b", &m.b)] {
            let name = format!("{}.{which}", m.path);
            match factor {
                FactorParts::Plain(t) => lines.tensor(name, t)?,
                FactorParts::Blocks { kind, along, rows, cols, data } => {
                    let way = if *along == Along::Features { "features" } else { "rank" };
                    let dtype = format!("{}/{way}", kind.as_str().to_uppercase());
                    let digest = lines.digests.of(data)?;
                    lines.add(name, &dtype, &[*rows, *cols], &digest);
                }
            }
        }
        lines.scaling(&m.path, m.alpha, m.use_rslora);
    }
    lines.finish(extra)
}

/// The text that is hashed, with what each line is sorted by.
struct Lines<'a> {
    lines: Vec<(String, String)>,
    digests: &'a mut Digests,
}

impl Lines<'_> {
    fn add(&mut self, name: String, dtype: &str, shape: &[usize], digest: &str) {
        let quoted = serde_json::Value::String(name.clone());
        self.lines.push((name, format!("{quoted} {dtype} {shape:?} {digest}\n")));
    }

    fn tensor(&mut self, name: String, t: &Tensor) -> Result<()> {
        let digest = self.digests.of(&t.data)?;
        self.add(name, &t.dtype.to_string(), &t.shape, &digest);
        Ok(())
    }

    fn scaling(&mut self, path: &str, alpha: f64, use_rslora: bool) {
        let scaling = [alpha, f64::from(u8::from(use_rslora))].map(f64::to_le_bytes).concat();
        self.add(format!("{path}.scaling"), "F64", &[2], &hex(&Sha256::digest(scaling)));
    }

    fn finish(mut self, extra: &[Tensor]) -> Result<String> {
        for t in extra {
            self.tensor(format!("extra.{}", t.name), t)?;
        }
        self.lines.sort();
        let mut all = Sha256::new_with_prefix(HEAD);
        self.lines.iter().for_each(|(_, line)| all.update(line));
        Ok(hex(&all.finalize()))
    }
}

/// How a file is read for its fingerprint: as it is, whatever its size.
pub(crate) fn as_it_is() -> LoadOptions {
    let mut opts = LoadOptions { strict: false, ..LoadOptions::default() };
    opts.limits.rank = usize::MAX;
    opts
}

/// Stages a safetensors file with the fingerprint that `read` gives of it in its header.
///
/// # Errors
/// Tensors that cannot lie in one file, what the reader refuses, the system's.
pub(crate) fn stage(
    path: &Path,
    mut header: BTreeMap<String, String>,
    tensors: &[Tensor],
    read: impl FnOnce(Container) -> Result<Loaded> + Send,
) -> Result<Staged> {
    header.insert(KEY.into(), UNKNOWN.into());
    let named = tensors.iter().map(|t| (t.name.clone(), t)).collect();
    let layout = container::lay_out(&header, named, &path.display().to_string())?;
    let content = Container { metadata: header, tensors: tensors.to_vec() };
    layout.stage_named(path, KEY, move |_| read(content)?.fingerprint())
}

fn hex(digest: &[u8]) -> String {
    digest.iter().map(|b| format!("{b:02x}")).collect()
}
