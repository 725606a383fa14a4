//! Known attacks on readers of model files, one row each: what lies there, and the words of the refusal. The
//! table of `docs/security.md` is this one; `tests/fuzz/bombs.rs` counts what the greedy ones take.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use microlora::Error;
use microlora::format::{
    LoadOptions, MAX_HEADER, PeftOptions, STYLES, load, read, save_peft, save_single, save_style,
};

use super::samples::*;

/// Puts an attack into a directory, and gives the path to load.
type Place = fn(&Path) -> PathBuf;

struct Attack {
    name: &'static str,
    place: Place,
    /// "format", "unsupported" or "io".
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

const ATTACKS: &[Attack] = &[
    // --- safetensors: offsets and shapes
    Attack {
        name: "overlapping tensors",
        place: |d| {
            file(d, format!("{{{},{}}}", entry("a", "[1]", [0, 4]), entry("b", "[1]", [2, 6])), &[0; 6])
        },
        kind: "format",
        words: &["\"b\"", "overlaps"],
    },
    Attack {
        name: "a hole between tensors",
        place: |d| file(d, format!("{{{}}}", entry("a", "[1]", [1, 5])), &[0; 5]),
        kind: "format",
        words: &["\"a\"", "hole"],
    },
    Attack {
        name: "bytes that no tensor covers",
        place: |d| file(d, format!("{{{}}}", entry("a", "[1]", [0, 4])), &[0; 9]),
        kind: "format",
        words: &["9 bytes of data"],
    },
    Attack {
        name: "a tensor beyond the end of the file",
        place: |d| file(d, format!("{{{}}}", entry("a", "[1000000]", [0, 4_000_000])), &[0; 4]),
        kind: "format",
        words: &["\"a\"", "truncated"],
    },
    Attack {
        name: "a shape whose product overflows",
        place: |d| file(d, format!("{{{}}}", entry("a", "[9223372036854775807,3]", [0, 4])), &[0; 4]),
        kind: "format",
        words: &["\"a\"", "overflow"],
    },
    Attack {
        name: "offsets at the end of the address space",
        place: |d| file(d, format!("{{{}}}", entry("a", "[1]", [u64::MAX - 3, u64::MAX])), &[0; 4]),
        kind: "format",
        words: &["\"a\"", "hole"],
    },
    Attack {
        name: "a number beyond 64 bits",
        place: |d| file(d, format!("{{{}}}", entry("a", "[1e30]", [0, 4])), &[0; 4]),
        kind: "format",
        words: &["\"a\""],
    },
    Attack {
        name: "a negative dimension",
        place: |d| file(d, format!("{{{}}}", entry("a", "[-1]", [0, 4])), &[0; 4]),
        kind: "format",
        words: &["\"a\"", "-1"],
    },
    // --- safetensors: headers
    Attack {
        name: "a header length of 2^64 - 1",
        place: |d| put(d, "a.safetensors", [&u64::MAX.to_le_bytes()[..], b"{}"].concat()),
        kind: "format",
        words: &["limit"],
    },
    Attack {
        name: "a header that the file is too short for",
        place: |d| put(d, "a.safetensors", [&(MAX_HEADER as u64).to_le_bytes()[..], b"{}"].concat()),
        kind: "format",
        words: &["truncated"],
    },
    Attack {
        name: "a header of 100 MB of spaces",
        place: |d| file(d, format!("{{}}{}", " ".repeat(MAX_HEADER - 2)), b""),
        kind: "format",
        words: &["no tensor"],
    },
    Attack {
        name: "a million tensors of no bytes",
        place: |d| {
            let all: Vec<String> = (0..1 << 20).map(|i| entry(&format!("{i:x}"), "[0]", [0, 0])).collect();
            file(d, format!("{{{}}}", all.join(",")), b"")
        },
        kind: "format",
        words: &["tensors", "memory"],
    },
    Attack {
        name: "JSON nested 10 million deep",
        place: |d| file(d, format!("{{\"a\":{}", "[".repeat(10_000_000)), b""),
        kind: "format",
        words: &["header"],
    },
    Attack {
        name: "a name of a million characters",
        place: |d| file(d, format!("{{{}}}", entry(&"x".repeat(1_000_000), "[0]", [0, 0])), b""),
        kind: "format",
        words: &["1000000 characters"],
    },
    Attack {
        name: "a value of 50 MB",
        place: |d| file(d, format!(r#"{{"__metadata__":{{"a":"{}"}}}}"#, "x".repeat(50_000_000)), b""),
        kind: "format",
        words: &["string", "50000000 bytes", "memory"],
    },
    Attack {
        name: "a repeated tensor name",
        place: |d| file(d, format!("{{{0},{0}}}", entry("a", "[1]", [0, 4])), &[0; 4]),
        kind: "format",
        words: &["\"a\" appears twice"],
    },
    Attack {
        name: "a repeated key in the metadata",
        place: |d| file(d, r#"{"__metadata__":{"a":"1","a":"2"}}"#, b""),
        kind: "format",
        words: &["\"a\" appears twice"],
    },
    Attack {
        name: "metadata twice",
        place: |d| file(d, r#"{"__metadata__":{},"__metadata__":{}}"#, b""),
        kind: "format",
        words: &["__metadata__", "appears twice"],
    },
    // --- names
    Attack {
        name: "a name that is half a surrogate pair",
        place: |d| file(d, format!("{{{}}}", entry("\\ud800", "[0]", [0, 0])), b""),
        kind: "format",
        words: &["escape"],
    },
    Attack {
        name: "a name that is not UTF-8",
        place: |d| file(d, b"{\"\xff\xfe\":1}", b""),
        kind: "format",
        words: &["UTF-8"],
    },
    Attack {
        name: "a NUL in a module's name",
        place: |d| {
            let name = |f| format!("base_model.model.a\\u0000b.lora_{f}.weight");
            let both = [entry(&name("A"), "[2,1]", [0, 8]), entry(&name("B"), "[1,2]", [8, 16])];
            peft_header(d, format!("{{{}}}", both.join(",")), &[0; 16])
        },
        kind: "format",
        words: &["a\\0b", "control characters"],
    },
    Attack {
        name: "two tensors of one module's factor",
        place: |d| {
            let both = [
                entry("base_model.model.q.lora_A.weight", "[2,1]", [0, 8]),
                entry("base_model.model.q.lora_A.default.weight", "[2,1]", [8, 16]),
            ];
            peft_header(d, format!("{{{}}}", both.join(",")), &[0; 16])
        },
        kind: "format",
        words: &["q.lora_A.weight", "q.lora_A.default.weight"],
    },
    // --- numbers
    Attack {
        name: "weights that are not finite",
        place: |d| {
            let both = [
                entry("base_model.model.q.lora_A.weight", "[2,1]", [0, 8]),
                entry("base_model.model.q.lora_B.weight", "[1,2]", [8, 16]),
            ];
            peft_header(d, format!("{{{}}}", both.join(",")), &f32::NAN.to_le_bytes().repeat(4))
        },
        kind: "format",
        words: &["q.lora_A.weight", "NaN"],
    },
    Attack {
        name: "a rank of 0",
        place: |d| peft(d, r#"{"peft_type": "LORA", "r": 0}"#),
        kind: "format",
        words: &["adapter_config.json", "r: got 0"],
    },
    Attack {
        name: "a rank of 2^32",
        place: |d| peft(d, r#"{"peft_type": "LORA", "r": 4294967296}"#),
        kind: "format",
        words: &["adapter_config.json", "r: got 4294967296"],
    },
    Attack {
        name: "an alpha beyond all numbers",
        place: |d| peft(d, r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 1e999}"#),
        kind: "format",
        words: &["adapter_config.json", "JSON"],
    },
    // --- configurations
    Attack {
        name: "a repeated key in the configuration",
        place: |d| peft(d, r#"{"peft_type": "LORA", "r": 2, "r": 3}"#),
        kind: "format",
        words: &["adapter_config.json", "\"r\" appears twice"],
    },
    Attack {
        name: "a configuration nested a million deep",
        place: |d| peft(d, &format!("{{\"a\": {}", "[".repeat(1_000_000))),
        kind: "format",
        words: &["adapter_config.json", "recursion"],
    },
    Attack {
        name: "a configuration of 17 MB",
        place: |d| peft(d, &format!("{}{LORA}", " ".repeat(17 << 20))),
        kind: "format",
        words: &["adapter_config.json", "more than"],
    },
    Attack {
        name: "a configuration of millions of values",
        place: |d| peft(d, &format!(r#"{{"peft_type": "LORA", "a": [{}0]}}"#, "0,".repeat(4_000_000))),
        kind: "format",
        words: &["adapter_config.json", "memory"],
    },
    Attack {
        name: "a pattern that takes exponential time elsewhere",
        place: |d| peft(d, r#"{"peft_type": "LORA", "r": 2, "rank_pattern": {"(a*)*\\1b": 2}}"#),
        kind: "unsupported",
        words: &["rank_pattern", "backreference"],
    },
    Attack {
        name: "a pattern that compiles to gigabytes",
        place: |d| peft(d, r#"{"peft_type": "LORA", "r": 2, "rank_pattern": {"((a{99}){99}){99}": 2}}"#),
        kind: "unsupported",
        words: &["rank_pattern", "size limit"],
    },
    Attack {
        name: "512 patterns that are large together",
        place: |d| {
            let all: Vec<String> = (0..512).map(|i| format!(r#""\\w{{{}}}": 2"#, 10 + i)).collect();
            peft(d, &format!(r#"{{"peft_type": "LORA", "r": 2, "rank_pattern": {{{}}}}}"#, all.join(",")))
        },
        kind: "unsupported",
        words: &["rank_pattern"],
    },
    // --- what lies at a path
    Attack { name: "an empty file", place: |d| put(d, "a", b""), kind: "format", words: &["0 bytes"] },
    Attack {
        name: "a named pipe",
        place: |d| fifo(d, "a.safetensors"),
        kind: "format",
        words: &["regular file"],
    },
    Attack {
        name: "a named pipe as configuration",
        place: |d| {
            peft(d, LORA);
            fs::remove_file(d.join("adapter_config.json")).unwrap();
            fifo(d, "adapter_config.json");
            d.to_owned()
        },
        kind: "format",
        words: &["adapter_config.json", "regular file"],
    },
    Attack {
        name: "a device without an end",
        place: |_| "/dev/zero".into(),
        kind: "format",
        words: &["/dev/zero", "regular file"],
    },
    Attack {
        name: "a link to a device",
        place: |d| link(d, "/dev/zero"),
        kind: "format",
        words: &["link", "regular file"],
    },
    Attack {
        name: "a link to nowhere",
        place: |d| link(d, d.join("missing")),
        kind: "io",
        words: &["link", "No such file"],
    },
    Attack {
        name: "a link to itself",
        place: |d| link(d, d.join("link")),
        kind: "io",
        words: &["link", "symbolic links"],
    },
    Attack {
        name: "weights that are a link to a device",
        place: |d| {
            put(d, "adapter_config.json", LORA);
            std::os::unix::fs::symlink("/dev/zero", d.join("adapter_model.safetensors")).unwrap();
            d.to_owned()
        },
        kind: "format",
        words: &["adapter_model.safetensors", "regular file"],
    },
    Attack {
        name: "a socket",
        place: |d| {
            drop(std::os::unix::net::UnixListener::bind(d.join("a")).unwrap());
            d.join("a")
        },
        kind: "format",
        words: &["regular file"],
    },
    Attack {
        name: "a directory where the weights should be",
        place: |d| {
            put(d, "adapter_config.json", LORA);
            fs::create_dir(d.join("adapter_model.safetensors")).unwrap();
            d.to_owned()
        },
        kind: "format",
        words: &["adapter_model.safetensors", "regular file"],
    },
    Attack {
        name: "a directory where the configuration should be",
        place: |d| {
            peft(d, LORA);
            fs::remove_file(d.join("adapter_config.json")).unwrap();
            fs::create_dir(d.join("adapter_config.json")).unwrap();
            d.to_owned()
        },
        kind: "format",
        words: &["adapter_config.json", "regular file"],
    },
    Attack {
        name: "the configuration in place of its directory",
        place: |d| peft(d, LORA).join("adapter_config.json"),
        kind: "format",
        words: &["adapter_config.json", "directory"],
    },
    Attack {
        name: "a path of 5,000 characters",
        place: |d| d.join("x".repeat(5000)),
        kind: "io",
        words: &["too long"],
    },
    Attack { name: "a path with a NUL", place: |d| d.join("a\0b"), kind: "io", words: &["NUL"] },
    // --- code
    Attack {
        name: "a pickle",
        place: |d| {
            put(d, "a.bin", b"\x80\x04\x95\x1a\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.")
        },
        kind: "unsupported",
        words: &["pickle", "torch.load(path, weights_only=True)"],
    },
    Attack {
        name: "a pickle under the name of safetensors",
        place: |d| put(d, "a.safetensors", b"\x80\x02cposix\nsystem\n."),
        kind: "unsupported",
        words: &["pickle"],
    },
    Attack {
        name: "an archive of torch",
        place: |d| put(d, "a.pt", zip("a/data.pkl", b"\x80\x02.")),
        kind: "unsupported",
        words: &["pickle"],
    },
    Attack {
        name: "a directory with pickled weights alone",
        place: |d| {
            put(d, "adapter_config.json", LORA);
            put(d, "adapter_model.bin", b"\x80\x02.");
            d.to_owned()
        },
        kind: "unsupported",
        words: &["adapter_model.bin", "pickle"],
    },
    // --- NumPy archives
    Attack {
        name: "an array of objects",
        place: |d| {
            let header = "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n";
            let npy = [&b"\x93NUMPY\x01\0"[..], &(header.len() as u16).to_le_bytes()[..], header.as_bytes()]
                .concat();
            npz(d, zip("a.lora_a.npy", &npy))
        },
        kind: "unsupported",
        words: &["pickle"],
    },
    Attack {
        name: "a member that leads out of the archive",
        place: |d| npz(d, zip("../../x.npy", b"")),
        kind: "format",
        words: &["../../x.npy", "leads out"],
    },
    Attack {
        name: "a member with an absolute path",
        place: |d| npz(d, zip("/etc/x.npy", b"")),
        kind: "format",
        words: &["/etc/x.npy", "leads out"],
    },
    Attack {
        name: "an archive inside an archive",
        place: |d| npz(d, zip("a.lora_a.npy", &zip("a.npy", b"x"))),
        kind: "format",
        words: &["a.lora_a", "NumPy header"],
    },
    Attack {
        name: "a member that says it inflates to 4 GB",
        place: |d| {
            let mut bytes = zip("a.lora_a.npy", b"x");
            let central = bytes.windows(4).position(|w| w == b"PK\x01\x02").unwrap();
            for at in [8, central + 10] {
                bytes[at] = 8;
            }
            for at in [22, central + 24] {
                bytes[at..at + 4].copy_from_slice(&0xffff_fffeu32.to_le_bytes());
            }
            npz(d, bytes)
        },
        kind: "format",
        words: &["4294967294 bytes", "limit"],
    },
    Attack {
        name: "an array of 2^60 numbers",
        place: |d| {
            let header = "{'descr': '<f4', 'fortran_order': False, 'shape': (1152921504606846976,), }\n";
            let npy = [&b"\x93NUMPY\x01\0"[..], &(header.len() as u16).to_le_bytes()[..], header.as_bytes()]
                .concat();
            npz(d, zip("a.lora_a.npy", &npy))
        },
        kind: "format",
        words: &["a.lora_a", "0 bytes of data"],
    },
];

const GGUF_ATTACKS: &[Attack] = &[
    Attack {
        name: "GGUF: 2^64 - 1 tensors and keys",
        place: |d| gguf(d, u64::MAX, u64::MAX, &[0; 64]),
        kind: "format",
        words: &["tensor count", "limit"],
    },
    Attack {
        name: "GGUF: more keys than bytes",
        place: |d| gguf(d, 0, u64::MAX, &[0; 64]),
        kind: "format",
        words: &["key count"],
    },
    Attack {
        name: "GGUF: a string of 2^64 - 1 bytes",
        place: |d| gguf(d, 0, 1, &[&u64::MAX.to_le_bytes()[..], &[0; 64]].concat()),
        kind: "format",
        words: &["truncated"],
    },
    Attack {
        name: "GGUF: an array of 2^61 numbers",
        place: |d| {
            let array = [&9u32.to_le_bytes()[..], &4u32.to_le_bytes(), &(1u64 << 61).to_le_bytes(), &[0; 64]]
                .concat();
            gguf(d, 0, 1, &[text("a"), array].concat())
        },
        kind: "format",
        words: &["truncated"],
    },
    Attack {
        name: "GGUF: arrays nested a million deep",
        place: |d| {
            let nested = [&9u32.to_le_bytes()[..], &1u64.to_le_bytes()].concat().repeat(1_000_000);
            gguf(d, 0, 1, &[text("a"), 9u32.to_le_bytes().to_vec(), nested].concat())
        },
        kind: "format",
        words: &["nested deeper"],
    },
    Attack {
        name: "GGUF: a repeated key",
        place: |d| gguf(d, 0, 2, &[gguf_key("a", "1"), gguf_key("a", "2")].concat()),
        kind: "format",
        words: &["\"a\" appears twice"],
    },
    Attack {
        name: "GGUF: a repeated tensor",
        place: |d| {
            let one: (&str, &[u64], u64) = ("q.weight.lora_a", &[2, 2], 0);
            gguf_tensors(d, &[one, one])
        },
        kind: "format",
        words: &["q.weight.lora_a", "twice"],
    },
    Attack {
        name: "GGUF: overlapping tensors",
        place: |d| gguf_tensors(d, &[("q.weight.lora_a", &[16, 1], 0), ("q.weight.lora_b", &[1, 8], 32)]),
        kind: "format",
        words: &["q.weight.lora_b", "overlaps"],
    },
    Attack {
        name: "GGUF: a shape whose product overflows",
        place: |d| gguf_tensors(d, &[("q.weight.lora_a", &[1 << 40, 1 << 40], 0)]),
        kind: "format",
        words: &["q.weight.lora_a", "overflows"],
    },
    Attack {
        name: "GGUF: a name that is not UTF-8",
        place: |d| gguf(d, 0, 1, &[&2u64.to_le_bytes()[..], b"\xff\xfe", &[0; 32]].concat()),
        kind: "format",
        words: &["UTF-8"],
    },
    Attack {
        name: "GGUF: a whole model given as an adapter",
        place: |d| gguf(d, 0, 1, &gguf_key("general.architecture", "llama")),
        kind: "unsupported",
        words: &["whole model", "llama"],
    },
];

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
        let got = match &err {
            Error::Format { .. } => "format",
            Error::Unsupported { .. } => "unsupported",
            Error::Io { .. } => "io",
            _ => "another",
        };
        let said = err.to_string();
        assert_eq!(got, *kind, "{name}: {said}");
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
fn every_attack_by_gguf_is_refused_with_words() {
    GGUF_ATTACKS.iter().for_each(check);
}

/// The documentation lists the rows, in their order.
#[test]
fn the_documentation_has_the_table() {
    let row = |a: &Attack| {
        let kind = match a.kind {
            "format" => "`FormatError`",
            "unsupported" => "`UnsupportedVariantError`",
            _ => "`OSError`",
        };
        format!("| {} | {kind} |\n", a.name)
    };
    let table: String = ATTACKS.iter().chain(GGUF_ATTACKS).map(row).collect();
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
        for _ in 0..100 {
            match load(&path, &STRICT) {
                Ok(_) | Err(Error::Format { .. } | Error::Unsupported { .. }) => {}
                Err(other) => panic!("{other}"),
            }
        }
        done.store(true, Relaxed);
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
