//! A save that fails leaves what was there, and nothing else.

use std::fs;
use std::path::Path;

use microlora::Error;
use microlora::format::{AdapterParts, PeftOptions, load, save_peft, save_single};

use super::samples::*;

fn big() -> AdapterParts {
    AdapterParts { modules: vec![module("q", 20_000, 1.0)], ..AdapterParts::default() }
}

/// Where the process may write only small files, writing a large one fails half-way as on a full disk.
/// The limit is the process's own, so this test runs in a child that the next one starts.
#[test]
fn child_with_a_file_size_limit() {
    let Some(dir) = std::env::var_os("MICROLORA_TEST_LIMITED_DIR") else { return };
    let dir = Path::new(&dir);
    let before = contents(dir);
    let pair = dir.join("peft");
    let pair_before = contents(&pair);
    for err in [
        save_single(&dir.join("one"), &big()).unwrap_err(),
        save_single(&dir.join("new"), &big()).unwrap_err(),
        save_peft(&pair, &big(), &PeftOptions::default()).unwrap_err(),
        save_peft(&dir.join("fresh"), &big(), &PeftOptions::default()).unwrap_err(),
    ] {
        assert!(matches!(&err, Error::Io { path, .. } if path.starts_with(dir.to_str().unwrap())), "{err}");
    }
    assert_eq!(contents(dir), before);
    assert_eq!(contents(&pair), pair_before);
    println!("limited child done");
}

#[cfg(unix)]
#[test]
fn full_disk_leaves_the_old_files() {
    let dir = tempfile::tempdir().unwrap();
    save_single(&dir.path().join("one"), &parts()).unwrap();
    save_peft(&dir.path().join("peft"), &parts(), &PeftOptions::default()).unwrap();
    let run =
        "trap '' XFSZ; ulimit -f 64; exec \"$0\" --exact disk::child_with_a_file_size_limit --nocapture";
    let out = std::process::Command::new("sh")
        .args(["-c", run])
        .arg(std::env::current_exe().unwrap())
        .env("MICROLORA_TEST_LIMITED_DIR", dir.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(
        out.status.success() && text.contains("limited child done"),
        "{text}{}",
        String::from_utf8_lossy(&out.stderr)
    );
    assert_eq!(load(&dir.path().join("one"), &STRICT).unwrap().parts, parts());
    assert_eq!(load(&dir.path().join("peft"), &STRICT).unwrap().parts.modules, parts().modules);
}

#[test]
fn a_place_that_cannot_be_written_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, b"x").unwrap();
    for path in [file.join("below"), dir.path().join("no/such/dir"), dir.path().to_owned()] {
        assert!(matches!(save_single(&path, &parts()), Err(Error::Io { .. })), "{path:?}");
    }
    assert!(matches!(save_peft(&file, &parts(), &PeftOptions::default()), Err(Error::Io { .. })));
    assert!(matches!(
        save_peft(&file.join("below"), &parts(), &PeftOptions::default()),
        Err(Error::Io { .. })
    ));
    // A directory sits where one of the two files should go.
    for blocked in ["adapter_model.safetensors", "adapter_config.json"] {
        let pair = dir.path().join(blocked);
        save_peft(&pair, &parts(), &PeftOptions::default()).unwrap();
        fs::remove_file(pair.join(blocked)).unwrap();
        fs::create_dir(pair.join(blocked)).unwrap();
        let before = contents(&pair);
        assert!(matches!(save_peft(&pair, &parts(), &PeftOptions::default()), Err(Error::Io { .. })));
        assert_eq!(contents(&pair), before);
    }
    assert_eq!(fs::read(&file).unwrap(), b"x");
}

#[test]
fn an_interrupted_replacement_is_not_read_as_a_pair() {
    let dir = tempfile::tempdir().unwrap();
    save_peft(dir.path(), &parts(), &PeftOptions::default()).unwrap();
    let old = contents(dir.path());
    // The state between the two renames: the new weights, and the old configuration set aside.
    fs::rename(dir.path().join("adapter_config.json"), dir.path().join(".adapter_config.json.previous"))
        .unwrap();
    assert!(
        matches!(load(dir.path(), &STRICT), Err(Error::Format { reason, .. }) if reason.contains("adapter_config.json"))
    );
    save_peft(dir.path(), &parts(), &PeftOptions::default()).unwrap();
    assert_eq!(contents(dir.path()), old);
}

#[test]
fn readers_of_a_directory_see_whole_pairs() {
    let dir = tempfile::tempdir().unwrap();
    let versions: Vec<AdapterParts> = (1..=2)
        .map(|k| AdapterParts { modules: vec![module("q", 2 * k, k as f64)], ..AdapterParts::default() })
        .collect();
    save_peft(dir.path(), &versions[0], &PeftOptions::default()).unwrap();
    let done = std::sync::atomic::AtomicBool::new(false);
    let seen = std::thread::scope(|s| {
        let reader = s.spawn(|| {
            let mut seen = 0;
            loop {
                let last = done.load(std::sync::atomic::Ordering::Relaxed);
                match load(dir.path(), &STRICT) {
                    Ok(loaded) => {
                        let m = &loaded.parts.modules[0];
                        assert_eq!(m.alpha * 2.0, m.rank as f64);
                        seen += 1;
                    }
                    // Between two states there may be no pair, never a mixed one.
                    Err(Error::Format { reason, .. }) => {
                        assert!(
                            reason.contains("changed while") || reason.contains("no adapter_config.json"),
                            "{reason}"
                        );
                    }
                    Err(Error::Io { source, .. }) => assert_eq!(source.kind(), std::io::ErrorKind::NotFound),
                    Err(other) => panic!("{other}"),
                }
                if last {
                    return seen;
                }
            }
        });
        for i in 0..60 {
            save_peft(dir.path(), &versions[i % 2], &PeftOptions::default()).unwrap();
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        reader.join().unwrap()
    });
    assert!(seen > 0);
}
