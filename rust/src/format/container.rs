//! The safetensors container: eight bytes of header length, a JSON header, the tensors without a gap.
//!
//! Beyond what the `safetensors` crate checks, this reader bounds tensor and dimension counts, refuses
//! repeated keys and unknown fields, and names the tensor that is wrong; the writer is deterministic.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::io::{self, Write};
use std::ops::Range;
use std::path::Path;
use std::thread;

use serde::de::{self, Deserialize, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize as DeriveDeserialize, Serialize};

use super::atomic::Staged;
use super::budget::{Budget, longest_token, tensor_cost};
use super::fingerprint::{Digests, UNKNOWN};
use super::json::{StringMap, show};
use super::limits::Limits;
use super::tensor::{Bytes, Tensor, TensorDtype, byte_len};
use super::unread_head;
use crate::error::{Error, Result};

/// Longest header that is parsed, in bytes (the limit of the reference implementation).
pub const MAX_HEADER: usize = 100_000_000;
/// Most tensors in one file, unless the caller's limits say otherwise.
pub const MAX_TENSORS: usize = 1 << 20;
/// Most dimensions of one tensor.
pub const MAX_DIMS: usize = 16;
const LEN: usize = 8;
const METADATA: &str = "__metadata__";
/// Headers up to this length need no look at their longest token.
const SHORT: usize = 1 << 20;
/// Bytes from which hashing takes longer than a thread takes to start, many times over.
const LARGE: usize = 8 << 20;

/// What a file holds.
#[derive(Debug, Default)]
pub(crate) struct Container {
    pub metadata: BTreeMap<String, String>,
    /// In the order of their bytes.
    pub tensors: Vec<Tensor>,
}

#[derive(DeriveDeserialize)]
#[serde(deny_unknown_fields)]
struct Info {
    dtype: TensorDtype,
    shape: Shape,
    data_offsets: (usize, usize),
}

struct Shape(Vec<usize>);

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = Shape;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a shape of at most {MAX_DIMS} dimensions")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Shape, A::Error> {
                let mut dims = Vec::new();
                while let Some(dim) = seq.next_element::<usize>()? {
                    if dims.len() == MAX_DIMS {
                        return Err(de::Error::invalid_length(dims.len() + 1, &self));
                    }
                    dims.push(dim);
                }
                Ok(Shape(dims))
            }
        }
        d.deserialize_seq(V)
    }
}

#[derive(Default)]
struct Header {
    metadata: BTreeMap<String, String>,
    tensors: Vec<(String, Info)>,
}

/// What an entry of `__metadata__` takes beside its two texts.
const ENTRY_COST: usize = 160;

/// Reads a header within limits.
struct HeaderWithin<'a> {
    tensors: usize,
    budget: &'a mut Budget,
}

impl<'de> DeserializeSeed<'de> for HeaderWithin<'_> {
    type Value = Header;

    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<Header, D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for HeaderWithin<'_> {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
        let mut header = Header::default();
        let mut seen_metadata = false;
        while let Some(name) = map.next_key::<String>()? {
            let at = |e: A::Error| de::Error::custom(format_args!("{}: {e}", show(&name)));
            if name == METADATA {
                if seen_metadata {
                    return Err(de::Error::custom(format_args!("{} appears twice", show(&name))));
                }
                seen_metadata = true;
                header.metadata = map.next_value::<Option<StringMap>>().map_err(at)?.unwrap_or_default().0;
                let cost = |(k, v): (&String, &String)| ENTRY_COST + 2 * (k.len() + v.len());
                self.budget
                    .take(header.metadata.iter().map(cost).sum())
                    .map_err(<A::Error as de::Error>::custom)?;
                continue;
            }
            if header.tensors.len() == self.tensors {
                let most = self.tensors;
                let reason =
                    format!("tensor count of {} or more, the limit is {most} (limits: tensors)", most + 1);
                return Err(de::Error::custom(reason));
            }
            self.budget.take(tensor_cost(&name)).map_err(|e| {
                de::Error::custom(format_args!("more than {} tensors {e}", header.tensors.len()))
            })?;
            let info = map.next_value().map_err(at)?;
            header.tensors.push((name, info));
        }
        Ok(header)
    }
}

/// True when `head` (the first bytes of a file) can be the start of a safetensors file.
pub(crate) fn looks_like(head: &[u8]) -> bool {
    matches!(header_len(head), Some(n) if n <= MAX_HEADER as u64) && head.get(LEN) == Some(&b'{')
}

fn header_len(bytes: &[u8]) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(..LEN)?.try_into().ok()?))
}

/// One tensor of a header: where its bytes lie in the file.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub name: String,
    pub dtype: TensorDtype,
    pub shape: Vec<usize>,
    /// From the start of the file.
    pub span: Range<usize>,
}

/// A header, checked against the length of its file.
#[derive(Debug, Default)]
pub(crate) struct Heading {
    pub metadata: BTreeMap<String, String>,
    /// In the order of their bytes, without a gap up to the end of the file.
    pub entries: Vec<Entry>,
}

/// Bytes of length field and header together, from the first bytes of a file of `len` bytes.
pub(crate) fn heading_len(head: &[u8], len: usize, file: &str) -> Result<usize> {
    let wrong = |reason: String| Error::format(file, reason);
    let Some(n) = header_len(head) else {
        return Err(wrong(format!("{len} bytes, a safetensors file has at least {LEN}")));
    };
    if n > MAX_HEADER as u64 {
        return Err(wrong(format!("header of {n} bytes, the limit is {MAX_HEADER}")));
    }
    if len - LEN < n as usize {
        return Err(wrong(format!("truncated: header of {n} bytes in a file of {len} bytes")));
    }
    Ok(LEN + n as usize)
}

/// Parses what [`heading_len`] measured; `len` is that of the whole file.
pub(crate) fn parse_heading(head: &[u8], len: usize, file: &str) -> Result<Heading> {
    parse_heading_within(head, len, file, MAX_TENSORS)
}

fn parse_heading_within(head: &[u8], len: usize, file: &str, most: usize) -> Result<Heading> {
    let wrong = |reason: String| Error::format(file, reason);
    let (start, header) = (head.len(), &head[LEN..]);
    let text = std::str::from_utf8(header).map_err(|e| wrong(format!("header is not UTF-8: {e}")))?;
    if !text.starts_with('{') {
        return Err(wrong("header does not start with '{'".into()));
    }
    let mut budget = Budget::of_file(len);
    // A parser copies a token twice while it grows.
    if text.len() > SHORT {
        let longest = longest_token(text);
        let bound = |e: String| wrong(format!("header: a string or number of {longest} bytes {e}"));
        budget.take(3 * longest).map_err(bound)?;
        budget.give(3 * longest);
    }
    let mut json = serde_json::Deserializer::from_str(text);
    let seed = HeaderWithin { tensors: most, budget: &mut budget };
    let parsed = seed.deserialize(&mut json).and_then(|header| json.end().map(|()| header));
    drop(json);
    let Header { metadata, tensors: mut infos } = parsed.map_err(|e| wrong(format!("header: {e}")))?;
    refuse_repeated(&infos, file)?;
    infos.sort_by_key(|(_, info)| info.data_offsets);

    let have = len - start;
    let mut end = 0;
    let mut entries = Vec::with_capacity(infos.len());
    for (name, Info { dtype, shape: Shape(shape), data_offsets: (from, to) }) in infos {
        let bad = |what: String| wrong(format!("tensor {}: {what}", show(&name)));
        let size =
            byte_len(dtype, &shape).ok_or_else(|| bad(format!("shape {shape:?} of {dtype} overflows")))?;
        if from != end {
            let what = if from > end { "leaves a hole" } else { "overlaps" };
            return Err(bad(format!("offsets [{from}, {to}] {what}: the previous tensor ends at {end}")));
        }
        if to.checked_sub(from) != Some(size) {
            return Err(bad(format!("offsets [{from}, {to}], but {dtype} {shape:?} takes {size} bytes")));
        }
        if to > have {
            return Err(bad(format!("truncated: ends at byte {to} of {have}")));
        }
        end = to;
        entries.push(Entry { name, dtype, shape, span: start + from..start + to });
    }
    if end != have {
        return Err(wrong(format!("{have} bytes of data, the tensors cover {end}")));
    }
    Ok(Heading { metadata, entries })
}

fn refuse_repeated(infos: &[(String, Info)], file: &str) -> Result<()> {
    let mut seen = HashSet::with_capacity(infos.len());
    match infos.iter().find(|(name, _)| !seen.insert(name.as_str())) {
        Some((name, _)) => Err(Error::format(file, format!("header: {} appears twice", show(name)))),
        None => Ok(()),
    }
}

/// Parses a whole file; tensors are slices of `bytes`. `file` is the name errors carry.
pub(crate) fn parse(bytes: &Bytes, file: &str) -> Result<Container> {
    parse_within(bytes, file, &Limits::default())
}

/// [`parse`] with limits of the caller's.
pub(crate) fn parse_within(bytes: &Bytes, file: &str, limits: &Limits) -> Result<Container> {
    let prefix = |n| bytes.prefix(n).map_err(|e| unread_head(e, file));
    let start = heading_len(&prefix(LEN)?, bytes.len(), file)?;
    limits.check_header((start - LEN) as u64, file)?;
    let Heading { metadata, entries } =
        parse_heading_within(&prefix(start)?, bytes.len(), file, limits.tensors)?;
    let tensor = |Entry { name, dtype, shape, span }| {
        let outside = || Error::format(file, format!("tensor {}: outside of the file", show(&name)));
        let data = bytes.slice(span).ok_or_else(outside)?;
        Ok(Tensor { name, dtype, shape, data })
    };
    Ok(Container { metadata, tensors: entries.into_iter().map(tensor).collect::<Result<_>>()? })
}

#[derive(Serialize)]
struct InfoOut<'a> {
    dtype: TensorDtype,
    shape: &'a [usize],
    data_offsets: (usize, usize),
}

/// A laid-out file: the header is ready, the data still lies in its tensors.
pub(crate) struct Layout<'a> {
    header: Vec<u8>,
    data: Vec<&'a Bytes>,
}

/// Lays tensors out as the reference implementation does: widest dtype first, then by name.
pub(crate) fn lay_out<'a>(
    metadata: &BTreeMap<String, String>,
    mut tensors: Vec<(String, &'a Tensor)>,
    file: &str,
) -> Result<Layout<'a>> {
    tensors.sort_by(|(a, s), (b, t)| t.dtype.cmp(&s.dtype).then_with(|| a.cmp(b)));
    let mut seen = HashSet::new();
    let mut end = 0usize;
    let mut data = Vec::with_capacity(tensors.len());
    let mut entries = String::new();
    for (name, tensor) in &tensors {
        if name == METADATA || !seen.insert(name.as_str()) {
            return Err(Error::config(
                "tensors",
                format!("{} twice", show(name)),
                "each name once in a file",
            ));
        }
        if tensor.shape.len() > MAX_DIMS {
            return Err(Error::shape(
                name,
                format!("{:?}", tensor.shape),
                format!("at most {MAX_DIMS} dimensions"),
            ));
        }
        tensor.check_len()?;
        let from = end;
        end =
            end.checked_add(tensor.data.len()).ok_or_else(|| Error::format(file, "too large to address"))?;
        let info = InfoOut { dtype: tensor.dtype, shape: &tensor.shape, data_offsets: (from, end) };
        let (name, info) = (to_json(name, file)?, to_json(&info, file)?);
        entries.push_str(&format!(",{name}:{info}"));
        data.push(&tensor.data);
    }
    let head = if metadata.is_empty() {
        String::new()
    } else {
        format!(",\"{METADATA}\":{}", to_json(metadata, file)?)
    };
    let body = format!("{head}{entries}");
    let mut text = format!("{{{}}}", body.strip_prefix(',').unwrap_or(&body));
    while text.len() % LEN != 0 {
        text.push(' ');
    }
    if text.len() > MAX_HEADER || tensors.len() > MAX_TENSORS {
        let reason =
            format!("{} tensors and a header of {} bytes pass the limits", tensors.len(), text.len());
        return Err(Error::format(file, reason));
    }
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.extend_from_slice(text.as_bytes());
    Ok(Layout { header, data })
}

fn to_json<T: Serialize + ?Sized>(value: &T, file: &str) -> Result<String> {
    serde_json::to_string(value).map_err(|e| Error::format(file, format!("header: {e}")))
}

impl Layout<'_> {
    /// Bytes of the whole file.
    pub fn len(&self) -> usize {
        self.header.len() + self.data.iter().map(|d| d.len()).sum::<usize>()
    }

    /// Writes the file under a temporary name beside `path`, with the fingerprint of its tensors in the place of
    /// [`UNKNOWN`] behind `key` in the header. A large file is hashed in a thread of its own while it is written.
    pub fn stage_named(
        &self,
        path: &Path,
        key: &str,
        fingerprint: impl FnOnce(&mut Digests) -> Result<String> + Send,
    ) -> Result<Staged> {
        // Quotes inside of texts are escaped, so that this stands at one place.
        let mark = format!("\"{key}\":\"{UNKNOWN}\"");
        let at = self.header.windows(mark.len()).position(|w| w == mark.as_bytes());
        let at = at.map(|at| (at + mark.len() - 1 - UNKNOWN.len()) as u64);
        let at = at.ok_or_else(|| Error::format(path.display(), "a header without a place for its hash"))?;
        let whole = |out: &mut dyn Write| self.write_to(out);
        if self.len() < LARGE {
            let text = fingerprint(&mut Digests::default())?;
            return Staged::patched(path, whole, at, false, || Ok(text));
        }
        thread::scope(|scope| {
            let hashing = scope.spawn(|| fingerprint(&mut Digests::default()));
            let lost = |_| Error::format(path.display(), "the thread that hashes it stopped");
            Staged::patched(path, whole, at, true, || hashing.join().map_err(lost)?)
        })
    }

    /// Writes header and data.
    pub fn write_to(&self, out: &mut dyn Write) -> io::Result<()> {
        out.write_all(&self.header)?;
        self.data.iter().try_for_each(|d| d.write_to(out))
    }
}
