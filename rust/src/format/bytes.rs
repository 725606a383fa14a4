//! Bytes of tensors, whoever owns them: memory, a file map, a factor in the kernels' order, a file that is open.

use std::borrow::Cow;
use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::ops::{Deref, Range};
use std::sync::{Arc, OnceLock};

use crate::dtype::Dtype;
use crate::factor::{Bits, Factor, SharedFactor};
use crate::mapping::{self, Mapping};

#[derive(Clone)]
enum Owner {
    Memory(Arc<Vec<u8>>),
    Map(Arc<Mapping>),
    Factor(Arc<Unrolled>),
    Unread(Arc<Unread>),
}

/// A part of a file that is open: read where it is packed ([`Tensor::pack`]) or [settled](Bytes::settle).
struct Unread {
    file: Arc<File>,
    /// Bytes of the file, from its start.
    span: Range<usize>,
    /// For who looks all the same.
    bits: OnceLock<Vec<u8>>,
}

impl Unread {
    fn read(&self, range: Range<usize>) -> io::Result<Vec<u8>> {
        let mut out = mapping::reserve(range.len()).ok_or(io::ErrorKind::OutOfMemory)?;
        let mut rest = Reading::new(self, range);
        while rest.left() > 0 {
            let n = rest.left().min(AHEAD);
            out.extend_from_slice(rest.take(n)?);
        }
        Ok(out)
    }
}

/// Bytes of a file that are read at once.
const AHEAD: usize = 256 << 10;

/// A part of a file, front to back.
struct Reading<'a> {
    file: &'a File,
    /// What is still in the file.
    at: Range<usize>,
    /// What was read and not taken begins at `taken`.
    buffer: Vec<u8>,
    taken: usize,
}

impl<'a> Reading<'a> {
    fn new(from: &'a Unread, range: Range<usize>) -> Self {
        let at = from.span.start + range.start..from.span.start + range.end;
        Reading { file: &from.file, at, buffer: Vec::new(), taken: 0 }
    }

    fn left(&self) -> usize {
        self.at.len() + self.buffer.len() - self.taken
    }
}

impl Bits for Reading<'_> {
    fn take(&mut self, n: usize) -> io::Result<&[u8]> {
        let have = self.buffer.len() - self.taken;
        if have < n {
            if self.left() < n {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.buffer.copy_within(self.taken.., 0);
            let more = self.at.len().min(n.max(AHEAD) - have);
            self.buffer.resize(have + more, 0);
            mapping::read_at(self.file, &mut self.buffer[have..], self.at.start as u64)?;
            self.at.start += more;
            self.taken = 0;
        }
        self.taken += n;
        Ok(&self.buffer[self.taken - n..self.taken])
    }
}

/// A factor in the kernels' order; its bits in a file's order are made when somebody looks at them.
struct Unrolled {
    factor: SharedFactor,
    transposed: bool,
    bits: OnceLock<Vec<u8>>,
}

/// A range of bytes with a shared owner: private memory, or a file map. Equal when the content is.
#[derive(Clone)]
pub struct Bytes {
    owner: Owner,
    range: Range<usize>,
}

impl Bytes {
    /// The whole of a file map, not copied.
    pub fn from_mapping(map: Mapping) -> Self {
        let range = 0..map.len();
        Bytes { owner: Owner::Map(Arc::new(map)), range }
    }

    /// The whole of a file of `len` bytes, of which nothing is read yet.
    pub(super) fn unread(file: File, len: usize) -> Self {
        let unread = Unread { file: Arc::new(file), span: 0..len, bits: OnceLock::new() };
        Bytes { owner: Owner::Unread(Arc::new(unread)), range: 0..len }
    }

    /// The first `n` bytes, or all.
    ///
    /// # Errors
    /// Those of reading what was not read.
    pub(super) fn prefix(&self, n: usize) -> io::Result<Cow<'_, [u8]>> {
        let n = n.min(self.len());
        match &self.owner {
            Owner::Unread(u) => u.read(self.range.start..self.range.start + n).map(Cow::Owned),
            _ => Ok(Cow::Borrowed(&self[..n])),
        }
    }

    /// Reads what was not read.
    ///
    /// # Errors
    /// Those of the file.
    pub(super) fn settle(&mut self) -> io::Result<()> {
        if let Owner::Unread(u) = &self.owner {
            *self = Bytes::from(u.read(self.range.clone())?);
        }
        Ok(())
    }

    /// The same bits in the kernels' order, when they are kept in that: of the matrix, or of its transpose.
    pub(crate) fn packed(&self, transposed: bool) -> Option<SharedFactor> {
        self.factor().filter(|f| f.transposed == transposed).map(|f| SharedFactor::clone(&f.factor))
    }

    /// Puts a `(rank, len)` matrix, or its transpose, in the kernels' order, and says whether all its numbers are
    /// finite; the bits are made again when somebody looks at them.
    ///
    /// # Errors
    /// Those of reading what was not read.
    pub(super) fn pack(
        &mut self,
        [rank, len]: [usize; 2],
        dtype: Dtype,
        transposed: bool,
    ) -> io::Result<bool> {
        let (factor, finite) = match &self.owner {
            Owner::Unread(u) => {
                Factor::read(&mut Reading::new(u, self.range.clone()), rank, len, dtype, transposed)?
            }
            owner => {
                if let Owner::Map(map) = owner {
                    map.populate(self.range.clone());
                }
                Factor::read(&mut &self[..], rank, len, dtype, transposed)?
            }
        };
        *self = Bytes::from_factor(&SharedFactor::new(factor), transposed);
        Ok(finite)
    }

    /// The stored bits of a factor, `(rank, len)` row-major, or of its transpose: shared until they are looked at,
    /// and written without being held in memory.
    pub(crate) fn from_factor(factor: &SharedFactor, transposed: bool) -> Self {
        let range = 0..factor.rank() * factor.len() * factor.dtype().size();
        let factor = SharedFactor::clone(factor);
        Bytes {
            owner: Owner::Factor(Arc::new(Unrolled { factor, transposed, bits: OnceLock::new() })),
            range,
        }
    }

    /// The factor whose bits these are, whole.
    fn factor(&self) -> Option<&Unrolled> {
        match &self.owner {
            Owner::Factor(f)
                if self.range == (0..f.factor.rank() * f.factor.len() * f.factor.dtype().size()) =>
            {
                Some(f)
            }
            _ => None,
        }
    }

    /// The factor whose bits these are, in whatever orientation.
    pub(super) fn as_factor(&self) -> Option<&Factor> {
        self.factor().map(|f| &*f.factor)
    }

    /// Number of bytes.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Writes all of them.
    pub(crate) fn write_to(&self, out: &mut dyn Write) -> io::Result<()> {
        match self.factor() {
            Some(f) if f.bits.get().is_none() => f.factor.write_bits(f.transposed, out),
            _ => out.write_all(self),
        }
    }

    /// A part of these bytes with the same owner; `None` when it does not lie inside.
    pub fn slice(&self, range: Range<usize>) -> Option<Self> {
        if range.start > range.end || range.end > self.len() {
            return None;
        }
        let start = self.range.start + range.start;
        if let Owner::Unread(u) = &self.owner {
            let span = u.span.start + start..u.span.start + start + range.len();
            let part = Unread { file: Arc::clone(&u.file), span, bits: OnceLock::new() };
            return Some(Bytes { owner: Owner::Unread(Arc::new(part)), range: 0..range.len() });
        }
        Some(Bytes { owner: self.owner.clone(), range: start..start + range.len() })
    }

    /// True when the bytes are pages of a mapped file.
    pub fn is_mapped(&self) -> bool {
        matches!(self.owner, Owner::Map(_))
    }

    /// The same bytes in memory of their own, so that a large owner can go.
    pub fn detach(&self) -> Self {
        Bytes::from(self.to_vec())
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.owner {
            Owner::Memory(v) => &v[self.range.clone()],
            Owner::Map(m) => &m[self.range.clone()],
            Owner::Unread(u) => {
                debug_assert!(false, "a reader looks at bytes that it did not settle");
                let read = || u.read(0..u.span.len()).expect("a file that was opened can be read");
                &u.bits.get_or_init(read)[self.range.clone()]
            }
            Owner::Factor(f) => &f.bits.get_or_init(|| f.factor.to_bits(f.transposed))[self.range.clone()],
        }
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(data: Vec<u8>) -> Self {
        let range = 0..data.len();
        Bytes { owner: Owner::Memory(Arc::new(data)), range }
    }
}

impl PartialEq for Bytes {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for Bytes {}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bytes({}{})", self.len(), if self.is_mapped() { ", mapped" } else { "" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_share_and_compare_by_content() {
        let all = Bytes::from(vec![1, 2, 3, 1, 2]);
        assert_eq!(all.slice(0..2), all.slice(3..5));
        assert_eq!(all.slice(1..4).unwrap().slice(1..2).unwrap().to_vec(), vec![3]);
        assert!(all.slice(4..6).is_none());
        assert_eq!(all.slice(1..3).unwrap().detach().len(), 2);
    }

    fn file(content: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        file
    }

    #[test]
    fn what_was_not_read_is_read_in_pieces() {
        let content: Vec<u8> = (0..3 * AHEAD + 77).map(|i| (i / 3) as u8).collect();
        let all = Bytes::unread(file(&content), content.len());
        assert_eq!(all.prefix(10).unwrap(), &content[..10]);
        let mut part = all.slice(5..content.len() - 2).unwrap().slice(1..2 * AHEAD).unwrap();
        let Owner::Unread(u) = &part.owner else { panic!("{part:?}") };
        let mut rest = Reading::new(u, 0..part.len());
        let mut at = 6;
        for n in [1, 100, AHEAD - 7, 3, AHEAD / 2].into_iter().chain([7; 50]) {
            assert_eq!(rest.take(n).unwrap(), &content[at..at + n]);
            at += n;
        }
        let left = rest.left();
        assert_eq!(rest.take(left + 1).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(rest.take(left).unwrap(), &content[at..5 + 2 * AHEAD]);
        part.settle().unwrap();
        assert_eq!(part[..], content[6..5 + 2 * AHEAD]);
    }

    #[test]
    fn a_file_cut_off_meanwhile_is_an_error() {
        let opened = file(&[7; 4096]);
        let mut all = Bytes::unread(opened.try_clone().unwrap(), 4096);
        opened.set_len(100).unwrap();
        assert_eq!(all.settle().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(all.pack([8, 128], Dtype::F32, false).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(all.len(), 4096);
    }
}
