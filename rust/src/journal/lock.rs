//! One process per state directory.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::mapping::ForkMark;

const NAME: &str = "microlora.lock";

/// The exclusive lock of a state directory, held until it is dropped or the process ends, however it ends.
///
/// Forked children inherit it: they must not write, and while one of them lives after its parent was killed,
/// the directory stays locked.
#[derive(Debug)]
pub struct DirLock {
    dir: PathBuf,
    file: File,
    owner: ForkMark,
}

impl DirLock {
    /// Makes the directory where it is missing, and locks it.
    ///
    /// # Errors
    /// [`Error::Io`] of kind `WouldBlock` that names the directory (and the process, where it can be told)
    /// if it is locked, by this process too; what the system says of a place that cannot be written.
    pub fn acquire(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
        let path = dir.join(NAME);
        let at = |e| Error::io(&path, e);
        let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let mut file = open.map_err(at)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                let _ = (&mut file).take(20).read_to_string(&mut holder);
                let holder = holder.trim().parse::<u32>().map(|p| format!(" (process {p})"));
                let text = format!(
                    "the directory is in use{}: one process at a time can write a state directory",
                    holder.unwrap_or_default()
                );
                return Err(Error::io(dir, io::Error::new(io::ErrorKind::WouldBlock, text)));
            }
            Err(TryLockError::Error(e)) => return Err(at(e)),
        }
        // Only a help for people: the lock is the system's, so a failure to write costs nothing.
        let _ = file.set_len(0).and_then(|()| file.rewind()).and_then(|()| {
            let text = format!("{}\n", std::process::id());
            file.write_all(text.as_bytes())
        });
        Ok(DirLock { dir: dir.to_owned(), file, owner: ForkMark::new() })
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

impl Drop for DirLock {
    fn drop(&mut self) {
        // Unlocking frees it for all that inherited it, so only the owner does; children just close.
        if self.owner.is_here() {
            let _ = self.file.unlock();
        }
    }
}
