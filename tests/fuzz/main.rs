//! Every parser on its kept corpus and on mutations of it: no panic, no hang, no more memory or time than
//! the file's size allows. `MICROLORA_FUZZ_SECONDS=60` runs each for a minute, `MICROLORA_FUZZ_SEED=2` other
//! mutations, `MICROLORA_FUZZ_REPLAY=file` one input. The entries are those of `fuzz/`.

mod bombs;
mod corpus;
#[path = "../format/entry.rs"]
mod format;
#[path = "../journal/entry.rs"]
mod journal;
mod large;
mod memory;
mod mutate;
mod run;
#[allow(dead_code)] // shared with the tests of the formats
#[path = "../format/samples.rs"]
mod samples;
mod structured;

use mutate::Shape;
use run::Target;

macro_rules! targets {
    ($($name:ident: $shape:ident, $entry:path, $rounds:literal;)*) => {
        /// All of them, by name.
        pub static TARGETS: &[Target] = &[$(Target {
            name: stringify!($name),
            shape: Shape::$shape,
            entry: $entry,
            rounds: $rounds,
        }),*];

        $(#[test]
        fn $name() {
            watch();
            let target = TARGETS.iter().find(|t| t.name == stringify!($name));
            run::target(target.expect("a row"));
        })*
    };
}

// Those of few rounds write what they read, which waits for the disk.
targets! {
    single: Safetensors, format::single, 6000;
    quantized: Safetensors, format::quantized, 6000;
    peft_config: Json, format::config, 6000;
    peft_dir: Pair, format::peft_dir, 6000;
    mlx: Pair, format::mlx, 300;
    kohya: Safetensors, format::kohya, 300;
    diffusers: Safetensors, format::diffusers, 300;
    flat: Safetensors, format::flat, 300;
    gguf: Raw, format::gguf, 6000;
    npz: Zip, format::npz, 300;
    file: Raw, format::file, 3000;
    scan: Safetensors, format::scan, 1000;
    base_model: Pair, format::base::model, 300;
    sidecar: Safetensors, format::base::sidecar, 300;
    journal: Raw, journal::segment, 1000;
    event: Raw, journal::event, 20000;
}

/// Lets the entries count what their parsers take.
pub fn watch() {
    format::WATCH.get_or_init(|| run::watched);
    journal::WATCH.get_or_init(|| run::watched);
}

/// Every target is one of `fuzz/` too, and the other way round.
#[test]
fn the_same_targets_are_fuzzed() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    let cargo = std::fs::read_to_string(root.join("Cargo.toml")).unwrap();
    let there: Vec<&str> =
        cargo.split("[[bin]]\nname = \"").skip(1).map(|s| s.split('"').next().unwrap()).collect();
    let here: Vec<&str> = TARGETS.iter().map(|t| t.name).collect();
    let sorted = |mut v: Vec<&'static str>| {
        v.sort_unstable();
        v
    };
    let there: Vec<&'static str> = there.into_iter().map(|s| &*String::from(s).leak()).collect();
    assert_eq!(sorted(there), sorted(here));
    for t in TARGETS {
        assert!(root.join("fuzz_targets").join(format!("{}.rs", t.name)).is_file(), "{}", t.name);
        assert!(run::corpus_of(t.name).is_dir(), "{}", t.name);
    }
}
