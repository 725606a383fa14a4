//! Known attacks by base models and by side-cars of fused ones.

use super::super::entry::base::{base, fused, index};
use super::*;

const INDEX: &str = "model.safetensors.index.json";
const SHARD: &str = "model-1.safetensors";

/// A folder with an index and one shard.
fn model(dir: &Path, index: impl AsRef<[u8]>, shard: impl AsRef<[u8]>) -> PathBuf {
    put(dir, SHARD, shard);
    put(dir, INDEX, index);
    dir.to_owned()
}

fn listed(file: &str) -> String {
    format!(r#"{{"weight_map": {{"m.q.weight": "{file}"}}}}"#)
}

/// A side-car whose header is `change`d, beside its fused model.
fn sidecar(dir: &Path, change: impl Fn(&mut serde_json::Value)) -> PathBuf {
    put(dir, "fused.safetensors", &fused().0);
    let car = &fused().1;
    let len = u64::from_le_bytes(*car.first_chunk().unwrap()) as usize;
    let mut header = serde_json::from_slice(&car[8..8 + len]).unwrap();
    change(&mut header);
    put(dir, CAR, file_of(header.to_string(), &car[8 + len..]))
}

/// A side-car whose records are `change`d, with the hash that they have then.
fn records(dir: &Path, change: impl Fn(&mut serde_json::Value)) -> PathBuf {
    let plain = sidecar(dir, |header| {
        let metadata = &mut header["__metadata__"];
        let mut list = serde_json::from_str(metadata["records"].as_str().unwrap()).unwrap();
        change(&mut list);
        metadata["records"] = list.to_string().into();
    });
    let mended = super::super::entry::base::mended(&fs::read(&plain).unwrap()).unwrap();
    put(dir, CAR, mended)
}

pub const BASE_ATTACKS: &[Attack] = &[
    Attack {
        name: "base model: an index that leads out of its folder",
        place: |d| model(d, listed("../model-1.safetensors"), base()),
        kind: "format",
        words: &[INDEX, "weight_map", "../model-1.safetensors"],
    },
    Attack {
        name: "base model: an index with an absolute path",
        place: |d| model(d, listed("/etc/model.safetensors"), base()),
        kind: "format",
        words: &[INDEX, "weight_map", "/etc/model.safetensors"],
    },
    Attack {
        name: "base model: an index that lists what no shard holds",
        place: |d| model(d, listed(SHARD).replace("m.q", "m.x"), base()),
        kind: "format",
        words: &[INDEX, "m.x.weight", "in no shard"],
    },
    Attack {
        name: "base model: an index of millions of values",
        place: |d| model(d, format!(r#"{{"a": [{}0]}}"#, "0,".repeat(6_000_000)), base()),
        kind: "format",
        words: &[INDEX, "memory"],
    },
    Attack {
        name: "base model: an index that is a named pipe",
        place: |d| {
            put(d, SHARD, base());
            fifo(d, INDEX);
            d.to_owned()
        },
        kind: "config",
        words: &["model.safetensors"],
    },
    Attack {
        name: "base model: a shard that is a link to a device",
        place: |d| {
            put(d, INDEX, index());
            std::os::unix::fs::symlink("/dev/zero", d.join(SHARD)).unwrap();
            d.to_owned()
        },
        kind: "format",
        words: &[SHARD, "regular file"],
    },
    Attack {
        name: "base model: a shard that is a pickle",
        place: |d| model(d, index(), b"\x80\x02cposix\nsystem\n."),
        kind: "unsupported",
        words: &[SHARD, "pickle"],
    },
    Attack {
        name: "base model: one tensor in two shards",
        place: |d| {
            put(d, "model-2.safetensors", base());
            let two = r#"{"weight_map": {"m.q.weight": "model-1.safetensors", "m.k.weight": "model-2.safetensors"}}"#;
            model(d, two, base())
        },
        kind: "format",
        words: &["model-2.safetensors", "is in \"model-1.safetensors\" as well"],
    },
    Attack {
        name: "base model: a tensor beyond the end of its shard",
        place: |d| model(d, index(), &base()[..base().len() - 1]),
        kind: "format",
        words: &[SHARD, "truncated"],
    },
    Attack {
        name: "side-car: records that were changed",
        place: |d| {
            sidecar(d, |header| {
                let records = &mut header["__metadata__"]["records"];
                *records = records.as_str().unwrap().replace("m.q", "m.x").into();
            })
        },
        kind: "format",
        words: &[CAR, "digest"],
    },
    Attack {
        name: "side-car: an adapter that was changed",
        place: |d| {
            let car = sidecar(d, |_| {});
            let mut bytes = fs::read(&car).unwrap();
            let at = bytes.windows(9).rposition(|w| w == b"microlora").unwrap();
            bytes[at] ^= 1;
            put(d, CAR, bytes)
        },
        kind: "format",
        words: &[CAR, "adapter was changed"],
    },
    Attack {
        name: "side-car: more records than residuals",
        place: |d| {
            records(d, |list| {
                let list = list.as_array_mut().unwrap();
                list.extend([list.clone(), list.clone(), list.clone()].concat());
            })
        },
        kind: "format",
        words: &[CAR, "records"],
    },
    Attack {
        name: "side-car: two records of one tensor",
        place: |d| records(d, |list| list[1] = list[0].clone()),
        kind: "format",
        words: &[CAR, "two records"],
    },
    Attack {
        name: "side-car: blocks of no rows",
        place: |d| records(d, |list| list[0]["block_rows"] = 0.into()),
        kind: "format",
        words: &[CAR, "does not fit"],
    },
    Attack {
        name: "side-car: blocks of 2^64 - 1 rows of another tensor",
        place: |d| {
            records(d, |list| {
                list[0]["block_rows"] = u64::MAX.into();
                list[0]["shape"] = [6, 5].into();
            })
        },
        kind: "format",
        words: &["was fused"],
    },
];
