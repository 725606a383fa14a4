//! Opening files: what kind it is by its content, then its bytes, private or mapped.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use super::LoadOptions;
use super::container::{self, Container};
use super::json::{MAX_TEXT, show};
use super::tensor::Bytes;
use super::{npz, unread, unread_head, zip};
use crate::error::{Error, Result};
use crate::mapping::{self, Mapping};

const PICKLE: &str = "a pickle: loading one runs whatever code it carries, so it is never opened here; if you trust \
                      it, read it with torch.load(path, weights_only=True) and save it with safetensors.torch.save_file";

/// Bytes that are looked at before the rest is read: enough for the name of a zip's first member.
const HEAD: usize = 4096;

/// Bytes from which a file is read tensor by tensor; below, one call for all of it is faster.
const LAZY_FROM: usize = 256 << 10;

/// A file or directory that was opened and is not yet understood.
pub(crate) struct Source {
    pub path: PathBuf,
    /// The name that errors carry.
    pub file: String,
    pub content: Content,
}

/// What lies at a path.
pub(crate) enum Content {
    Directory,
    Safetensors(Container),
    /// Any other file.
    Other(Bytes),
}

impl Source {
    /// Opens a path, and parses the header where it is safetensors.
    pub fn open(path: &Path, opts: &LoadOptions) -> Result<Self> {
        let meta = fs::metadata(path).map_err(|e| Error::io(path, e))?;
        let file = path.display().to_string();
        let content = if meta.is_dir() {
            Content::Directory
        } else {
            let bytes = open_lazily(path, opts)?;
            let head = bytes.prefix(64).map_err(|e| unread_head(e, &file))?;
            if container::looks_like(&head) {
                Content::Safetensors(container::parse_within(&bytes, &file, &opts.limits)?)
            } else {
                Content::Other(bytes)
            }
        };
        Ok(Source { path: path.to_owned(), file, content })
    }

    /// Reads what was not read, for a reader that looks at every byte.
    pub fn settle(&mut self) -> Result<()> {
        let Content::Safetensors(container) = &mut self.content else { return Ok(()) };
        for t in &mut container.tensors {
            t.data.settle().map_err(|e| unread(&t.name, &e, &self.file))?;
        }
        Ok(())
    }

    /// The first bytes; of a directory none.
    pub fn head(&self) -> &[u8] {
        match &self.content {
            Content::Other(bytes) => &bytes[..bytes.len().min(64)],
            _ => &[],
        }
    }

    /// True for a directory that holds a file of this name.
    pub fn has(&self, name: &str) -> bool {
        matches!(self.content, Content::Directory) && self.path.join(name).is_file()
    }

    /// The refusal of what no format knows.
    pub fn unknown(&self) -> Error {
        match &self.content {
            Content::Directory => Error::format(
                &self.file,
                "a directory without the files of an adapter (adapter_config.json and its weights)",
            ),
            _ => sniff(self.head(), &self.file).err().unwrap_or_else(|| {
                // Too short or too long a header: the parser of safetensors says which.
                let Content::Other(bytes) = &self.content else {
                    return Error::format(&self.file, "no adapter");
                };
                let start = &bytes[..bytes.len().min(8)];
                if start.len() == 8 && start.iter().all(|&b| matches!(b, b'\t' | b'\n' | b'\r' | b' '..=b'~'))
                {
                    let start = String::from_utf8_lossy(start);
                    let reason =
                        format!("a text that begins with {}, no adapter of a known format", show(&start));
                    return Error::format(&self.file, reason);
                }
                let parsed = container::parse(bytes, &self.file).err();
                parsed.unwrap_or_else(|| Error::format(&self.file, "of no format that is known here"))
            }),
        }
    }
}

/// Opens a regular file: what waits for a writer or has no end is refused before it is opened, and again
/// by what was opened, as the path may lead elsewhere by then.
pub(super) fn open_regular(path: &Path, refusal: &str) -> Result<(File, fs::Metadata)> {
    let at = |e| Error::io(path, e);
    let regular = |meta: fs::Metadata| match meta.is_file() {
        true => Ok(meta),
        false => Err(Error::format(path.display(), refusal)),
    };
    regular(fs::metadata(path).map_err(at)?)?;
    let mut options = File::options();
    options.read(true);
    #[cfg(target_os = "linux")]
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NONBLOCK);
    let file = options.open(path).map_err(at)?;
    let meta = regular(file.metadata().map_err(at)?)?;
    Ok((file, meta))
}

/// Reads or maps a regular file, after a look at its first bytes.
pub(super) fn open(path: &Path, opts: &LoadOptions) -> Result<Bytes> {
    open_lazily(path, &LoadOptions { packed: false, ..*opts })
}

/// [`open`], but of a large safetensors file whose factors are wanted packed nothing is read yet: its reader packs
/// or settles every tensor.
pub(super) fn open_lazily(path: &Path, opts: &LoadOptions) -> Result<Bytes> {
    let limits = &opts.limits;
    let at = |e| Error::io(path, e);
    let name = path.display();
    let (mut file, meta) = open_regular(path, "neither a regular file nor a directory")?;
    let mut head = Vec::with_capacity(HEAD);
    (&mut file).take(HEAD as u64).read_to_end(&mut head).map_err(at)?;
    refuse_pickled(&head, &name.to_string())?;
    if opts.mmap {
        return Ok(Bytes::from_mapping(Mapping::open(&file).map_err(at)?));
    }
    if meta.len() > limits.total_bytes {
        let reason = format!(
            "{} bytes, more than the {} that are copied to memory (limits: total_bytes); use mmap=True",
            meta.len(),
            limits.total_bytes
        );
        return Err(Error::format(name, reason));
    }
    let no_room = || Error::format(path.display(), format!("{} bytes do not fit in memory", meta.len()));
    let size = usize::try_from(meta.len()).map_err(|_| no_room())?;
    if opts.packed && size >= LAZY_FROM && cfg!(unix) && container::looks_like(&head) {
        return Ok(Bytes::unread(file, size));
    }
    let mut bytes = mapping::reserve(size.max(head.len())).ok_or_else(no_room)?;
    bytes.extend_from_slice(&head);
    file.take((size - head.len().min(size)) as u64).read_to_end(&mut bytes).map_err(at)?;
    Ok(Bytes::from(bytes))
}

/// A JSON text file that was read whole and is still open.
pub(super) struct Text {
    pub text: String,
    file: File,
}

impl Text {
    /// Reads a file, if it is not too long to be parsed.
    pub fn read(path: &Path) -> Result<Self> {
        let at = |e| Error::io(path, e);
        let (file, meta) = open_regular(path, "not a regular file")?;
        let mut bytes = Vec::with_capacity((meta.len() as usize).min(MAX_TEXT) + 1);
        (&file).take(MAX_TEXT as u64 + 1).read_to_end(&mut bytes).map_err(at)?;
        if bytes.len() > MAX_TEXT {
            return Err(Error::format(path.display(), format!("more than {MAX_TEXT} bytes")));
        }
        let text = String::from_utf8(bytes)
            .map_err(|e| Error::format(path.display(), format!("not UTF-8: {}", e.utf8_error())))?;
        Ok(Text { text, file })
    }

    /// True when `path` still leads to this very file with this very text.
    pub fn is_still(&self, path: &Path) -> bool {
        let same_file = match (self.file.metadata(), fs::metadata(path)) {
            (Ok(then), Ok(now)) => same_file(&then, &now),
            _ => false,
        };
        same_file && fs::read(path).is_ok_and(|now| now == self.text.as_bytes())
    }
}

/// An inode is not given to another file while this one is open.
#[cfg(unix)]
fn same_file(a: &fs::Metadata, b: &fs::Metadata) -> bool {
    use std::os::unix::fs::MetadataExt;
    (a.dev(), a.ino()) == (b.dev(), b.ino())
}

#[cfg(not(unix))]
fn same_file(a: &fs::Metadata, b: &fs::Metadata) -> bool {
    matches!((a.modified(), b.modified()), (Ok(a), Ok(b)) if a == b)
}

/// Refuses, by its first bytes, a file that is known to be something else.
pub(super) fn sniff(head: &[u8], file: &str) -> Result<()> {
    if container::looks_like(head) {
        return Ok(());
    }
    refuse_pickled(head, file)?;
    let other = [
        (&b"GGUF"[..], "a GGUF file, expected safetensors"),
        (b"\x89HDF", "an HDF5 file, expected safetensors"),
        (b"\x93NUMPY", "a NumPy file, expected safetensors"),
        (zip::MAGIC, "a NumPy archive (.npz), expected safetensors"),
        (b"version https://git-lfs", "a Git LFS pointer, not the file itself: fetch it with `git lfs pull`"),
        (b"{", "JSON, not safetensors; of a PEFT adapter pass the directory"),
    ];
    match other.iter().find(|(magic, _)| head.starts_with(magic)) {
        Some((_, what)) => Err(Error::format(file, *what)),
        None => Ok(()),
    }
}

/// Refuses a pickle, bare or in the zip archive that torch makes of it (NumPy's has arrays in it).
pub(super) fn refuse_pickled(head: &[u8], file: &str) -> Result<()> {
    let pickle = (head.starts_with(zip::MAGIC) && !npz::is_npz(head))
        || (head.first() == Some(&0x80) && matches!(head.get(1), Some(0..=5)));
    if pickle && !container::looks_like(head) {
        return Err(Error::unsupported(file, PICKLE));
    }
    Ok(())
}

/// The refusal of a pickle that is known by its name alone.
pub(super) fn refuse_pickle(path: &Path) -> Error {
    Error::unsupported(path.display(), PICKLE)
}
