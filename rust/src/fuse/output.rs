//! Where the new model grows: a temporary sibling of the file or folder, which is renamed when all is done.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::error::{Error, Result};
use crate::format::atomic::{self, Growing, Staged};

/// A model that is being written. Dropped before [`Output::commit`]: deleted.
pub(super) enum Output {
    /// A single file.
    File(Box<Option<Growing>>),
    /// A folder, whole under a temporary name.
    Folder { staging: TempDir, out: PathBuf },
}

/// One of its files.
pub(super) enum Sink {
    Single(Growing),
    Part(File, PathBuf),
}

/// All of it is on disk and lacks only its name.
pub(super) enum Ready {
    File(Staged),
    Folder { staging: TempDir, out: PathBuf },
}

impl Output {
    /// Makes the temporary sibling of `out`.
    pub fn new(out: &Path, is_dir: bool) -> Result<Self> {
        if !is_dir {
            return Ok(Output::File(Box::new(Some(Growing::new(out)?))));
        }
        let mut builder = tempfile::Builder::new();
        builder.prefix(".microlora-").suffix(".tmp");
        #[cfg(unix)]
        builder.permissions({
            use std::os::unix::fs::PermissionsExt;
            fs::Permissions::from_mode(0o777) // less the umask, as any new folder
        });
        let folder = atomic::parent(out);
        let staging = builder.tempdir_in(folder).map_err(|e| Error::io(folder, e))?;
        Ok(Output::Folder { staging, out: out.to_owned() })
    }

    /// Starts one file; of a single-file model there is only one.
    pub fn start(&mut self, name: &str) -> Result<Sink> {
        match self {
            Output::File(growing) => growing
                .take()
                .map(Sink::Single)
                .ok_or_else(|| Error::config("out", "a single file", "a folder for several shards")),
            Output::Folder { staging, .. } => {
                let path = staging.path().join(name);
                let file = OpenOptions::new().write(true).create_new(true).open(&path);
                Ok(Sink::Part(file.map_err(|e| Error::io(&path, e))?, path))
            }
        }
    }

    /// Everything is written: a folder is synced as a whole. `single` is the finished file of the other kind.
    pub fn finish(self, single: Option<Staged>) -> Result<Ready> {
        match (self, single) {
            (Output::Folder { staging, out }, _) => {
                atomic::sync_dir(staging.path());
                Ok(Ready::Folder { staging, out })
            }
            (Output::File(_), Some(staged)) => Ok(Ready::File(staged)),
            (Output::File(_), None) => Err(Error::config("base", "no file", "one safetensors file")),
        }
    }
}

impl Sink {
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        match self {
            Sink::Single(growing) => growing.write(bytes),
            Sink::Part(file, path) => file.write_all(bytes).map_err(|e| Error::io(&*path, e)),
        }
    }

    /// Syncs the file; a single one comes back, to be renamed last.
    pub fn finish(self) -> Result<Option<Staged>> {
        match self {
            Sink::Single(growing) => growing.finish().map(Some),
            Sink::Part(file, path) => file.sync_all().map(|()| None).map_err(|e| Error::io(path, e)),
        }
    }
}

impl Ready {
    /// The one rename that makes the model appear. A folder takes the place of nothing or of an empty folder.
    pub fn commit(self) -> Result<()> {
        match self {
            Ready::File(staged) => staged.commit(),
            Ready::Folder { staging, out } => {
                fs::rename(staging.path(), &out).map_err(|e| Error::io(&out, e))?;
                let _ = staging.keep(); // has its name now: nothing to delete
                atomic::sync_dir(atomic::parent(&out));
                Ok(())
            }
        }
    }
}
