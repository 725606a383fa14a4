//! The side-car: what unfusing needs, in one safetensors file.
//!
//! Tensors: `adapter` (the adapter's single file, as bytes) and `residual.<i>` for the i-th record. Header:
//! `format`, `format_version`, `adapter_sha256`, `records` (JSON) and `digest`, SHA-256 over all of these.
//! The header's size is reserved first and filled in last, so residuals are written as they come.

use std::collections::BTreeMap;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::block::sha256;
use super::residual;
use crate::adapter::Adapter;
use crate::error::{Error, Result};
use crate::format::atomic::{Growing, Staged};
use crate::format::json::{self, show};
use crate::format::shards::Shard;

const FORMAT: &str = "microlora.fuse";
const FORMAT_VERSION: u32 = 1;
const ADAPTER: &str = "adapter";

/// What the side-car says of one tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Record {
    pub tensor: String,
    pub module: String,
    pub dtype: String,
    pub shape: Vec<usize>,
    pub layout: String,
    /// Rows of a residual block.
    pub block_rows: usize,
    pub lossy: usize,
    /// SHA-256 of the original tensor's bytes.
    pub original_sha256: String,
    /// SHA-256 of the fused tensor's bytes.
    pub fused_sha256: String,
}

impl Record {
    /// As long as a record of this tensor can get.
    fn longest(&self) -> Record {
        let hash = "0".repeat(64);
        Record {
            block_rows: usize::MAX,
            lossy: usize::MAX,
            original_sha256: hash.clone(),
            fused_sha256: hash,
            ..self.clone()
        }
    }
}

fn residual_name(i: usize) -> String {
    format!("residual.{i}")
}

/// Length field and header, padded to `room` bytes where one is given.
fn head(adapter: (usize, &str), records: &[(Record, usize)], room: Option<usize>) -> Result<Vec<u8>> {
    let wrong = |e: serde_json::Error| Error::format("sidecar", e.to_string());
    let list: Vec<&Record> = records.iter().map(|(r, _)| r).collect();
    let list = serde_json::to_string(&list).map_err(wrong)?;
    let mut object = serde_json::Map::new();
    let metadata = serde_json::json!({
        "format": FORMAT,
        "format_version": FORMAT_VERSION.to_string(),
        "adapter_sha256": adapter.1,
        "digest": digest(adapter.1, &list),
        "records": list,
    });
    object.insert("__metadata__".into(), metadata);
    let mut at = 0usize;
    let sizes = records.iter().enumerate().map(|(i, (_, bytes))| (residual_name(i), *bytes));
    for (name, bytes) in std::iter::once((ADAPTER.to_owned(), adapter.0)).chain(sizes) {
        let end = at.saturating_add(bytes);
        let entry = serde_json::json!({"dtype": "U8", "shape": [bytes], "data_offsets": [at, end]});
        object.insert(name, entry);
        at = end;
    }
    let mut text = serde_json::to_string(&object).map_err(wrong)?;
    let want = room.map_or(text.len().next_multiple_of(8), |room| room - 8);
    text.extend(std::iter::repeat_n(' ', want - text.len()));
    let mut out = (text.len() as u64).to_le_bytes().to_vec();
    out.extend_from_slice(text.as_bytes());
    Ok(out)
}

fn digest(adapter_sha256: &str, records: &str) -> String {
    sha256(format!("{FORMAT}\n{FORMAT_VERSION}\n{adapter_sha256}\n{records}").as_bytes())
}

/// A side-car that is being written. Dropped: deleted.
pub(super) struct Writer {
    growing: Growing,
    room: usize,
    adapter: (usize, String),
    records: Vec<(Record, usize)>,
    pending: usize,
    bytes: usize,
}

impl Writer {
    /// Reserves room for the header and writes the adapter. `planned` are the records to come, in order.
    pub fn new(path: &Path, adapter: &Adapter, planned: &[Record]) -> Result<Self> {
        let bytes = crate::format::to_bytes(&adapter.to_parts())?;
        let longest: Vec<(Record, usize)> = planned.iter().map(|r| (r.longest(), usize::MAX)).collect();
        let hash = sha256(&bytes);
        let room = head((bytes.len(), &hash), &longest, None)?.len();
        let growing = Growing::new(path)?;
        growing.write(&vec![0; room])?;
        growing.write(&bytes)?;
        let all = room + bytes.len();
        Ok(Writer {
            growing,
            room,
            adapter: (bytes.len(), hash),
            records: Vec::new(),
            pending: 0,
            bytes: all,
        })
    }

    /// Bytes and SHA-256 of the adapter.
    pub fn adapter(&self) -> (usize, &str) {
        (self.adapter.0, &self.adapter.1)
    }

    /// Appends residual blocks of the current tensor.
    pub fn write(&mut self, blocks: &mut Vec<u8>) -> Result<()> {
        self.growing.write(blocks)?;
        self.pending += blocks.len();
        blocks.clear();
        Ok(())
    }

    /// Ends the current tensor; returns the bytes of its residual.
    pub fn end(&mut self, record: Record) -> usize {
        let bytes = std::mem::take(&mut self.pending);
        self.bytes += bytes;
        self.records.push((record, bytes));
        bytes
    }

    /// Writes the header; returns the file, synced, and its size.
    pub fn finish(self) -> Result<(Staged, usize)> {
        let head = head((self.adapter.0, &self.adapter.1), &self.records, Some(self.room))?;
        let mut file = self.growing.file();
        let start = file.seek(SeekFrom::Start(0)).and_then(|_| file.write_all(&head));
        start.map_err(|e| Error::io("sidecar", e))?;
        Ok((self.growing.finish()?, self.bytes))
    }
}

/// A side-car, read and checked.
pub(super) struct Sidecar {
    shard: Shard,
    pub adapter: Adapter,
    pub adapter_bytes: usize,
    pub adapter_sha256: String,
    pub records: Vec<Record>,
    /// Span of each record's residual.
    spans: Vec<std::ops::Range<usize>>,
}

impl Sidecar {
    pub fn open(path: &Path) -> Result<Self> {
        let shard = Shard::open(path)?;
        let file = shard.display();
        let wrong = |reason: String| Error::format(&file, reason);
        let mut header: BTreeMap<String, String> = shard.metadata.clone();
        if header.remove("format").as_deref() != Some(FORMAT) {
            return Err(wrong("safetensors, but no side-car of microlora.fuse".into()));
        }
        match header.remove("format_version").and_then(|v| v.parse::<u32>().ok()) {
            Some(FORMAT_VERSION) => {}
            Some(n) if n > FORMAT_VERSION => {
                let reason = format!("side-car version {n}, this build reads up to {FORMAT_VERSION}");
                return Err(Error::unsupported(&file, format!("{reason}; upgrade microlora")));
            }
            _ => return Err(wrong(format!("header: format_version, expected {FORMAT_VERSION}"))),
        }
        let mut take = |key: &str| header.remove(key).ok_or_else(|| wrong(format!("header: no `{key}`")));
        let (adapter_sha256, said, text) = (take("adapter_sha256")?, take("digest")?, take("records")?);
        if digest(&adapter_sha256, &text) != said {
            return Err(wrong("its header was changed: the digest does not fit".into()));
        }
        let most = shard.entries.len();
        let records: Vec<Record> =
            json::parse_list(&text, most).map_err(|e| wrong(format!("header: records: {e}")))?;
        let spans = spans(&shard, records.len())?;
        let bytes = {
            let span = spans[0].clone();
            let mut bytes = Vec::new();
            bytes
                .try_reserve_exact(span.len())
                .map_err(|_| wrong("the adapter does not fit in memory".into()))?;
            bytes.resize(span.len(), 0);
            shard.read(span.start, &mut bytes)?;
            bytes
        };
        if sha256(&bytes) != adapter_sha256 {
            return Err(wrong("its adapter was changed: SHA-256 does not fit".into()));
        }
        let parts = crate::format::from_bytes(&bytes, true)?.parts;
        let adapter = Adapter::from_parts(&parts)?;
        let spans = spans[1..].to_vec();
        Ok(Sidecar { shard, adapter, adapter_bytes: bytes.len(), adapter_sha256, records, spans })
    }

    /// Bytes of the file.
    pub fn len(&self) -> usize {
        self.shard.len
    }

    /// The name that errors carry.
    pub fn display(&self) -> String {
        self.shard.display()
    }

    /// The residual blocks of a record, one after another.
    pub fn residual(&self, record: usize) -> Residual<'_> {
        let span = self.spans[record].clone();
        Residual { shard: &self.shard, at: span.start, end: span.end }
    }
}

/// Spans of the adapter and of every residual, checked to be all there is.
fn spans(shard: &Shard, records: usize) -> Result<Vec<std::ops::Range<usize>>> {
    let mut by_name: BTreeMap<&str, _> = shard.entries.iter().map(|e| (e.name.as_str(), e)).collect();
    let missing = |name: &str| Error::format(shard.display(), format!("no tensor {}", show(name)));
    let spans = std::iter::once(ADAPTER.to_owned())
        .chain((0..records).map(residual_name))
        .map(|name| by_name.remove(name.as_str()).map(|e| e.span.clone()).ok_or_else(|| missing(&name)));
    let spans: Vec<_> = spans.collect::<Result<_>>()?;
    let other: Vec<&str> = by_name.into_keys().collect();
    match other.is_empty() {
        true => Ok(spans),
        false => Err(Error::format(shard.display(), format!("unknown tensors {}", json::show_list(&other)))),
    }
}

/// Reads residual blocks in order.
pub(super) struct Residual<'a> {
    shard: &'a Shard,
    at: usize,
    end: usize,
}

impl Residual<'_> {
    /// Bytes left.
    pub fn left(&self) -> usize {
        self.end - self.at
    }

    /// The next block's kind; its payload goes to `out`.
    pub fn next(&mut self, block_bytes: usize, out: &mut Vec<u8>) -> Result<u8> {
        let wrong = |reason: &str| Error::format(self.shard.display(), reason);
        let mut lead = [0; residual::LEAD];
        let lead = &mut lead[..residual::LEAD.min(self.left())];
        self.shard.read(self.at, lead)?;
        let (kind, len, used) = residual::lead(lead, block_bytes).map_err(wrong)?;
        if len > self.left() - used {
            return Err(wrong("the residual ends too early"));
        }
        out.resize(len, 0);
        self.shard.read(self.at + used, out)?;
        self.at += used + len;
        Ok(kind)
    }
}
