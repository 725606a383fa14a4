//! Zip archives as `numpy.savez` writes them, read strictly: every size is checked against the file before
//! memory is taken, and no name leads anywhere.
//!
//! Members are stored or deflated, each once, without gaps of meaning: the central directory and the local
//! headers must agree, members must not overlap, and nothing is encrypted or spread over several disks.

use std::collections::HashSet;
use std::io::{self, Read, Write};

use flate2::read::DeflateDecoder;

use super::json::show;
use super::limits::Limits;
use super::tensor::Bytes;
use crate::error::{Error, Result};

/// The first bytes of a local header.
pub(super) const MAGIC: &[u8] = b"PK\x03\x04";
const CENTRAL: &[u8] = b"PK\x01\x02";
const END: &[u8] = b"PK\x05\x06";
const END64: &[u8] = b"PK\x06\x06";
const LOCATOR64: &[u8] = b"PK\x06\x07";
/// What deflated members may grow to, beside twice the file: training never compresses better.
const SLACK: u64 = 16 << 20;

/// One member of an archive.
pub(super) struct Member {
    pub name: String,
    method: u16,
    crc: u32,
    packed: usize,
    size: usize,
    /// Of its local header.
    at: usize,
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
    file: &'a str,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let end = self.at.checked_add(n).filter(|&end| end <= self.bytes.len());
        let end =
            end.ok_or_else(|| Error::format(self.file, format!("zip: truncated at byte {}", self.at)))?;
        let out = &self.bytes[self.at..end];
        self.at = end;
        Ok(out)
    }

    fn number(&mut self, n: usize) -> Result<u64> {
        let bytes = self.take(n)?;
        Ok(bytes.iter().rev().fold(0, |x, &b| x << 8 | u64::from(b)))
    }

    fn expect(&mut self, magic: &[u8]) -> Result<()> {
        let at = self.at;
        if self.take(magic.len())? == magic {
            return Ok(());
        }
        Err(Error::format(self.file, format!("zip: no record where one should be, at byte {at}")))
    }
}

/// The members of an archive, by their place in it.
pub(super) fn members(bytes: &[u8], limits: &Limits, file: &str) -> Result<Vec<Member>> {
    let wrong = |reason: String| Error::format(file, format!("zip: {reason}"));
    let (count, size, start, end) = directory(bytes, file)?;
    limits.check_tensors(count, file)?;
    limits.check_header(size, file)?;
    if start.checked_add(size) != Some(end) {
        return Err(wrong(format!("a directory of {size} bytes at {start}, expected to end at {end}")));
    }
    // Each member has a record there and a header before its data.
    if count.checked_mul(46 + 30 + 2).is_none_or(|n| n > bytes.len() as u64) {
        return Err(wrong(format!("{count} members in {} bytes", bytes.len())));
    }
    let mut cursor = Cursor { bytes: &bytes[..end as usize], at: start as usize, file };
    let mut out: Vec<Member> = (0..count).map(|_| entry(&mut cursor)).collect::<Result<_>>()?;
    let mut seen = HashSet::with_capacity(out.len());
    if let Some(twice) = out.iter().find(|m| !seen.insert(m.name.as_str())) {
        return Err(wrong(format!("member {} appears twice", show(&twice.name))));
    }
    if cursor.at as u64 != end {
        return Err(wrong(format!("a directory of more than its {count} members")));
    }
    out.sort_by_key(|m| m.at);
    for pair in out.windows(2) {
        // At the least its local header, its name and its data lie before the next one.
        let least = pair[0].at.saturating_add(30 + pair[0].name.len()).saturating_add(pair[0].packed);
        if least > pair[1].at {
            return Err(wrong(format!(
                "members {} and {} overlap",
                show(&pair[0].name),
                show(&pair[1].name)
            )));
        }
    }
    if let Some(last) = out.last()
        && (last.at.saturating_add(30 + last.name.len()).saturating_add(last.packed) as u64) > start
    {
        return Err(wrong(format!("member {} overlaps the directory", show(&last.name))));
    }
    let grown = out.iter().filter(|m| m.method != 0).try_fold(0u64, |n, m| n.checked_add(m.size as u64));
    let most = SLACK.saturating_add(2 * bytes.len() as u64).min(limits.total_bytes);
    if grown.is_none_or(|n| n > most) {
        let n = grown.unwrap_or(u64::MAX);
        return Err(wrong(format!(
            "deflated members of {n} bytes in a file of {}, the limit is {most}; save it with numpy.savez",
            bytes.len()
        )));
    }
    Ok(out)
}

/// Number of members, bytes and place of the central directory, and where it must end.
fn directory(bytes: &[u8], file: &str) -> Result<(u64, u64, u64, u64)> {
    let wrong = |reason: &str| Error::format(file, format!("zip: {reason}"));
    // The last record may have a comment of up to 65,535 bytes behind it.
    let from = bytes.len().saturating_sub(22 + 0xffff);
    let place = bytes[from..].windows(4).rposition(|w| w == END).map(|at| from + at);
    let at = place.ok_or_else(|| wrong("truncated: no end of the central directory"))?;
    let mut c = Cursor { bytes, at: at + 4, file };
    let (disk, first) = (c.number(2)?, c.number(2)?);
    let (here, count) = (c.number(2)?, c.number(2)?);
    let (size, start, comment) = (c.number(4)?, c.number(4)?, c.number(2)?);
    if c.at as u64 + comment != bytes.len() as u64 {
        return Err(wrong("bytes after its end"));
    }
    let locator = at.checked_sub(20).filter(|&l| bytes[l..].starts_with(LOCATOR64));
    let Some(locator) = locator else {
        if disk != 0 || first != 0 || here != count {
            return Err(wrong("spread over several disks"));
        }
        return Ok((count, size, start, at as u64));
    };
    let mut c = Cursor { bytes, at: locator + 8, file };
    let at64 = usize::try_from(c.number(8)?).map_err(|_| wrong("a directory beyond the file"))?;
    let mut c = Cursor { bytes, at: at64.min(bytes.len()), file };
    c.expect(END64)?;
    let length = c.number(8)?;
    c.take(4)?;
    let (disk, first, here, count) = (c.number(4)?, c.number(4)?, c.number(8)?, c.number(8)?);
    let (size, start) = (c.number(8)?, c.number(8)?);
    if disk != 0 || first != 0 || here != count {
        return Err(wrong("spread over several disks"));
    }
    if (at64 as u64).checked_add(12).and_then(|n| n.checked_add(length)) != Some(locator as u64) {
        return Err(wrong("a 64-bit record of another length"));
    }
    Ok((count, size, start, at64 as u64))
}

fn entry(c: &mut Cursor) -> Result<Member> {
    let file = c.file;
    c.expect(CENTRAL)?;
    c.take(4)?;
    let flags = c.number(2)?;
    let method = c.number(2)? as u16;
    c.take(4)?;
    let crc = c.number(4)? as u32;
    let (mut packed, mut size) = (c.number(4)?, c.number(4)?);
    let (name, extra, comment) = (c.number(2)? as usize, c.number(2)? as usize, c.number(2)? as usize);
    let disk = c.number(2)?;
    c.take(6)?;
    let mut at = c.number(4)?;
    let name = std::str::from_utf8(c.take(name)?)
        .map_err(|e| Error::format(file, format!("zip: a name that is not UTF-8: {e}")))?
        .to_owned();
    let wrong = |what: &str| Error::format(file, format!("zip: member {}: {what}", show(&name)));
    let end = c.at + extra;
    // Sizes beyond 32 bits stand in an extra field, in this order, where the field says all ones.
    while c.at + 4 <= end {
        let (id, len) = (c.number(2)?, c.number(2)? as usize);
        let mut field = Cursor { bytes: c.take(len)?, at: 0, file };
        if id == 1 {
            for value in [&mut size, &mut packed, &mut at] {
                if *value == u64::from(u32::MAX) {
                    *value = field.number(8)?;
                }
            }
        }
    }
    if c.at > end {
        return Err(wrong("an extra field beyond its place"));
    }
    c.take(end - c.at + comment)?;
    let leads = |s: &str| s == ".." || s == ".";
    if name.is_empty() || name.starts_with('/') || name.contains('\\') || name.split('/').any(leads) {
        return Err(wrong("a path that leads out of the archive"));
    }
    if name.chars().any(char::is_control) {
        return Err(wrong("a control character in its name"));
    }
    if flags & 1 != 0 || flags & 0x2040 != 0 {
        return Err(Error::unsupported(file, format!("zip: member {}: encrypted", show(&name))));
    }
    if method != 0 && method != 8 {
        let reason =
            format!("zip: member {}: compression method {method}, expected none or deflate", show(&name));
        return Err(Error::unsupported(file, reason));
    }
    if method == 0 && packed != size {
        return Err(wrong("stored, but of two sizes"));
    }
    if disk != 0 && disk != 0xffff {
        return Err(wrong("on another disk"));
    }
    let whole = |n: u64| usize::try_from(n).ok().filter(|_| n <= i64::MAX as u64);
    match (whole(packed), whole(size), whole(at)) {
        (Some(packed), Some(size), Some(at)) => Ok(Member { name, method, crc, packed, size, at }),
        _ => Err(wrong("a size that cannot be addressed")),
    }
}

impl Member {
    /// Its content: a part of the file where it is stored, else inflated, and checked by its checksum.
    pub fn read(&self, bytes: &Bytes, file: &str) -> Result<Bytes> {
        let wrong = |what: String| Error::format(file, format!("zip: member {}: {what}", show(&self.name)));
        let mut c = Cursor { bytes, at: self.at.min(bytes.len()), file };
        c.expect(MAGIC)?;
        c.take(2)?;
        let flags = c.number(2)?;
        let method = c.number(2)?;
        c.take(4)?;
        let _sums = c.take(12)?; // numpy leaves them to the directory
        let (name, extra) = (c.number(2)? as usize, c.number(2)? as usize);
        if c.take(name)? != self.name.as_bytes() || method != u64::from(self.method) || flags & 1 != 0 {
            return Err(wrong("its header and the directory differ".into()));
        }
        c.take(extra)?;
        let start = c.at;
        c.take(self.packed)?;
        let packed = bytes.slice(start..c.at).ok_or_else(|| wrong("outside of the file".into()))?;
        let content = if self.method == 0 { packed } else { self.inflate(&packed).map_err(wrong)? };
        if crc32fast::hash(&content) != self.crc {
            return Err(wrong("its checksum does not match".into()));
        }
        Ok(content)
    }

    fn inflate(&self, packed: &[u8]) -> Result<Bytes, String> {
        let mut out = Vec::new();
        out.try_reserve_exact(self.size).map_err(|_| format!("{} bytes do not fit in memory", self.size))?;
        let mut decoder = DeflateDecoder::new(packed).take(self.size as u64 + 1);
        // Never beyond what was reserved: one byte more is read apart.
        let mut block = [0; 1 << 14];
        loop {
            let n = decoder.read(&mut block).map_err(|e| format!("cannot be inflated: {e}"))?;
            if n == 0 {
                break;
            }
            if out.len() + n > self.size {
                return Err(format!("more than the {} bytes that the directory gives", self.size));
            }
            out.extend_from_slice(&block[..n]);
        }
        if out.len() != self.size {
            return Err(format!("{} bytes, the directory gives {}", out.len(), self.size));
        }
        Ok(Bytes::from(out))
    }
}

/// Writes an archive of stored members, each a head and a body.
pub(super) fn write(out: &mut dyn Write, members: &[(String, Vec<u8>, &[u8])]) -> io::Result<()> {
    let (mut at, mut directory) = (0u64, Vec::new());
    let narrow =
        |n: u64| u32::try_from(n).map_err(|_| io::Error::other("more than 4 GiB; save it as safetensors"));
    let count = u16::try_from(members.len()).map_err(|_| io::Error::other("more than 65,535 arrays"))?;
    for (name, head, body) in members {
        let mut sum = crc32fast::Hasher::new();
        sum.update(head);
        sum.update(body);
        let size = narrow((head.len() + body.len()) as u64)?.to_le_bytes();
        let length =
            u16::try_from(name.len()).map_err(|_| io::Error::other("a name of more than 65,535 bytes"))?;
        // Version 2.0, UTF-8 names, stored, 1980-01-01: the same arrays give the same bytes.
        let mut common = vec![20, 0, 0, 8, 0, 0, 0, 0, 0x21, 0];
        common.extend_from_slice(&sum.finalize().to_le_bytes());
        common.extend_from_slice(&size);
        common.extend_from_slice(&size);
        common.extend_from_slice(&length.to_le_bytes());
        common.extend_from_slice(&[0, 0]);
        for part in [MAGIC, &common, name.as_bytes(), head, body] {
            out.write_all(part)?;
        }
        directory.extend_from_slice(CENTRAL);
        directory.extend_from_slice(&[20, 0]);
        directory.extend_from_slice(&common);
        directory.extend_from_slice(&[0; 10]);
        directory.extend_from_slice(&narrow(at)?.to_le_bytes());
        directory.extend_from_slice(name.as_bytes());
        at += (30 + name.len() + head.len() + body.len()) as u64;
    }
    out.write_all(&directory)?;
    out.write_all(END)?;
    out.write_all(&[0; 4])?;
    out.write_all(&count.to_le_bytes())?;
    out.write_all(&count.to_le_bytes())?;
    out.write_all(&narrow(directory.len() as u64)?.to_le_bytes())?;
    out.write_all(&narrow(at)?.to_le_bytes())?;
    out.write_all(&[0, 0])
}
