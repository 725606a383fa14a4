//! The GGUF container (versions 2 and 3, little-endian): typed keys, tensor infos, aligned data.
//!
//! Every count and length is checked against what is left of the file before memory is taken for it; arrays
//! are measured, not copied, so that the vocabulary of a model costs nothing.

use std::collections::HashSet;
use std::ops::Range;

use crate::error::{Error, Result};
use crate::format::json::show;
use crate::format::limits::Limits;
use crate::quant::BLOCKS;

/// First bytes of a file.
pub(crate) const MAGIC: &[u8; 4] = b"GGUF";
/// The version that is written; 2 differs in nothing that is used here.
pub(crate) const VERSION: u32 = 3;
/// Alignment of tensor data where `general.alignment` says nothing.
pub(crate) const ALIGNMENT: usize = 32;
/// Most dimensions of a tensor in ggml.
pub(crate) const MAX_DIMS: usize = 4;
/// Longest name of a tensor in ggml, in bytes.
pub(crate) const MAX_NAME: usize = 63;
const MAX_DEPTH: usize = 4;
/// Shortest entry: a key is its length, one byte, a type and a value; an info has four numbers and a name.
const MIN_KEY: u64 = 8 + 1 + 4 + 1;
const MIN_INFO: u64 = 8 + 1 + 4 + 8 + 4 + 8;

pub(crate) const F32_TYPE: u32 = 0;
pub(crate) const F16_TYPE: u32 = 1;
pub(crate) const BF16_TYPE: u32 = 30;
const OTHERS: [(u32, &str); 6] =
    [(6, "q5_0"), (7, "q5_1"), (9, "q8_1"), (10, "q2_k"), (11, "q3_k"), (15, "q8_k")];

/// Types of values, by number.
const VALUES: [(&str, usize); 13] = [
    ("u8", 1),
    ("i8", 1),
    ("u16", 2),
    ("i16", 2),
    ("u32", 4),
    ("i32", 4),
    ("f32", 4),
    ("bool", 1),
    ("string", 0),
    ("array", 0),
    ("u64", 8),
    ("i64", 8),
    ("f64", 8),
];
const STRING: u32 = 8;
const ARRAY: u32 = 9;
pub(crate) const U32_VALUE: u32 = 4;
pub(crate) const F32_VALUE: u32 = 6;

/// A value as far as an adapter may use it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    U32(u32),
    F32(f32),
    Text(String),
    /// Type and number of its items, and where they lie in the file.
    Array {
        item: u32,
        count: u64,
        span: Range<usize>,
    },
    /// A scalar of another type.
    Other(u32),
}

impl Value {
    /// Name of its type, for messages.
    pub fn kind(&self) -> String {
        match self {
            Value::U32(_) => "u32".into(),
            Value::F32(_) => "f32".into(),
            Value::Text(_) => "string".into(),
            Value::Array { item, .. } => format!("array of {}", VALUES[*item as usize].0),
            Value::Other(t) => VALUES[*t as usize].0.into(),
        }
    }
}

/// One tensor's info; its bytes lie inside the file.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Info {
    pub name: String,
    /// Outermost first, as everywhere else here; the file has them the other way round.
    pub shape: Vec<usize>,
    /// Number of the type in ggml.
    pub kind: u32,
    /// From the start of the file.
    pub span: Range<usize>,
}

/// Elements and bytes per block of a type that can be read.
fn block_of(kind: u32) -> Option<(usize, usize)> {
    match kind {
        F32_TYPE => Some((1, 4)),
        F16_TYPE | BF16_TYPE => Some((1, 2)),
        _ => BLOCKS.iter().find(|b| b.ggml == kind).map(|b| (b.elements, b.bytes)),
    }
}

/// Name of a tensor type, for messages.
pub(crate) fn type_name(kind: u32) -> String {
    match kind {
        F32_TYPE => "f32".into(),
        F16_TYPE => "f16".into(),
        BF16_TYPE => "bf16".into(),
        _ => {
            let ours = BLOCKS.iter().find(|b| b.ggml == kind).map(|b| b.name);
            let other = || OTHERS.iter().find(|(n, _)| *n == kind).map(|(_, name)| *name);
            ours.or_else(other).map_or_else(|| format!("number {kind}"), str::to_owned)
        }
    }
}

/// A file whose keys were read, and whose tensor infos were not yet.
pub(crate) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    file: &'a str,
    limits: &'a Limits,
    /// Tensors that the header announces.
    pub tensors: u64,
    /// Keys in the file's order.
    pub keys: Vec<(String, Value)>,
}

impl<'a> Reader<'a> {
    /// Reads magic, version, counts and keys.
    pub fn new(bytes: &'a [u8], file: &'a str, limits: &'a Limits) -> Result<Self> {
        let mut r = Reader { bytes, at: 0, file, limits, tensors: 0, keys: Vec::new() };
        if r.take(4, "magic")? != MAGIC {
            return Err(r.wrong("not GGUF: another magic"));
        }
        match r.u32("version")? {
            2 | VERSION => {}
            v if matches!(v.swap_bytes(), 1..=VERSION) => {
                return Err(Error::unsupported(
                    file,
                    "a big-endian GGUF file; convert it to little-endian first",
                ));
            }
            v => {
                let reason = format!("GGUF version {v}, this build reads 2 and {VERSION}");
                return Err(Error::unsupported(file, reason));
            }
        }
        r.tensors = r.u64("tensor count")?;
        let keys = r.u64("key count")?;
        limits.check_tensors(r.tensors, file)?;
        r.check_count(r.tensors, MIN_INFO, "tensor count")?;
        r.check_count(keys, MIN_KEY, "key count")?;
        let mut seen = HashSet::new();
        for _ in 0..keys {
            let key = r.string("key")?;
            let value = r.value(&key)?;
            if !seen.insert(key.clone()) {
                return Err(r.wrong(format!("key {} appears twice", show(&key))));
            }
            r.keys.push((key, value));
        }
        Ok(r)
    }

    /// Value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.keys.iter().find_map(|(k, v)| (k == key).then_some(v))
    }

    /// A text, where the key is there.
    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(v) => Err(self.wrong(format!("key {key}: of type {}, expected string", v.kind()))),
        }
    }

    /// Numbers of an array of u32, where the key is there.
    pub fn u32s(&self, key: &str) -> Result<Option<Vec<u32>>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array { item: U32_VALUE, span, .. }) => {
                let numbers = self.bytes[span.clone()].chunks_exact(4);
                Ok(Some(numbers.map(|c| u32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect()))
            }
            Some(v) => Err(self.wrong(format!("key {key}: of type {}, expected array of u32", v.kind()))),
        }
    }

    /// Reads the tensor infos and checks where their bytes lie.
    pub fn infos(mut self) -> Result<Vec<Info>> {
        let alignment = match self.get("general.alignment") {
            None => ALIGNMENT,
            Some(Value::U32(n)) if n.is_power_of_two() && *n <= 1 << 20 => *n as usize,
            Some(v) => {
                let reason = format!("general.alignment: got {v:?}, expected a power of two as u32");
                return Err(self.wrong(reason));
            }
        };
        let mut seen = HashSet::new();
        let mut raw = Vec::with_capacity(self.tensors as usize);
        for _ in 0..self.tensors {
            let (info, offset) = self.info()?;
            if !seen.insert(info.name.clone()) {
                return Err(self.wrong(format!("tensor {} appears twice", show(&info.name))));
            }
            raw.push((info, offset));
        }
        self.place(raw, alignment)
    }

    fn info(&mut self) -> Result<(Info, u64)> {
        let name = self.string("tensor name")?;
        let bad = |r: &Self, what: String| Err(r.wrong(format!("tensor {}: {what}", show(&name))));
        let dims = self.u32("dimensions")?;
        if dims == 0 || dims as usize > MAX_DIMS {
            return bad(self, format!("{dims} dimensions, expected 1 to {MAX_DIMS}"));
        }
        let mut shape = Vec::with_capacity(MAX_DIMS);
        for _ in 0..dims {
            let dim = self.u64("dimension")?;
            match usize::try_from(dim) {
                Ok(dim) if dim > 0 => shape.push(dim),
                _ => return bad(self, format!("dimension {dim}, expected at least 1 and an address")),
            }
        }
        shape.reverse();
        let kind = self.u32("type")?;
        let offset = self.u64("offset")?;
        let Some((elements, size)) = block_of(kind) else {
            let reason = format!(
                "tensor {}: type {}, expected f32, f16, bf16, q8_0, q6_k, q5_k, q4_k, q4_1 or q4_0",
                show(&name),
                type_name(kind)
            );
            return Err(Error::unsupported(self.file, reason));
        };
        let row = shape[shape.len() - 1];
        if !row.is_multiple_of(elements) {
            return bad(
                self,
                format!("rows of {row} numbers are no whole blocks of {elements} ({})", type_name(kind)),
            );
        }
        let count = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        let Some(bytes) = count.and_then(|n| (n / elements).checked_mul(size)) else {
            return bad(self, format!("shape {shape:?} overflows"));
        };
        Ok((Info { name, shape, kind, span: 0..bytes }, offset))
    }

    /// Turns offsets into ranges of the file: aligned, inside, neither overlapping nor with holes.
    fn place(&self, mut raw: Vec<(Info, u64)>, alignment: usize) -> Result<Vec<Info>> {
        let padded = |n: usize| n.checked_next_multiple_of(alignment);
        let start = padded(self.at).unwrap_or(usize::MAX);
        let have = self.bytes.len().saturating_sub(start);
        let mut order: Vec<usize> = (0..raw.len()).collect();
        order.sort_by_key(|&i| raw[i].1);
        let mut end = 0usize;
        for &i in &order {
            let (info, offset) = &mut raw[i];
            let bad = |what: String| Err(self.wrong(format!("tensor {}: {what}", show(&info.name))));
            let (size, expected) = (info.span.len(), padded(end));
            let Some(from) = usize::try_from(*offset).ok().filter(|o| o.is_multiple_of(alignment)) else {
                return bad(format!("offset {offset}, expected a multiple of {alignment}"));
            };
            if Some(from) != expected {
                let what = if from < end { "overlaps" } else { "leaves a hole" };
                return bad(format!("offset {from} {what}: the previous tensor ends at {end}"));
            }
            match from.checked_add(size) {
                Some(to) if to <= have => {
                    info.span = start + from..start + to;
                    end = to;
                }
                _ => return bad(format!("truncated: {size} bytes at {from} of {have}")),
            }
        }
        if padded(end).is_none_or(|most| have > most) {
            return Err(self.wrong(format!("{} bytes after the last tensor", have - end)));
        }
        Ok(raw.into_iter().map(|(info, _)| info).collect())
    }

    fn value(&mut self, key: &str) -> Result<Value> {
        let kind = self.u32("value type")?;
        Ok(match kind {
            U32_VALUE => Value::U32(self.u32(key)?),
            F32_VALUE => Value::F32(f32::from_bits(self.u32(key)?)),
            STRING => Value::Text(self.string(key)?),
            ARRAY => self.array(key, 0)?,
            _ => {
                let size = self.size_of(kind, key)?;
                self.take(size as u64, key)?;
                Value::Other(kind)
            }
        })
    }

    /// Walks over an array.
    fn array(&mut self, key: &str, depth: usize) -> Result<Value> {
        if depth == MAX_DEPTH {
            return Err(self.wrong(format!("key {}: arrays nested deeper than {MAX_DEPTH}", show(key))));
        }
        let item = self.u32("item type")?;
        let count = self.u64("item count")?;
        let from = match item {
            STRING | ARRAY => {
                self.check_count(count, if item == STRING { 8 } else { 12 }, key)?;
                let from = self.at;
                for _ in 0..count {
                    if item == ARRAY {
                        self.array(key, depth + 1)?;
                    } else {
                        let len = self.u64(key)?;
                        self.take(len, key)?;
                    }
                }
                from
            }
            _ => {
                let size = self.size_of(item, key)? as u64;
                let from = self.at;
                self.take(count.saturating_mul(size), key)?;
                from
            }
        };
        Ok(Value::Array { item, count, span: from..self.at })
    }

    fn size_of(&self, kind: u32, key: &str) -> Result<usize> {
        match VALUES.get(kind as usize) {
            Some(&(_, size)) if size > 0 => Ok(size),
            _ => Err(self.wrong(format!("key {}: value type {kind}, expected 0 to 12", show(key)))),
        }
    }

    fn string(&mut self, what: &str) -> Result<String> {
        let len = self.u64(what)?;
        let at = self.at;
        let bytes = self.take(len, what)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(e) => Err(self.wrong(format!("{} at byte {at} is not UTF-8: {e}", show(what)))),
        }
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        let b = self.take(4, what)?;
        Ok(u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        let b = self.take(8, what)?;
        Ok(u64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]))
    }

    /// The next `n` bytes, if the file has them and the limit permits.
    fn take(&mut self, n: u64, what: &str) -> Result<&'a [u8]> {
        let left = (self.bytes.len() - self.at) as u64;
        if n > left {
            let reason =
                format!("truncated: {} at byte {} needs {n} bytes, {left} are left", show(what), self.at);
            return Err(self.wrong(reason));
        }
        let end = self.at + n as usize;
        self.limits.check_header(end as u64, self.file)?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    /// Refuses a count of entries that cannot fit in what is left.
    fn check_count(&self, count: u64, least: u64, what: &str) -> Result<()> {
        let left = (self.bytes.len() - self.at) as u64;
        if count > left / least {
            let reason = format!("{}: {count} entries do not fit in the {left} bytes left", show(what));
            return Err(self.wrong(reason));
        }
        Ok(())
    }

    fn wrong(&self, reason: impl Into<String>) -> Error {
        Error::format(self.file, reason)
    }
}

/// A value to write.
pub(crate) enum Put<'a> {
    U32(u32),
    F32(f32),
    Text(&'a str),
    U32s(&'a [u32]),
}

/// A tensor to write.
pub(crate) struct PutTensor {
    pub name: String,
    /// Outermost first.
    pub shape: Vec<usize>,
    pub kind: u32,
    pub data: crate::format::Bytes,
}

/// Everything before the data, padded to where the data starts.
pub(crate) fn header(keys: &[(&str, Put)], tensors: &[PutTensor]) -> Vec<u8> {
    let mut out = Vec::new();
    let text = |out: &mut Vec<u8>, s: &str| {
        out.extend((s.len() as u64).to_le_bytes());
        out.extend(s.as_bytes());
    };
    out.extend(MAGIC);
    out.extend(VERSION.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((keys.len() as u64).to_le_bytes());
    for (key, value) in keys {
        text(&mut out, key);
        match value {
            Put::U32(v) => {
                out.extend(U32_VALUE.to_le_bytes());
                out.extend(v.to_le_bytes());
            }
            Put::F32(v) => {
                out.extend(F32_VALUE.to_le_bytes());
                out.extend(v.to_le_bytes());
            }
            Put::Text(v) => {
                out.extend(STRING.to_le_bytes());
                text(&mut out, v);
            }
            Put::U32s(v) => {
                out.extend(ARRAY.to_le_bytes());
                out.extend(U32_VALUE.to_le_bytes());
                out.extend((v.len() as u64).to_le_bytes());
                out.extend(v.iter().flat_map(|n| n.to_le_bytes()));
            }
        }
    }
    let mut offset = 0usize;
    for t in tensors {
        text(&mut out, &t.name);
        out.extend((t.shape.len() as u32).to_le_bytes());
        out.extend(t.shape.iter().rev().flat_map(|&d| (d as u64).to_le_bytes()));
        out.extend(t.kind.to_le_bytes());
        out.extend((offset as u64).to_le_bytes());
        offset += t.data.len().next_multiple_of(ALIGNMENT);
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
    out
}
