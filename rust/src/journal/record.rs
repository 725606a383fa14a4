//! How records and the heads of segments lie in a file, and what can be wrong with them.
//!
//! A segment is its head, then records, each a multiple of 8 bytes; zeros after the last one. Little-endian:
//!
//! ```text
//! record                                          head of a segment
//!  0  u32  bytes of payload  } one word,           0  u64  magic, written last
//!  4  u32  "mlR1"            } written last        8  u32  format   12 u32 bytes of the head
//!  8  u64  id                                     16  u32  CRC-32 of 0..16 and 24..   20 u32 zero
//! 16  u64  microseconds since 1970                24  u64  number of the segment      32 u64 its full length
//! 24  u32  kind                                   40  u64  first segment that replay needs
//! 28  u32  CRC-32 of 0..28 and the payload        48  u64  id that the saved state ends with
//! 32  payload, zeros up to a multiple of 8        56  [u8; 32] identity of that state
//!                                                 88  u32 bytes of build, u32 bytes of isa, both, zeros
//! ```
//!
//! Bytes 0 to 20 of a head mean the same in every format, so that a newer one is told from damage.

use crate::error::{Error, Result};

/// Version of the layout.
pub const FORMAT: u32 = 1;

pub(super) const MAGIC: u64 = u64::from_le_bytes(*b"mlJournl");
const TAG: u64 = (u32::from_le_bytes(*b"mlR1") as u64) << 32;
pub(super) const HEAD: usize = 32;
const FIXED: usize = 96;
const MAX_TEXT: usize = 256;
/// Kind of the record that ends a segment which others follow.
pub(super) const SEAL: u8 = 0;

/// Who wrote a segment, and the saved state that it continues.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Version of the layout, [`FORMAT`].
    pub format: u32,
    /// Version of the crate.
    pub build: String,
    /// Instruction set of the kernels.
    pub isa: String,
    /// Identity (a SHA-256, say) of the saved state that the records continue; zeros where there is none.
    pub state: [u8; 32],
}

impl Header {
    /// A header of this build.
    pub fn new(isa: &str, state: [u8; 32]) -> Self {
        Header { format: FORMAT, build: env!("CARGO_PKG_VERSION").into(), isa: isa.into(), state }
    }

    pub(super) fn check(&self) -> Result<()> {
        if self.format != FORMAT {
            return Err(Error::config("header.format", self.format, FORMAT));
        }
        for (name, text) in [("header.build", &self.build), ("header.isa", &self.isa)] {
            if text.len() > MAX_TEXT {
                let got = format!("{} bytes", text.len());
                return Err(Error::config(name, got, format!("at most {MAX_TEXT} bytes")));
            }
        }
        Ok(())
    }
}

/// Everything that the head of a segment says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub header: Header,
    pub segment: u64,
    pub capacity: u64,
    pub needed: u64,
    pub checkpoint: u64,
}

/// What is wrong, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub offset: usize,
    pub reason: String,
}

fn fault<T>(offset: usize, reason: impl Into<String>) -> Result<T, Fault> {
    Err(Fault { offset, reason: reason.into() })
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// Why a head cannot be read.
pub(super) enum BadHead {
    /// Nothing was ever written: a segment that was made in advance.
    Unused,
    /// Sound, and of a later format than this build reads.
    Newer(u32),
    /// Anything else.
    Damaged(Fault),
}

impl Head {
    /// The head's bytes, the magic among them.
    pub fn encode(&self) -> Vec<u8> {
        let texts = [self.header.build.as_bytes(), self.header.isa.as_bytes()];
        let len = (FIXED + texts[0].len() + texts[1].len()).next_multiple_of(8);
        let mut out = Vec::with_capacity(len);
        out.extend(MAGIC.to_le_bytes());
        for v in [self.header.format, len as u32, 0, 0] {
            out.extend(v.to_le_bytes());
        }
        for v in [self.segment, self.capacity, self.needed, self.checkpoint] {
            out.extend(v.to_le_bytes());
        }
        out.extend(self.header.state);
        out.extend(texts.map(|t| (t.len() as u32).to_le_bytes()).concat());
        out.extend(texts.concat());
        out.resize(len, 0);
        let crc = Self::crc(&out);
        out[16..20].copy_from_slice(&crc.to_le_bytes());
        out
    }

    fn crc(bytes: &[u8]) -> u32 {
        let mut hash = crc32fast::Hasher::new();
        hash.update(&bytes[..16]);
        hash.update(&bytes[24..]);
        hash.finalize()
    }

    /// Reads a head and its length. Only the first bytes of the file are looked at.
    pub fn decode(bytes: &[u8]) -> Result<(Head, usize), BadHead> {
        let damaged = |offset, reason: &str| Err(BadHead::Damaged(Fault { offset, reason: reason.into() }));
        if bytes.iter().all(|&b| b == 0) {
            return Err(BadHead::Unused);
        }
        if bytes.len() < FIXED {
            return damaged(bytes.len(), "cut off in the head of the segment");
        }
        if u64_at(bytes, 0) != MAGIC {
            return damaged(0, "no head of a segment begins here");
        }
        let len = u32_at(bytes, 12) as usize;
        if len < 24 || len > bytes.len() || !len.is_multiple_of(8) {
            return damaged(12, &format!("a head of {len} bytes in {} bytes of file", bytes.len()));
        }
        let head = &bytes[..len];
        if Self::crc(head) != u32_at(head, 16) {
            return damaged(0, "checksum of the head of the segment");
        }
        let format = u32_at(head, 8);
        if format > FORMAT {
            return Err(BadHead::Newer(format));
        }
        let texts = (len.max(FIXED) == len).then(|| (u32_at(head, 88) as usize, u32_at(head, 92) as usize));
        let Some((build, isa)) = texts.filter(|(b, i)| {
            format == FORMAT
                && b.saturating_add(*i) <= len - FIXED
                && b.max(i) <= &MAX_TEXT
                && u32_at(head, 20) == 0
        }) else {
            return damaged(8, "fields of the head of the segment");
        };
        let text = |range: std::ops::Range<usize>| String::from_utf8_lossy(&head[range]).into_owned();
        let header = Header {
            format,
            build: text(FIXED..FIXED + build),
            isa: text(FIXED + build..FIXED + build + isa),
            state: head[56..88].try_into().expect("32 bytes"),
        };
        let at = |at| u64_at(head, at);
        let head = Head { header, segment: at(24), capacity: at(32), needed: at(40), checkpoint: at(48) };
        Ok((head, len))
    }
}

/// Bytes of a record whose payload has `len`.
pub(super) const fn size(len: usize) -> usize {
    HEAD + len.next_multiple_of(8)
}

/// The word that makes a record valid.
pub(super) const fn word(len: usize) -> u64 {
    TAG | len as u64
}

/// All of a record's head but its word and its checksum: `(0..28)` with the word, for the checksum.
pub(super) fn head(len: usize, kind: u8, id: u64, timestamp_us: u64) -> [u8; 28] {
    let mut out = [0; 28];
    out[..8].copy_from_slice(&word(len).to_le_bytes());
    out[8..16].copy_from_slice(&id.to_le_bytes());
    out[16..24].copy_from_slice(&timestamp_us.to_le_bytes());
    out[24..].copy_from_slice(&u32::from(kind).to_le_bytes());
    out
}

/// Checksum of a record.
pub(super) fn checksum(head: &[u8], payload: &[u8]) -> u32 {
    let mut hash = crc32fast::Hasher::new();
    hash.update(&head[..28]);
    hash.update(payload);
    hash.finalize()
}

/// A whole record in a buffer of its own, for files that are written and not mapped.
pub(super) fn write(out: &mut Vec<u8>, kind: u8, id: u64, timestamp_us: u64, payload: &[u8]) {
    let start = out.len();
    let head = head(payload.len(), kind, id, timestamp_us);
    out.extend(head);
    out.extend(checksum(&head, payload).to_le_bytes());
    out.extend(payload);
    out.resize(start + size(payload.len()), 0);
}

/// One record where it lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Found<'a> {
    pub kind: u8,
    pub id: u64,
    pub timestamp_us: u64,
    pub payload: &'a [u8],
    /// Offset of what follows.
    pub end: usize,
}

/// The record at `at`. `None`: zeros from here on, or nothing.
pub(super) fn next(bytes: &[u8], at: usize) -> Result<Option<Found<'_>>, Fault> {
    let rest = &bytes[at..];
    let blank = || rest.iter().all(|&b| b == 0);
    if rest.len() < HEAD {
        let reason = || format!("a record cut off after {} bytes", rest.len());
        return if blank() { Ok(None) } else { fault(at, reason()) };
    }
    let word = u64_at(rest, 0);
    if word == 0 {
        return if blank() { Ok(None) } else { fault(at, "a record that was not finished") };
    }
    if word & !0xffff_ffff != TAG {
        return fault(at, "no record begins here");
    }
    let len = (word & 0xffff_ffff) as usize;
    if size(len) > rest.len() {
        let reason =
            format!("a record cut off: its length says {} bytes, {} are there", size(len), rest.len());
        return fault(at, reason);
    }
    let payload = &rest[HEAD..HEAD + len];
    let kind = u32_at(rest, 24);
    if checksum(rest, payload) != u32_at(rest, 28) || kind > 255 {
        return fault(at, "a record whose checksum is wrong");
    }
    if rest[HEAD + len..size(len)].iter().any(|&b| b != 0) {
        return fault(at, "a record whose padding is not zero");
    }
    let end = at + size(len);
    let kind = kind as u8;
    Ok(Some(Found { kind, id: u64_at(rest, 8), timestamp_us: u64_at(rest, 16), payload, end }))
}

/// What a segment's bytes hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Scan {
    /// Offset after the last good record (the seal among them).
    pub end: usize,
    pub records: u64,
    /// Largest id so far; a seal keeps that of records which are gone.
    pub max_id: u64,
    pub last_us: u64,
    pub sealed: bool,
    pub fault: Option<Fault>,
}

/// Walks the records that begin at `start`, up to the first that is not sound.
pub(super) fn scan(bytes: &[u8], start: usize) -> Scan {
    let mut s = Scan { end: start, ..Scan::default() };
    loop {
        match next(bytes, s.end) {
            Ok(Some(_)) if s.sealed => {
                s.fault = Some(Fault { offset: s.end, reason: "a record after the end of a segment".into() });
                return s;
            }
            Ok(Some(r)) => {
                s.end = r.end;
                s.max_id = s.max_id.max(r.id);
                s.last_us = s.last_us.max(r.timestamp_us);
                s.sealed = r.kind == SEAL;
                s.records += u64::from(!s.sealed);
            }
            Ok(None) => return s,
            Err(fault) => {
                s.fault = Some(fault);
                return s;
            }
        }
    }
}
