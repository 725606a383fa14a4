//! Known attacks on readers of model files, one row each: what lies there, and the words of the refusal. The
//! table of `docs/security.md` is this one; `tests/fuzz/bombs.rs` counts what the greedy ones take.

mod base_rows;
mod gguf_rows;
mod rows;
mod zip_rows;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use microlora::Error;
use microlora::format::scan::scan;
use microlora::format::{
    Limits, LoadOptions, MAX_HEADER, PeftOptions, STYLES, load, read, save_peft, save_single, save_style,
};

use microlora::fuse::{FuseOptions, fuse, unfuse};

use super::entry::base::adapter;
use super::samples::*;
use base_rows::BASE_ATTACKS;
use gguf_rows::GGUF_ATTACKS;
use rows::ATTACKS;
use zip_rows::ZIP_ATTACKS;

/// Puts an attack into a directory, and gives the path to load.
type Place = fn(&Path) -> PathBuf;

struct Attack {
    name: &'static str,
    place: Place,
    /// As [`kind_of`] calls it.
    kind: &'static str,
    /// What the error says beside the file.
    words: &'static [&'static str],
}

fn put(dir: &Path, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
    fs::write(dir.join(name), bytes).unwrap();
    dir.join(name)
}

fn file_of(header: impl AsRef<[u8]>, data: &[u8]) -> Vec<u8> {
    let header = header.as_ref();
    [&(header.len() as u64).to_le_bytes()[..], header, data].concat()
}

fn file(dir: &Path, header: impl AsRef<[u8]>, data: &[u8]) -> PathBuf {
    put(dir, "a.safetensors", file_of(header, data))
}

const LORA: &str = r#"{"peft_type": "LORA", "r": 2}"#;

/// A PEFT directory that is sound but for what the caller changes.
fn peft(dir: &Path, config: &str) -> PathBuf {
    write_dir(dir, config, &pair("q", 2));
    dir.to_owned()
}

fn peft_header(dir: &Path, header: impl AsRef<[u8]>, data: &[u8]) -> PathBuf {
    put(dir, "adapter_config.json", LORA);
    put(dir, "adapter_model.safetensors", file_of(header, data));
    dir.to_owned()
}

/// An entry of a header: its name as JSON text.
fn entry(name: &str, shape: &str, offsets: [u64; 2]) -> String {
    format!(r#""{name}":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets:?}}}"#)
}

fn link(dir: &Path, to: impl AsRef<Path>) -> PathBuf {
    std::os::unix::fs::symlink(to, dir.join("link")).unwrap();
    dir.join("link")
}

fn fifo(dir: &Path, name: &str) -> PathBuf {
    assert!(Command::new("mkfifo").arg(dir.join(name)).status().unwrap().success());
    dir.join(name)
}

/// A zip archive of one stored member.
fn zip(name: &str, content: &[u8]) -> Vec<u8> {
    let mut common = vec![20, 0, 0, 0, 0, 0, 0, 0, 0x21, 0];
    common.extend_from_slice(&crc32fast::hash(content).to_le_bytes());
    common.extend_from_slice(&(content.len() as u32).to_le_bytes().repeat(2));
    common.extend_from_slice(&(name.len() as u16).to_le_bytes());
    common.extend_from_slice(&[0, 0]);
    let directory = [&b"PK\x01\x02\x14\0"[..], &common, &[0; 14], name.as_bytes()].concat();
    let start = (30 + name.len() + content.len()) as u32;
    let end = [
        &[0u8, 0, 0, 0, 1, 0, 1, 0][..],
        &(directory.len() as u32).to_le_bytes(),
        &start.to_le_bytes(),
        &[0, 0],
    ]
    .concat();
    [&b"PK\x03\x04"[..], &common, name.as_bytes(), content, &directory, b"PK\x05\x06", &end].concat()
}

fn npz(dir: &Path, bytes: Vec<u8>) -> PathBuf {
    put(dir, "a.npz", bytes)
}

/// A GGUF file: counts of tensors and keys, then what follows.
fn gguf(dir: &Path, tensors: u64, keys: u64, body: &[u8]) -> PathBuf {
    let head = [&b"GGUF\x03\0\0\0"[..], &tensors.to_le_bytes(), &keys.to_le_bytes()].concat();
    put(dir, "a.gguf", [&head[..], body].concat())
}

fn text(s: &str) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat()
}

fn gguf_key(key: &str, value: &str) -> Vec<u8> {
    [text(key), 8u32.to_le_bytes().to_vec(), text(value)].concat()
}

/// The keys that every adapter has, and the tensors that the caller gives.
fn gguf_tensors(dir: &Path, tensors: &[(&str, &[u64], u64)]) -> PathBuf {
    let keys = [
        gguf_key("general.type", "adapter"),
        gguf_key("adapter.type", "lora"),
        gguf_key("general.architecture", "llama"),
    ];
    let info = |(name, dims, offset): &(&str, &[u64], u64)| {
        let dims: Vec<u8> = dims.iter().flat_map(|d| d.to_le_bytes()).collect();
        let count = (dims.len() as u32 / 8).to_le_bytes();
        [&text(name)[..], &count, &dims, &[0; 4], &offset.to_le_bytes()].concat()
    };
    let body = [keys.concat(), tensors.iter().flat_map(info).collect(), vec![0; 256]].concat();
    gguf(dir, tensors.len() as u64, 3, &body)
}

fn kind_of(e: &Error) -> &'static str {
    match e {
        Error::Format { .. } => "format",
        Error::Unsupported { .. } => "unsupported",
        Error::Io { .. } => "io",
        Error::Config { .. } => "config",
        _ => "another",
    }
}

fn check(attack: &Attack) {
    let dir = tempfile::tempdir().unwrap();
    let path = (attack.place)(dir.path());
    let entries = || fs::read_dir(dir.path()).unwrap().count();
    let before = entries();
    for (mmap, strict) in [(false, true), (false, false), (true, true)] {
        let Attack { name, kind, words, .. } = attack;
        let err = match read(&path, &LoadOptions { mmap, strict, ..STRICT }) {
            Ok(loaded) => panic!("{name}: read as {}", loaded.format),
            Err(e) => e,
        };
        let said = err.to_string();
        assert_eq!(kind_of(&err), *kind, "{name}: {said}");
        // Long enough to say what is wrong, and never a page.
        let most = 2000 + path.as_os_str().len();
        assert!(said.len() < most, "{name}: {} bytes", said.len());
        assert!(words.iter().all(|w| said.contains(w)), "{name}: {said:?} does not say {words:?}");
        let file = path.file_name().unwrap().to_string_lossy();
        assert!(said.contains(&*file), "{name}: {said:?} does not name {file}");
    }
    assert_eq!(entries(), before, "{}: files were made", attack.name);
}

#[test]
fn every_attack_is_refused_with_words() {
    ATTACKS.iter().for_each(check);
}

#[test]
fn every_attack_by_an_archive_is_refused_with_words() {
    ZIP_ATTACKS.iter().for_each(check);
}

#[test]
fn every_attack_by_gguf_is_refused_with_words() {
    GGUF_ATTACKS.iter().for_each(check);
}

/// Name of a side-car among the rows of base models.
const CAR: &str = "car.safetensors";

#[test]
fn every_attack_by_a_base_model_is_refused_with_words() {
    for Attack { name, place, kind, words } in BASE_ATTACKS {
        let (dir, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (path, out) = (place(dir.path()), out.path().join("out"));
        let fused = dir.path().join("fused.safetensors");
        let done = match path.ends_with(CAR) {
            true => unfuse(&fused, &path, &out, &mut |_, _| Ok(())),
            false => fuse(&path, &adapter(), &out, &FuseOptions::default(), &mut |_, _| Ok(())),
        };
        let err = match done {
            Ok(_) => panic!("{name}: done"),
            Err(e) => e,
        };
        let said = err.to_string();
        assert_eq!(kind_of(&err), *kind, "{name}: {said}");
        assert!(said.len() < 2000, "{name}: {} bytes", said.len());
        assert!(words.iter().all(|w| said.contains(w)), "{name}: {said:?} does not say {words:?}");
        assert!(!out.exists(), "{name}: a model that is not whole");
    }
}

/// The doctor looks at what no reader takes, and says of a broken container what its reader says.
#[test]
fn the_doctor_looks_at_every_attack() {
    let (mut broken, mut sound) = (0, Vec::new());
    for Attack { name, place, words, .. } in ATTACKS.iter().chain(GGUF_ATTACKS) {
        let dir = tempfile::tempdir().unwrap();
        let path = place(dir.path());
        let container = path.file_name().is_some_and(|n| n == "a.safetensors");
        let Ok(found) = scan(&path, &Limits::default()) else { continue };
        let Some(damage) = found.damage else {
            sound.extend(container.then_some(*name)); // its tensors are no adapter's
            continue;
        };
        assert!(found.tensors.is_empty() && damage.len() < 2000 + path.as_os_str().len(), "{name}");
        if container {
            broken += 1;
            assert!(words.iter().all(|w| damage.contains(w)), "{name}: {damage:?} does not say {words:?}");
        }
    }
    assert!(broken > 15 && sound.len() < 4, "{broken} {sound:?}");
}

/// The documentation lists the rows, in their order.
#[test]
fn the_documentation_has_the_table() {
    let row = |a: &Attack| {
        let kind = match a.kind {
            "format" => "`FormatError`",
            "unsupported" => "`UnsupportedVariantError`",
            "config" => "`ConfigError`",
            _ => "`OSError`",
        };
        format!("| {} | {kind} |\n", a.name)
    };
    let table: String =
        ATTACKS.iter().chain(ZIP_ATTACKS).chain(GGUF_ATTACKS).chain(BASE_ATTACKS).map(row).collect();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/security.md");
    let page = fs::read_to_string(&path).unwrap();
    if std::env::var_os("MICROLORA_WRITE_TABLE").is_some() {
        let (before, rest) = page.split_once("<!-- attacks -->\n").unwrap();
        let (_, after) = rest.split_once("<!-- /attacks -->\n").unwrap();
        let head = "| what lies there | error |\n|---|---|\n";
        let new = format!("{before}<!-- attacks -->\n{head}{table}<!-- /attacks -->\n{after}");
        return fs::write(&path, new).unwrap();
    }
    assert!(page.contains(&table), "docs/security.md lacks rows: make fuzz-corpus writes them");
}

#[test]
fn links_to_sound_files_are_followed() {
    let dir = tempfile::tempdir().unwrap();
    save_single(&dir.path().join("one"), &parts()).unwrap();
    fs::create_dir(dir.path().join("peft")).unwrap();
    save_peft(&dir.path().join("peft"), &parts(), &PeftOptions::default()).unwrap();
    for (to, name) in [("one", "a"), ("peft", "b")] {
        std::os::unix::fs::symlink(dir.path().join(to), dir.path().join(name)).unwrap();
        assert_eq!(load(&dir.path().join(name), &STRICT).unwrap().parts.modules, parts().modules);
    }
}

#[test]
fn names_never_become_paths() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["../../x", "/tmp/x", "a/../b", "C:\\x"] {
        let inner = dir.path().join("a/b/c");
        fs::create_dir_all(&inner).unwrap();
        let mut loaded = microlora::format::Loaded::default();
        loaded.parts.modules = vec![module(name, 2, 4.0)];
        save_single(&inner.join("single"), &loaded.parts).unwrap();
        save_peft(&inner.join("peft"), &loaded.parts, &PeftOptions::default()).unwrap();
        for style in &STYLES {
            // Some styles have no place for such a name, and say so.
            let saved = save_style(&inner.join(style.name), &loaded, style.name, &[]);
            assert!(!matches!(saved, Err(Error::Io { .. })), "{name:?} {}: {saved:?}", style.name);
        }
        for path in [inner.join("single"), inner.join("peft")] {
            assert_eq!(load(&path, &STRICT).unwrap().parts.modules[0].path, name);
        }
        fs::remove_dir_all(dir.path().join("a/b/c")).unwrap();
        let left: Vec<_> = fs::read_dir(dir.path().join("a/b")).unwrap().collect();
        assert!(left.is_empty(), "{name:?} left {left:?}");
        assert_eq!(contents(dir.path()).len(), 1);
    }
}

/// The default load copies: whatever happens to the file meanwhile is a value or a typed error.
#[test]
fn files_may_change_while_they_are_read() {
    use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("one");
    let large = vec![module("q", 40_000, 1.0)];
    save_single(&path, &microlora::format::AdapterParts { modules: large, ..Default::default() }).unwrap();
    let whole = fs::read(&path).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|s| {
        s.spawn(|| {
            for round in 0u64.. {
                let file = fs::File::options().write(true).open(&path).unwrap();
                file.set_len(whole.len() as u64 * (round % 7) / 4).unwrap();
                if round % 5 == 0 {
                    fs::write(&path, &whole).unwrap();
                }
                if done.load(Relaxed) {
                    return;
                }
            }
        });
        let other = (0..300).find_map(|_| match load(&path, &STRICT) {
            Ok(_) | Err(Error::Format { .. } | Error::Unsupported { .. }) => None,
            Err(other) => Some(other),
        });
        done.store(true, Relaxed);
        assert!(other.is_none(), "{other:?}");
    });
}

#[test]
fn a_file_that_may_not_be_read_is_an_error_of_the_system() {
    use std::os::unix::fs::PermissionsExt;

    let dir = tempfile::tempdir().unwrap();
    let path = put(dir.path(), "a", b"{}");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o0)).unwrap();
    if fs::read(&path).is_ok() {
        return; // nothing is forbidden to this user
    }
    assert!(matches!(read(&path, &STRICT), Err(Error::Io { .. })));
}
