//! What the key styles share: pairs of factors under way, scalars, transposes, and what is carried in a
//! header because a style has no place for it.

use std::collections::BTreeMap;

use half::{bf16, f16};
use serde::{Deserialize, Serialize};

use super::json::{parse_object, show, show_list};
use super::styles::magnitude_path;
use super::tensor::{Bytes, Tensor, TensorDtype};
use super::{
    AdapterParts, LoadOptions, Loaded, ModuleKind, ModuleParts, Variant, check_factors, fingerprint,
};
use crate::error::{Error, Result};

/// Header entries of ours, beside those of the style.
const CONFIG: &str = "microlora.config";
const METADATA: &str = "microlora.metadata";
const PEFT_CONFIG: &str = "microlora.peft_config";
const PEFT_PREFIX: &str = "microlora.prefix";
const MODULES: &str = "microlora.modules";

/// Which factor a tensor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    A,
    B,
}

/// The tensors of one module, each with the key it had.
#[derive(Default)]
pub(super) struct Slot {
    sides: [Option<(String, Tensor)>; 2],
    pub alpha: Option<(String, f64)>,
}

/// Factors by module path.
pub(super) struct Pairs {
    pub slots: BTreeMap<String, Slot>,
    file: String,
}

impl Pairs {
    pub fn new(file: &str) -> Self {
        Pairs { slots: BTreeMap::new(), file: file.to_owned() }
    }

    /// Keeps a factor of the module.
    ///
    /// # Errors
    /// The module has that factor already: both keys are named.
    pub fn put(&mut self, path: &str, side: Side, tensor: Tensor) -> Result<()> {
        let slot = &mut self.slots.entry(path.to_owned()).or_default().sides[side as usize];
        if let Some((first, _)) = slot {
            let which = ["lora_a", "lora_b"][side as usize];
            return Err(twice(first, &tensor.name, which, path, &self.file));
        }
        *slot = Some((tensor.name.clone(), tensor));
        Ok(())
    }

    /// Keeps the alpha of the module.
    pub fn put_alpha(&mut self, path: &str, tensor: &Tensor) -> Result<()> {
        let alpha = scalar(tensor, &self.file)?;
        let slot = &mut self.slots.entry(path.to_owned()).or_default().alpha;
        if let Some((first, _)) = slot {
            return Err(twice(first, &tensor.name, "alpha", path, &self.file));
        }
        *slot = Some((tensor.name.clone(), alpha));
        Ok(())
    }
}

fn twice(first: &str, second: &str, which: &str, path: &str, file: &str) -> Error {
    let reason =
        format!("tensors {} and {} are both {which} of module {}", show(first), show(second), show(path));
    Error::format(file, reason)
}

impl Slot {
    /// True when only an alpha came.
    pub fn is_bare(&self) -> bool {
        self.sides.iter().all(Option::is_none)
    }

    /// Both factors, with their keys.
    ///
    /// # Errors
    /// One is missing.
    pub fn both(&mut self, path: &str, file: &str) -> Result<[(String, Tensor); 2]> {
        match std::mem::take(&mut self.sides) {
            [Some(a), Some(b)] => Ok([a, b]),
            [a, b] => {
                let (have, missing) = if a.is_some() { ("A", "B") } else { ("B", "A") };
                let key = a.or(b).map(|(key, _)| key).unwrap_or_default();
                let reason = format!("module {}: {have} ({}) without its {missing}", show(path), show(&key));
                Err(Error::format(file, reason))
            }
        }
    }
}

/// One number from a tensor of one element.
///
/// # Errors
/// More elements, a dtype that is no number, NaN or infinity.
pub(super) fn scalar(t: &Tensor, file: &str) -> Result<f64> {
    let wrong = |what: String| Error::format(file, format!("tensor {}: {what}", show(&t.name)));
    if t.shape.iter().any(|&d| d != 1) {
        return Err(wrong(format!("shape {:?}, expected a single number", t.shape)));
    }
    let d = &t.data[..];
    let value = match (t.dtype, d) {
        (TensorDtype::F64, &[a, b, c, d, e, f, g, h]) => f64::from_le_bytes([a, b, c, d, e, f, g, h]),
        (TensorDtype::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]).into(),
        (TensorDtype::F16, &[a, b]) => f16::from_le_bytes([a, b]).into(),
        (TensorDtype::BF16, &[a, b]) => bf16::from_le_bytes([a, b]).into(),
        (TensorDtype::I64, &[a, b, c, d, e, f, g, h]) => i64::from_le_bytes([a, b, c, d, e, f, g, h]) as f64,
        (TensorDtype::I32, &[a, b, c, d]) => i32::from_le_bytes([a, b, c, d]).into(),
        (TensorDtype::I16, &[a, b]) => i16::from_le_bytes([a, b]).into(),
        (TensorDtype::I8, &[a]) => i8::from_le_bytes([a]).into(),
        (TensorDtype::U8, &[a]) => a.into(),
        _ => return Err(wrong(format!("dtype {}, expected a number", t.dtype))),
    };
    if !value.is_finite() {
        return Err(wrong(format!("{value}, expected a finite number")));
    }
    Ok(value)
}

/// A scalar tensor: f32 where that is exact, else f64.
pub(super) fn scalar_tensor(name: String, value: f64) -> Result<Tensor> {
    let narrow = value as f32;
    if f64::from(narrow).to_bits() == value.to_bits() {
        return Tensor::new(name, TensorDtype::F32, vec![], narrow.to_le_bytes().to_vec());
    }
    Tensor::new(name, TensorDtype::F64, vec![], value.to_le_bytes().to_vec())
}

/// A matrix with rows and columns exchanged, bit for bit. Anything else comes back as it is.
pub(super) fn transposed(t: &Tensor) -> Tensor {
    turned(t, false)
}

/// [`transposed`], with the bytes of each number in the other order where they are `swapped`.
fn turned(t: &Tensor, swapped: bool) -> Tensor {
    let (&[rows, cols], size) = (&t.shape[..], t.dtype.bitsize() / 8) else { return t.clone() };
    let mut out = vec![0u8; t.data.len()];
    if !out.is_empty() && size > 0 {
        for (r, row) in t.data.chunks_exact(cols * size).enumerate() {
            for (c, element) in row.chunks_exact(size).enumerate() {
                let at = (c * rows + r) * size;
                out[at..at + size].copy_from_slice(element);
                if swapped {
                    out[at..at + size].reverse();
                }
            }
        }
    }
    Tensor { name: t.name.clone(), dtype: t.dtype, shape: vec![cols, rows], data: Bytes::from(out) }
}

/// How the bytes of a tensor lie that nobody has looked at yet.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Lie {
    /// The highest byte of a number first.
    pub swapped: bool,
    /// Column after column; of matrices alone.
    pub columns: bool,
}

/// A tensor in the order of all others, `turn`ed where that is asked for, in one copy or none.
pub(super) fn settled(mut t: Tensor, lie: Lie, turn: bool) -> Tensor {
    let size = t.dtype.bitsize() / 8;
    if lie.columns {
        t.shape.reverse();
    }
    if lie.columns != turn && t.shape.len() == 2 {
        return turned(&t, lie.swapped);
    }
    if lie.swapped && size > 1 {
        let mut data = t.data.to_vec();
        data.chunks_exact_mut(size).for_each(<[u8]>::reverse);
        t.data = data.into();
    }
    t
}

/// Numbers of a factor, widened exactly. Other dtypes give nothing.
pub(super) fn widened(t: &Tensor) -> Vec<f32> {
    match t.dtype {
        TensorDtype::F32 => {
            t.data.chunks_exact(4).map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect()
        }
        TensorDtype::F16 => t.data.chunks_exact(2).map(|c| f16::from_le_bytes([c[0], c[1]]).into()).collect(),
        TensorDtype::BF16 => {
            t.data.chunks_exact(2).map(|c| bf16::from_le_bytes([c[0], c[1]]).into()).collect()
        }
        _ => Vec::new(),
    }
}

/// A module of the kind that its dimensions say (two: linear, more: a convolution), checked.
/// A factor that was flattened gets its kernel dimensions of one back.
pub(super) fn by_dims(
    path: &str,
    [(key_a, mut a), (key_b, mut b)]: [(String, Tensor); 2],
    alpha: impl FnOnce(usize) -> f64,
    opts: &LoadOptions,
    file: &str,
) -> Result<ModuleParts> {
    let dims = a.shape.len().max(b.shape.len());
    let kind = if dims > 2 { ModuleKind::Conv } else { ModuleKind::Linear };
    if kind == ModuleKind::Conv {
        for t in [&mut a, &mut b].into_iter().filter(|t| t.shape.len() == 2) {
            t.shape.resize(dims, 1);
        }
    }
    module(path, kind, [(key_a, a), (key_b, b)], alpha, opts, file)
}

/// A module whose factors lie as [`ModuleKind`] says, checked; `alpha` is asked with its rank.
pub(super) fn module(
    path: &str,
    kind: ModuleKind,
    [(key_a, mut a), (key_b, mut b)]: [(String, Tensor); 2],
    alpha: impl FnOnce(usize) -> f64,
    opts: &LoadOptions,
    file: &str,
) -> Result<ModuleParts> {
    let rank = check_factors(kind, &a, &b, [&key_a, &key_b], file)?;
    opts.limits.check_rank(rank, path, file)?;
    a.name = format!("{path}.lora_a");
    b.name = format!("{path}.lora_b");
    Ok(ModuleParts { path: path.to_owned(), kind, alpha: alpha(rank), rank, use_rslora: false, a, b })
}

/// The variant that a module is by its kind; a linear one is none.
pub(super) fn kind_variant(m: &ModuleParts) -> Option<Variant> {
    let why = match m.kind {
        ModuleKind::Linear => return None,
        ModuleKind::Conv => "a LoRA on a convolution; only linear layers are run here",
        ModuleKind::Embedding => "a LoRA on an embedding; only linear layers are run here",
        ModuleKind::Experts => "one LoRA for each of several experts; only single linear layers are run here",
    };
    Some(Variant { kind: m.kind.as_str().into(), at: m.path.clone(), why: why.into() })
}

/// The alpha that with the scaling alpha / rank gives this module's scaling.
pub(super) fn plain_alpha(m: &ModuleParts) -> f64 {
    if m.use_rslora { m.alpha * (m.rank as f64).sqrt() } else { m.alpha }
}

/// What of a module a style's own keys do not say.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CarriedModule {
    key: String,
    path: String,
    rank: usize,
    alpha: f64,
    use_rslora: bool,
}

/// What a header carries beside the style.
#[derive(Default)]
pub(super) struct Carried {
    config: Option<String>,
    metadata: Option<String>,
    peft_config: Option<String>,
    prefix: Option<String>,
    modules: BTreeMap<String, CarriedModule>,
    weights_sha256: Option<String>,
    pub header: BTreeMap<String, String>,
}

impl Carried {
    /// Takes our entries from a header.
    ///
    /// # Errors
    /// They are not what we write.
    pub fn take(mut header: BTreeMap<String, String>, file: &str) -> Result<Self> {
        header.remove("format");
        let modules = match header.remove(MODULES) {
            Some(text) => serde_json::from_str::<Vec<CarriedModule>>(&text)
                .map_err(|e| Error::format(file, format!("header: {MODULES}: {e}")))?,
            None => Vec::new(),
        };
        Ok(Carried {
            config: header.remove(CONFIG),
            metadata: header.remove(METADATA),
            peft_config: header.remove(PEFT_CONFIG),
            prefix: header.remove(PEFT_PREFIX),
            modules: modules.into_iter().map(|m| (m.key.clone(), m)).collect(),
            weights_sha256: header.remove(fingerprint::KEY),
            header,
        })
    }

    /// The header of a file with these modules, each under its key.
    pub fn give<'a>(
        parts: &AdapterParts,
        modules: impl Iterator<Item = (&'a str, &'a ModuleParts)>,
        format: &str,
    ) -> Result<BTreeMap<String, String>> {
        let mut header = parts.header_without_hash();
        header.insert("format".into(), format.into());
        let rows: Vec<CarriedModule> = modules
            .map(|(key, m)| CarriedModule {
                key: key.to_owned(),
                path: m.path.clone(),
                rank: m.rank,
                alpha: m.alpha,
                use_rslora: m.use_rslora,
            })
            .collect();
        let rows = serde_json::to_string(&rows)
            .map_err(|e| Error::config("modules", e, "what can be written as JSON"))?;
        header.insert(MODULES.into(), rows);
        let texts = [
            (CONFIG, &parts.config_json),
            (METADATA, &parts.metadata_json),
            (PEFT_CONFIG, &parts.peft_config),
            (PEFT_PREFIX, &parts.prefix),
        ];
        header.extend(texts.into_iter().filter_map(|(k, v)| Some((k.to_owned(), v.clone()?))));
        Ok(header)
    }

    /// Alpha that the header gives the module under that key, as it is with the scaling alpha / rank.
    pub fn alpha_of(&self, key: &str, rank: usize) -> Option<f64> {
        let m = self.modules.get(key)?;
        Some(if m.use_rslora { m.alpha * (rank as f64).sqrt() } else { m.alpha })
    }

    /// Gives a module that was read under `key` its path, and its own alpha and scaling where the file's
    /// scaling is still what they give: `same` is asked with the alpha for alpha / rank. Where another
    /// program changed it, our settings no longer describe the adapter, and go.
    pub fn restore(&mut self, key: &str, m: &mut ModuleParts, same: impl Fn(f64) -> bool) {
        let Some(row) = self.modules.get(key) else { return };
        if row.path != m.path {
            m.path.clone_from(&row.path);
            m.a.name = format!("{}.lora_a", m.path);
            m.b.name = format!("{}.lora_b", m.path);
        }
        let own = ModuleParts { alpha: row.alpha, use_rslora: row.use_rslora, ..m.clone() };
        if row.rank == m.rank && same(plain_alpha(&own)) {
            (m.alpha, m.use_rslora) = (row.alpha, row.use_rslora);
        } else {
            self.config = None;
        }
    }
}

/// What a reader found.
#[derive(Default)]
pub(super) struct Found {
    pub modules: Vec<ModuleParts>,
    pub variants: Vec<Variant>,
    pub extra: Vec<Tensor>,
    pub unused: Vec<String>,
    pub notes: Vec<String>,
    pub carried: Carried,
}

impl Found {
    /// Something that is not plain LoRA, with the tensor that shows it, which is kept.
    pub fn vary(&mut self, kind: &str, why: &str, tensor: Tensor) {
        self.variants.push(Variant { kind: kind.into(), at: tensor.name.clone(), why: why.into() });
        self.extra.push(tensor);
    }

    /// A tensor that means nothing here.
    pub fn leave(&mut self, tensor: Tensor) {
        self.unused.push(tensor.name.clone());
        self.extra.push(tensor);
    }

    /// Adds a module, and the variant that its kind is.
    pub fn add(&mut self, m: ModuleParts) {
        self.variants.extend(kind_variant(&m));
        self.modules.push(m);
    }

    /// The last checks.
    pub fn finish(self, opts: &LoadOptions, file: &str) -> Result<Loaded> {
        let Found { modules, variants, extra, unused, notes, carried } = self;
        if opts.strict && !unused.is_empty() {
            let reason =
                format!("unused tensors {}; load with strict=False to keep them aside", show_list(&unused));
            return Err(Error::format(file, reason));
        }
        if modules.is_empty() && variants.is_empty() {
            return Err(Error::format(file, "no factors of a LoRA"));
        }
        let weights_sha256 = carried.weights_sha256;
        let mut parts = AdapterParts {
            modules,
            config_json: carried.config,
            metadata_json: carried.metadata,
            peft_config: carried.peft_config,
            extra,
            prefix: carried.prefix,
            header: carried.header,
        };
        parts.check_names().map_err(|e| Error::format(file, e.to_string()))?;
        parts.check_json(file)?;
        parts.detach_extra();
        if parts.extra.iter().any(|t| magnitude_path(&t.name).is_some()) {
            parts.peft_config = Some(with_dora(parts.peft_config.as_deref(), file)?);
        }
        Ok(Loaded { parts, variants, unused, notes, weights_sha256, ..Loaded::default() })
    }

    /// Uses these settings of PEFT where the file carries none.
    pub fn offer_peft_config(&mut self, text: String) {
        self.carried.peft_config.get_or_insert(text);
    }
}

/// PEFT's settings, saying that there are magnitudes.
fn with_dora(text: Option<&str>, file: &str) -> Result<String> {
    let wrong = |e: String| Error::format(file, format!("peft_config: {e}"));
    let mut object = parse_object(text.unwrap_or("{\"peft_type\": \"LORA\"}")).map_err(wrong)?;
    object.insert("use_dora".into(), true.into());
    Ok(serde_json::Value::Object(object).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transposes_are_exact_both_ways() {
        for (dtype, size) in [(TensorDtype::F32, 4), (TensorDtype::F16, 2), (TensorDtype::F64, 8)] {
            let data: Vec<u8> = (0..15 * size).map(|i| i as u8).collect();
            let t = Tensor::new("t", dtype, vec![3, 5], data).unwrap();
            let u = transposed(&t);
            assert_eq!(u.shape, [5, 3]);
            // Element (4, 1) of the transpose is (1, 4).
            assert_eq!(u.data[13 * size..14 * size], t.data[9 * size..10 * size]);
            assert_eq!(transposed(&u), t);
        }
    }

    #[test]
    fn tensors_settle_whichever_way_they_lie() {
        let number = |i: usize, swapped: bool| if swapped { [i as u8, 0] } else { [0, i as u8] };
        for (swapped, columns, turn) in (0..8).map(|i| (i & 1 != 0, i & 2 != 0, i & 4 != 0)) {
            // The element (r, c) of 2 x 3 is 10 r + c.
            let place = |i: usize| if columns { 10 * (i % 2) + i / 2 } else { 10 * (i / 3) + i % 3 };
            let data: Vec<u8> = (0..6).flat_map(|i| number(place(i), swapped)).collect();
            let t = Tensor::new("t", TensorDtype::F16, vec![2, 3], data).unwrap();
            let got = settled(t, Lie { swapped, columns }, turn);
            let place = |i: usize| if turn { 10 * (i % 2) + i / 2 } else { 10 * (i / 3) + i % 3 };
            assert_eq!(got.shape, if turn { [3, 2] } else { [2, 3] });
            let want: Vec<u8> = (0..6).flat_map(|i| number(place(i), false)).collect();
            assert_eq!(got.data.to_vec(), want, "{swapped} {columns} {turn}");
        }
    }

    #[test]
    fn scalars_keep_their_value() {
        for value in [1.0, 0.1, -3.5, 160.0, 1e-300] {
            let t = scalar_tensor("m.alpha".into(), value).unwrap();
            assert_eq!(scalar(&t, "f").unwrap().to_bits(), value.to_bits());
        }
        let two = Tensor::new("m.alpha", TensorDtype::F32, vec![2], vec![0; 8]).unwrap();
        assert!(scalar(&two, "f").unwrap_err().to_string().contains("single number"));
        let nan = Tensor::new("m.alpha", TensorDtype::F16, vec![1], vec![0, 0x7e]).unwrap();
        assert!(scalar(&nan, "f").unwrap_err().to_string().contains("finite"));
        let flag = Tensor::new("m.alpha", TensorDtype::BOOL, vec![], vec![1]).unwrap();
        assert!(scalar(&flag, "f").unwrap_err().to_string().contains("BOOL"));
    }
}
