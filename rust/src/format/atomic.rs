//! Files that are whole or not there: a temporary sibling, fsync, rename.

use std::fs::{self, File};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::thread;

use tempfile::{Builder, NamedTempFile};

use super::source::open_regular;
use crate::error::{Error, Result};
use crate::mapping;

/// Writes what `fill` produces to `path`, replacing it in one step. On any error the old file is as it
/// was and nothing else is left. A symbolic link is replaced, not followed.
pub(crate) fn write(path: &Path, fill: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
    Staged::new(path, fill)?.commit()
}

/// A file that grows under a temporary name beside its place. Dropped: deleted.
pub(crate) struct Growing {
    temp: NamedTempFile,
    path: PathBuf,
}

impl Growing {
    /// Makes the temporary sibling of `path`.
    pub fn new(path: &Path) -> Result<Self> {
        let at = |e| Error::io(path, e);
        if path.is_dir() || path.file_name().is_none() {
            return Err(at(io::Error::new(io::ErrorKind::IsADirectory, "is a directory, expected a file")));
        }
        // A rename would put a file in the place of a device or a pipe.
        if fs::symlink_metadata(path).is_ok_and(|m| !m.is_file() && !m.is_symlink()) {
            return Err(at(io::Error::new(
                io::ErrorKind::InvalidInput,
                "a device or a pipe, expected a file",
            )));
        }
        let mut builder = Builder::new();
        builder.prefix(".microlora-").suffix(".tmp");
        #[cfg(unix)]
        builder.permissions({
            use std::os::unix::fs::PermissionsExt;
            fs::Permissions::from_mode(0o666) // less the umask, as any new file
        });
        check_parent(path)?;
        let temp = builder.tempfile_in(parent(path)).map_err(|e| at(own(e)))?;
        Ok(Growing { temp, path: path.to_owned() })
    }

    /// The file, to be written.
    pub fn file(&self) -> &File {
        self.temp.as_file()
    }

    /// Appends bytes.
    pub fn write(&self, bytes: &[u8]) -> Result<()> {
        self.file().write_all(bytes).map_err(|e| Error::io(&self.path, e))
    }

    /// Syncs it: from now on it only lacks its name.
    pub fn finish(self) -> Result<Staged> {
        let Growing { temp, path } = self;
        let at = |e| Error::io(&path, e);
        if let Ok(old) = fs::metadata(&path) {
            temp.as_file().set_permissions(old.permissions()).map_err(at)?;
        }
        temp.as_file().sync_all().map_err(at)?;
        Ok(Staged { temp, path })
    }
}

/// Bytes after which the system is asked to begin with the disk.
const STRETCH: u64 = 16 << 20;

/// Bytes that are gathered for one call; longer pieces go to the file as they are.
const GATHERED: usize = 64 << 10;

/// A file that goes to the disk while it is written.
struct Flowing<'a> {
    file: &'a File,
    begun: u64,
    end: u64,
}

impl Write for Flowing<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.file.write(bytes)?;
        self.end += n as u64;
        if self.end - self.begun >= STRETCH {
            mapping::begin_writing(self.file, self.begun, self.end - self.begun);
            self.begun = self.end;
        }
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn filled(path: &Path, fill: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<Growing> {
    let growing = Growing::new(path)?;
    let flowing = Flowing { file: growing.file(), begun: 0, end: 0 };
    let mut out = BufWriter::with_capacity(GATHERED, flowing);
    fill(&mut out).and_then(|()| out.flush()).map_err(|e| Error::io(path, e))?;
    drop(out);
    Ok(growing)
}

/// A file that is complete and on disk, under a temporary name beside its place. Dropped: deleted.
pub(crate) struct Staged {
    temp: NamedTempFile,
    path: PathBuf,
}

impl Staged {
    /// Writes and syncs the temporary sibling of `path`.
    pub fn new(path: &Path, fill: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<Self> {
        filled(path, fill)?.finish()
    }

    /// [`Staged::new`], and then a text at some place, asked for when the rest is written; with `late`, when it
    /// is on disk, because the text takes as long to be made.
    pub fn patched(
        path: &Path,
        fill: impl FnOnce(&mut dyn Write) -> io::Result<()>,
        at: u64,
        late: bool,
        text: impl FnOnce() -> Result<String>,
    ) -> Result<Self> {
        let growing = filled(path, fill)?;
        if late {
            growing.file().sync_data().map_err(|e| Error::io(path, e))?;
        }
        let text = text()?;
        let mut file = growing.file();
        let done = file.seek(SeekFrom::Start(at)).and_then(|_| file.write_all(text.as_bytes()));
        done.map_err(|e| Error::io(path, e))?;
        growing.finish()
    }

    /// Renames the file to its place and syncs the directory.
    pub fn commit(self) -> Result<()> {
        let Staged { temp, path } = self;
        let old = Old::hold(&path);
        temp.persist(&path).map_err(|e| Error::io(&path, e.error))?;
        sync_dir(parent(&path));
        old.let_go();
        Ok(())
    }
}

/// A large file that is about to be replaced: giving its memory and disk back takes the system as long as writing
/// a part of the new one, and nobody has to wait for that.
struct Old(Option<File>);

impl Old {
    fn hold(path: &Path) -> Self {
        let is_large =
            cfg!(unix) && fs::symlink_metadata(path).is_ok_and(|m| m.is_file() && m.len() >= STRETCH);
        Old(is_large.then(|| open_regular(path, "no file").ok()).flatten().map(|(file, _)| file))
    }

    fn let_go(self) {
        if let Some(file) = self.0 {
            // Without a thread it is closed here.
            let _ = thread::Builder::new().name("microlora-close".into()).spawn(move || drop(file));
        }
    }
}

/// Writes the two files `[settings, weights]` of a directory, which is made where it is missing. Both are whole
/// before either takes its place, and the old settings are put aside first, so that no crash leaves weights beside
/// the scale of others, and none loses it.
pub(crate) fn write_pair(
    dir: &Path,
    [settings, weights]: [&str; 2],
    text: &str,
    stage: impl FnOnce(&Path) -> Result<Staged>,
) -> Result<()> {
    let made = !dir.exists();
    fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
    let aside = dir.join(format!(".{settings}.previous"));
    let done = replace_pair(&dir.join(settings), &aside, text, || stage(&dir.join(weights)));
    if done.is_err() && made {
        let _ = fs::remove_dir(dir); // only if nothing came into it
    }
    done
}

fn replace_pair(
    place: &Path,
    aside: &Path,
    text: &str,
    stage: impl FnOnce() -> Result<Staged>,
) -> Result<()> {
    let weights = stage()?;
    let settings = Staged::new(place, |out| out.write_all(text.as_bytes()))?;
    let at = |e| Error::io(place, e);
    let moved = match fs::read(place) {
        Ok(old) if old == text.as_bytes() => false,
        Ok(_) => fs::rename(place, aside).map(|()| true).map_err(at)?,
        Err(e) if e.kind() == io::ErrorKind::NotFound => false,
        Err(e) => return Err(at(e)),
    };
    if let Err(e) = weights.commit() {
        if moved {
            fs::rename(aside, place).map_err(at)?;
        }
        return Err(e);
    }
    settings.commit()?;
    match fs::remove_file(aside) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io(aside, e)),
        _ => Ok(()),
    }
}

pub(crate) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    }
}

/// The folder of a file must be there; the error names it, not the temporary file that cannot be made.
fn check_parent(path: &Path) -> Result<()> {
    let folder = parent(path);
    match fs::metadata(folder) {
        Ok(meta) if meta.is_dir() => Ok(()),
        Ok(_) => {
            let what = "not a folder, expected the one that the file is to lie in";
            Err(Error::io(folder, io::Error::new(io::ErrorKind::NotADirectory, what)))
        }
        Err(e) => Err(Error::io(folder, e)),
    }
}

/// What the system said, without the name of the temporary file around it.
fn own(e: io::Error) -> io::Error {
    let inner = e.get_ref().and_then(|e| e.source()).and_then(|e| e.downcast_ref::<io::Error>());
    inner.and_then(io::Error::raw_os_error).map_or(e, io::Error::from_raw_os_error)
}

/// Makes a rename durable where the system can; where it cannot, the file is still whole.
pub(crate) fn sync_dir(dir: &Path) {
    if cfg!(unix) {
        let _ = File::open(dir).and_then(|d| d.sync_all());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut v: Vec<_> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        v.sort();
        v
    }

    #[test]
    fn replaces_whole_files_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.bin");
        write(&path, |w| w.write_all(b"old")).unwrap();
        let full = |w: &mut dyn Write| {
            w.write_all(&[7; 1 << 20])?;
            Err(io::Error::from(io::ErrorKind::StorageFull))
        };
        let err = write(&path, full).unwrap_err();
        assert!(matches!(&err, Error::Io { path, source } if path.ends_with("a.bin")
            && source.kind() == io::ErrorKind::StorageFull));
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(dir.path()), ["a.bin"]);
        write(&path, |w| w.write_all(b"new")).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(names(dir.path()), ["a.bin"]);
    }

    #[test]
    fn refuses_directories_and_missing_parents() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(write(dir.path(), |_| Ok(())), Err(Error::Io { .. })));
        let missing = write(&dir.path().join("no/such"), |_| Ok(())).unwrap_err();
        assert!(matches!(&missing, Error::Io { path, source } if path.ends_with("no")
            && source.raw_os_error().is_some()));
        assert!(!missing.to_string().contains(".microlora-"));
        fs::write(dir.path().join("file"), b"").unwrap();
        let file = write(&dir.path().join("file/a"), |_| Ok(())).unwrap_err();
        assert!(matches!(&file, Error::Io { path, .. } if path.ends_with("file")), "{file}");
        fs::remove_file(dir.path().join("file")).unwrap();
        let long = write(&dir.path().join("a".repeat(300)).join("b"), |_| Ok(())).unwrap_err();
        assert!(!long.to_string().contains(".microlora-"));
        assert!(matches!(write(Path::new("/"), |_| Ok(())), Err(Error::Io { .. })));
        assert!(names(dir.path()).is_empty());
    }

    #[test]
    fn settings_come_back_when_their_weights_find_no_place() {
        let dir = tempfile::tempdir().unwrap();
        let pair = |text: &str, weights: &[u8]| {
            let staged = |path: &Path| Staged::new(path, |out| out.write_all(weights));
            write_pair(dir.path(), ["settings", "weights"], text, staged)
        };
        pair("old", b"1").unwrap();
        pair("new", b"2").unwrap();
        assert_eq!(names(dir.path()), ["settings", "weights"]);
        // Between the two steps something takes the place that a file cannot be renamed to.
        let late = |path: &Path| {
            let staged = Staged::new(path, |out| out.write_all(b"3"))?;
            fs::remove_file(path).unwrap();
            fs::create_dir(path).unwrap();
            fs::write(path.join("mine"), b"").unwrap();
            Ok(staged)
        };
        assert!(matches!(
            write_pair(dir.path(), ["settings", "weights"], "newer", late),
            Err(Error::Io { .. })
        ));
        assert_eq!(fs::read(dir.path().join("settings")).unwrap(), b"new");
        assert_eq!(names(dir.path()), ["settings", "weights"]);
    }

    #[cfg(unix)]
    #[test]
    fn keeps_the_mode_of_a_replaced_file() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.bin");
        write(&path, |w| w.write_all(b"1")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        write(&path, |w| w.write_all(b"2")).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
    }
}
