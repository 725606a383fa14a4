//! Known attacks on every format but GGUF.

use super::*;

pub const ATTACKS: &[Attack] = &[
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
    Attack {
        name: "a pattern of 20,000 characters",
        place: |d| {
            let key = format!("(a|{})", "x".repeat(20_000));
            peft(d, &format!(r#"{{"peft_type": "LORA", "r": 2, "rank_pattern": {{"{key}": 2}}}}"#))
        },
        kind: "unsupported",
        words: &["rank_pattern", "20004 bytes", "limit"],
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
    Attack {
        name: "an array of 17 dimensions",
        place: |d| {
            let dims = "1, ".repeat(17);
            let header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({dims}), }}\n");
            let npy = [&b"\x93NUMPY\x01\0"[..], &(header.len() as u16).to_le_bytes()[..], header.as_bytes()]
                .concat();
            npz(d, zip("a.lora_a.npy", &[&npy[..], &[0; 4]].concat()))
        },
        kind: "format",
        words: &["a.lora_a", "expected descr"],
    },
    Attack {
        name: "an array whose header is 66,000 bytes",
        place: |d| {
            let room = " ".repeat(66_000);
            let header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': (0,), }}{room}\n");
            let npy = [&b"\x93NUMPY\x02\0"[..], &(header.len() as u32).to_le_bytes()[..], header.as_bytes()]
                .concat();
            npz(d, zip("a.lora_a.npy", &npy))
        },
        kind: "format",
        words: &["a.lora_a", "limit is 65536"],
    },
];
