//! Base models on disk: one safetensors file, or a folder with one or with an index and its shards.
//!
//! Only headers are read here. Tensors are read by position, piece by piece, so that a model of any size needs
//! no memory and a file that is cut short while it is read is an error, not a fault.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::budget::Budget;
use super::container::{self, Entry, Heading};
use super::json::{self, show};
use super::source;
use crate::error::{Error, Result};

/// The weights of a folder that has no index.
pub(crate) const WEIGHTS: &str = "model.safetensors";
/// The index of a folder with shards.
pub(crate) const INDEX: &str = "model.safetensors.index.json";
/// Endings of files that hold weights in another form.
const OTHER_WEIGHTS: [&str; 9] = ["safetensors", "bin", "pt", "pth", "gguf", "h5", "msgpack", "onnx", "ckpt"];

/// One safetensors file, open, with its header.
pub(crate) struct Shard {
    /// File name without folder.
    pub name: String,
    path: PathBuf,
    file: File,
    /// Length field and header, as they stand in the file.
    pub head: Vec<u8>,
    pub metadata: BTreeMap<String, String>,
    /// In the order of their bytes.
    pub entries: Vec<Entry>,
    /// Bytes of the file.
    pub len: usize,
}

impl Shard {
    /// Opens a file and reads its header.
    pub fn open(path: &Path) -> Result<Self> {
        let at = |e| Error::io(path, e);
        let name = path.display().to_string();
        let (file, meta) = source::open_regular(path, "neither a regular file nor a folder")?;
        let len = usize::try_from(meta.len())
            .map_err(|_| Error::format(&name, "more bytes than can be addressed"))?;
        let mut first = vec![0; len.min(64)];
        read_exact_at(&file, &mut first, 0).map_err(at)?;
        source::sniff(&first, &name)?;
        let mut head = vec![0; container::heading_len(&first, len, &name)?];
        read_exact_at(&file, &mut head, 0).map_err(at)?;
        let Heading { metadata, entries } = container::parse_heading(&head, len, &name)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Shard { name, path: path.to_owned(), file, head, metadata, entries, len })
    }

    /// Fills `out` from byte `at` of the file.
    pub fn read(&self, at: usize, out: &mut [u8]) -> Result<()> {
        read_exact_at(&self.file, out, at as u64).map_err(|e| Error::io(&self.path, e))
    }

    /// The name that errors carry.
    pub fn display(&self) -> String {
        self.path.display().to_string()
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, out: &mut [u8], at: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, out, at)
}

#[cfg(not(unix))]
fn read_exact_at(mut file: &File, out: &mut [u8], at: u64) -> io::Result<()> {
    use io::{Read, Seek, SeekFrom};
    file.seek(SeekFrom::Start(at))?;
    file.read_exact(out)
}

/// A base model.
pub(crate) struct Model {
    /// The file or folder.
    pub path: PathBuf,
    /// Whether `path` is a folder.
    pub is_dir: bool,
    /// The files that hold tensors, by name.
    pub shards: Vec<Shard>,
    /// Other files of the folder that belong to the model: settings, tokenizer, index.
    pub others: Vec<(String, PathBuf)>,
    /// What of the folder is not taken along: sub-folders, weights in other forms.
    pub left_out: Vec<String>,
    places: HashMap<String, (usize, usize)>,
}

impl Model {
    /// Opens a model; `arg` is the argument that errors name.
    pub fn open(path: &Path, arg: &str) -> Result<Self> {
        let is_dir = fs::metadata(path).map_err(|e| Error::io(path, e))?.is_dir();
        let (names, index) = if is_dir { weights_of(path, arg)? } else { (Vec::new(), None) };
        let shards = match is_dir {
            true => names.iter().map(|n| Shard::open(&path.join(n))).collect::<Result<Vec<_>>>()?,
            false => vec![Shard::open(path)?],
        };
        let mut model = Model {
            path: path.to_owned(),
            is_dir,
            shards,
            others: vec![],
            left_out: vec![],
            places: HashMap::new(),
        };
        model.find_places()?;
        if let Some(index) = &index {
            model.check_index(index)?;
        }
        if is_dir {
            model.list_others(&names)?;
        }
        Ok(model)
    }

    fn find_places(&mut self) -> Result<()> {
        for (s, shard) in self.shards.iter().enumerate() {
            for (e, entry) in shard.entries.iter().enumerate() {
                if let Some((other, _)) = self.places.insert(entry.name.clone(), (s, e)) {
                    let reason = format!(
                        "tensor {} is in {} as well",
                        show(&entry.name),
                        show(&self.shards[other].name)
                    );
                    return Err(Error::format(shard.display(), reason));
                }
            }
        }
        Ok(())
    }

    fn check_index(&self, index: &Index) -> Result<()> {
        for (name, file) in index {
            let found = self.places.get(name).map(|&(s, _)| &self.shards[s].name);
            if found != Some(file) {
                let what = found.map_or("it is in no shard".to_owned(), |f| format!("it is in {}", show(f)));
                let reason = format!("tensor {} is listed in {}, but {what}", show(name), show(file));
                return Err(Error::format(self.path.join(INDEX).display(), reason));
            }
        }
        Ok(())
    }

    fn list_others(&mut self, weights: &[String]) -> Result<()> {
        let at = |e| Error::io(&self.path, e);
        let mut found: Vec<_> =
            fs::read_dir(&self.path).map_err(at)?.collect::<io::Result<_>>().map_err(at)?;
        found.sort_by_key(|e| e.file_name());
        for entry in found {
            let (name, path) = (entry.file_name().to_string_lossy().into_owned(), entry.path());
            if weights.contains(&name) {
                continue;
            }
            let ending = path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase());
            let weights = ending.is_some_and(|e| OTHER_WEIGHTS.contains(&e.as_str()));
            // Links are followed: the folders of a download cache consist of links.
            if weights || !fs::metadata(&path).is_ok_and(|m| m.is_file()) {
                self.left_out.push(name);
            } else {
                self.others.push((name, path));
            }
        }
        Ok(())
    }

    /// Shard and entry of a tensor.
    pub fn find(&self, name: &str) -> Option<(usize, usize)> {
        self.places.get(name).copied()
    }

    /// A tensor of a place.
    pub fn entry(&self, (shard, entry): (usize, usize)) -> &Entry {
        &self.shards[shard].entries[entry]
    }

    /// Every tensor's name, in no order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    /// Bytes of all shards.
    pub fn bytes(&self) -> usize {
        self.shards.iter().map(|s| s.len).sum()
    }

    /// A value of the folder's `config.json`, where it has one that can be read.
    pub fn setting(&self, key: &str) -> Option<Value> {
        let (_, path) = self.others.iter().find(|(name, _)| name == "config.json")?;
        let text = source::Text::read(path).ok()?.text;
        json::parse_object(&text).ok()?.remove(key)
    }
}

/// Tensor to file.
type Index = BTreeMap<String, String>;

/// Names of the weight files of a folder, and the index where there is one.
fn weights_of(dir: &Path, arg: &str) -> Result<(Vec<String>, Option<Index>)> {
    let index = dir.join(INDEX);
    match (dir.join(WEIGHTS).is_file(), index.is_file()) {
        (true, false) => Ok((vec![WEIGHTS.to_owned()], None)),
        (false, true) => {
            let map = read_index(&index)?;
            let files: BTreeSet<&String> = map.values().collect();
            Ok((files.into_iter().cloned().collect(), Some(map)))
        }
        (true, true) => Err(Error::config(
            arg,
            format!("{} with both {WEIGHTS} and {INDEX}", show(&dir.display().to_string())),
            "a folder with one of them",
        )),
        (false, false) => Err(Error::config(
            arg,
            show(&dir.display().to_string()),
            format!("a safetensors file, or a folder with {WEIGHTS} or {INDEX}"),
        )),
    }
}

fn read_index(path: &Path) -> Result<Index> {
    let wrong = |reason: String| Error::format(path.display(), reason);
    // It describes files that are much larger than itself; its shortest entries take some eight times their text.
    let text = source::Text::read(path)?.text;
    let object = json::parse_object_within(&text, Budget::of_file(8 * text.len())).map_err(wrong)?;
    let Some(Value::Object(map)) = object.get("weight_map") else {
        return Err(wrong("no `weight_map` of tensors to files".into()));
    };
    let mut out = BTreeMap::new();
    for (tensor, file) in map {
        let name = file.as_str().filter(|f| is_plain(f)).ok_or_else(|| {
            wrong(format!(
                "weight_map[{}]: got {}, expected the name of a safetensors file in this folder",
                show(tensor),
                json::show_value(file)
            ))
        })?;
        out.insert(tensor.clone(), name.to_owned());
    }
    if out.is_empty() {
        return Err(wrong("weight_map: lists no tensor".into()));
    }
    Ok(out)
}

/// A file name that leads nowhere else.
fn is_plain(name: &str) -> bool {
    name.ends_with(".safetensors") && !name.contains(['/', '\\', '\0']) && !name.starts_with('.')
}
