//! Known attacks by the archive around NumPy's arrays.

use super::*;

const NAMES: [&str; 2] = ["a.lora_a.npy", "a.lora_b.npy"];

/// An archive of two arrays that a reader would take, with numbers of its records changed.
fn archive(dir: &Path, names: [&str; 2], change: impl Fn(&mut Vec<u8>, [usize; 2], usize)) -> PathBuf {
    let (mut out, mut directory) = (Vec::new(), Vec::new());
    for (name, shape) in names.into_iter().zip(["(2, 3)", "(4, 2)"]) {
        let header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n");
        let numbers = if shape == "(2, 3)" { 24 } else { 32 };
        let head =
            [&b"\x93NUMPY\x01\0"[..], &(header.len() as u16).to_le_bytes(), header.as_bytes()].concat();
        let one = zip(name, &[&head[..], &vec![0; numbers]].concat());
        let at = one.windows(4).rposition(|w| w == b"PK\x01\x02").unwrap();
        let mut record = one[at..one.len() - 22].to_vec();
        record[42..46].copy_from_slice(&(out.len() as u32).to_le_bytes());
        out.extend(&one[..at]);
        directory.push(record);
    }
    let start = out.len();
    let records = [start, start + directory[0].len()];
    out.extend(directory.concat());
    let size = (out.len() - start) as u32;
    let end = out.len();
    out.extend([&b"PK\x05\x06\0\0\0\0\x02\0\x02\0"[..], &size.to_le_bytes()].concat());
    out.extend([&(start as u32).to_le_bytes()[..], &[0, 0]].concat());
    change(&mut out, records, end);
    npz(dir, out)
}

fn add(bytes: &mut [u8], at: usize, n: u32) {
    let old = u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    bytes[at..at + 4].copy_from_slice(&old.wrapping_add(n).to_le_bytes());
}

pub const ZIP_ATTACKS: &[Attack] = &[
    Attack {
        name: "an archive with two members of one name",
        place: |d| archive(d, [NAMES[0]; 2], |_, _, _| {}),
        kind: "format",
        words: &["a.lora_a.npy", "appears twice"],
    },
    Attack {
        name: "an archive whose members overlap",
        place: |d| archive(d, NAMES, |b, records, _| add(b, records[1] + 42, u32::MAX - 7)),
        kind: "format",
        words: &["a.lora_a.npy", "a.lora_b.npy", "overlap"],
    },
    Attack {
        name: "an archive with a member over its directory",
        place: |d| {
            archive(d, NAMES, |b, records, _| [20, 24].iter().for_each(|at| add(b, records[1] + at, 8)))
        },
        kind: "format",
        words: &["a.lora_b.npy", "overlaps the directory"],
    },
    Attack {
        name: "an archive whose numbers were changed",
        place: |d| archive(d, NAMES, |b, records, _| b[records[0] - 1] ^= 1),
        kind: "format",
        words: &["a.lora_b.npy", "checksum"],
    },
    Attack {
        name: "a member under another name than in the directory",
        place: |d| archive(d, NAMES, |b, _, _| b[30] = b'x'),
        kind: "format",
        words: &["a.lora_a.npy", "differ"],
    },
    Attack {
        name: "an archive whose directory lies elsewhere",
        place: |d| archive(d, NAMES, |b, _, end| add(b, end + 16, u32::MAX)),
        kind: "format",
        words: &["directory", "expected to end at"],
    },
    Attack {
        name: "an archive of more members than it has",
        place: |d| {
            archive(d, NAMES, |b, _, end| {
                b[end + 8] = 3;
                b[end + 10] = 3;
            })
        },
        kind: "format",
        words: &["truncated"],
    },
    Attack {
        name: "an archive of fewer members than it has",
        place: |d| {
            archive(d, NAMES, |b, _, end| {
                b[end + 8] = 1;
                b[end + 10] = 1;
            })
        },
        kind: "format",
        words: &["more than its 1 members"],
    },
    Attack {
        name: "a stored member of two sizes",
        place: |d| archive(d, NAMES, |b, records, _| add(b, records[0] + 24, 1)),
        kind: "format",
        words: &["a.lora_a.npy", "of two sizes"],
    },
    Attack {
        name: "an encrypted member",
        place: |d| archive(d, NAMES, |b, records, _| b[records[0] + 8] = 1),
        kind: "unsupported",
        words: &["a.lora_a.npy", "encrypted"],
    },
    Attack {
        name: "an archive that goes on behind its end",
        place: |d| archive(d, NAMES, |b, _, _| b.push(0)),
        kind: "format",
        words: &["bytes after its end"],
    },
];
