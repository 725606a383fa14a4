//! Files that are almost right: bytes, JSON tokens and length fields changed, with the outer lengths and
//! checksums mended often enough that a change reaches the parser behind them.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::Rng;

/// How the bytes of a target are put together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Shape {
    /// Nothing that is known here.
    Raw,
    /// JSON text.
    Json,
    /// Eight bytes of length, a JSON header, data.
    Safetensors,
    /// Two bytes of length, JSON text, then [`Shape::Safetensors`].
    Pair,
    /// A zip archive of stored members with checksums.
    Zip,
}

/// Numbers at the edges of their types.
const NUMBERS: [u64; 24] = [
    0,
    1,
    2,
    7,
    8,
    31,
    32,
    63,
    127,
    128,
    255,
    256,
    0x7fff,
    0xffff,
    0x1_0000,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x1_0000_0000,
    1 << 40,
    1 << 62,
    i64::MAX as u64,
    1 << 63,
    u64::MAX,
];

const TOKENS: [&[u8]; 32] = [
    b"18446744073709551615",
    b"18446744073709551616",
    b"4294967296",
    b"9223372036854775807",
    b"-1",
    b"-0.0",
    b"0",
    b"1e999",
    b"1e-999",
    b"1.5",
    b"null",
    b"true",
    b"false",
    b"NaN",
    b"\"\"",
    b"\"..\"",
    b"\"../../x\"",
    b"\"/x\"",
    b"\"\\u0000\"",
    b"\"\\ud800\"",
    b"\"\\udc00\\ud800\"",
    b"\"__metadata__\"",
    b"\"lora_A\"",
    b"\"BF16\"",
    b"[",
    b"{",
    b"]",
    b"}",
    b"[[[[[[[[[[[[[[[[",
    b"{\"a\":{\"a\":{\"a\":",
    b"\xff\xfe",
    b"\xed\xa0\x80",
];

/// A draw below `n`, which is not zero.
fn below(rng: &mut ChaCha8Rng, n: usize) -> usize {
    (rng.next_u64() % n as u64) as usize
}

fn one_in(rng: &mut ChaCha8Rng, n: usize) -> bool {
    below(rng, n) == 0
}

/// A span of `bytes`: most are short.
fn span(bytes: &[u8], rng: &mut ChaCha8Rng) -> std::ops::Range<usize> {
    let from = below(rng, bytes.len());
    let most = if one_in(rng, 8) { bytes.len() - from } else { (bytes.len() - from).min(64) };
    from..from + below(rng, most + 1)
}

/// One to five changes of `seed`, some with pieces of `other`.
pub fn mutate(shape: Shape, seed: &[u8], other: &[u8], rng: &mut ChaCha8Rng) -> Vec<u8> {
    let mended = !one_in(rng, 5);
    match shape {
        Shape::Json => text(seed, other, rng),
        Shape::Safetensors if mended => safetensors(seed, other, rng),
        Shape::Pair if mended => pair(seed, other, rng),
        Shape::Zip if mended => zip(seed, rng),
        _ => raw(seed, other, rng),
    }
}

fn pair(seed: &[u8], other: &[u8], rng: &mut ChaCha8Rng) -> Vec<u8> {
    let split = |bytes: &[u8]| {
        let len = bytes.first_chunk().map_or(0, |n| usize::from(u16::from_le_bytes(*n)));
        let (config, weights) = bytes[2.min(bytes.len())..].split_at(len.min(bytes.len().saturating_sub(2)));
        (config.to_vec(), weights.to_vec())
    };
    let ((mut config, mut weights), theirs) = (split(seed), split(other));
    match below(rng, 5) {
        0 | 1 => config = text(&config, &theirs.0, rng),
        2 | 3 => weights = safetensors(&weights, &theirs.1, rng),
        _ => weights = theirs.1,
    }
    let len = u16::try_from(config.len()).unwrap_or(u16::MAX).to_le_bytes();
    [&len[..], &config, &weights].concat()
}

fn safetensors(seed: &[u8], other: &[u8], rng: &mut ChaCha8Rng) -> Vec<u8> {
    let header = |bytes: &[u8]| {
        let n = bytes.first_chunk().map_or(0, |n| u64::from_le_bytes(*n)) as usize;
        bytes.get(8..8usize.saturating_add(n)).unwrap_or_default().to_vec()
    };
    let (mut head, theirs) = (header(seed), header(other));
    let mut data = seed[(8 + head.len()).min(seed.len())..].to_vec();
    if one_in(rng, 4) && !data.is_empty() {
        data = raw(&data, &theirs, rng);
    } else {
        head = text(&head, &theirs, rng);
    }
    let mut len = head.len() as u64;
    if one_in(rng, 12) {
        len = NUMBERS[below(rng, NUMBERS.len())];
    }
    [&len.to_le_bytes()[..], &head, &data].concat()
}

/// Changes of bytes that no format is known of.
fn raw(seed: &[u8], other: &[u8], rng: &mut ChaCha8Rng) -> Vec<u8> {
    let mut out = seed.to_vec();
    for _ in 0..below(rng, 5) + 1 {
        if out.is_empty() {
            out.extend_from_slice(other);
            continue;
        }
        let near = !one_in(rng, 4);
        // Most changes go to the start, where the meaning is.
        let reach = if near { out.len().min(512) } else { out.len() };
        let at = below(rng, reach);
        match below(rng, 10) {
            0 => out[at] ^= 1 << below(rng, 8),
            1 => out[at] = rng.next_u32() as u8,
            2 => number(&mut out, at, rng),
            3 => nudge(&mut out, at, rng),
            4 => out.truncate(at),
            5 => drop(out.drain(at..(at + below(rng, 32)).min(reach))),
            6 => {
                let piece = out[span(&out, rng)].to_vec();
                out.splice(at..at, piece);
            }
            7 if !other.is_empty() => {
                let piece = other[span(other, rng)].to_vec();
                let to = (at + below(rng, piece.len() + 1)).min(out.len());
                out.splice(at..to, piece);
            }
            8 => out.extend_from_slice(other),
            _ => {
                let to = (at + below(rng, 64)).min(out.len());
                out[at..to].fill([0, 0xff, b'0', b' '][below(rng, 4)]);
            }
        }
    }
    out.truncate(1 << 20);
    out
}

/// A number at the edge of its type, of two to eight bytes.
fn number(out: &mut [u8], at: usize, rng: &mut ChaCha8Rng) {
    let bytes = NUMBERS[below(rng, NUMBERS.len())].to_le_bytes();
    let width = [2, 4, 8][below(rng, 3)].min(out.len() - at);
    out[at..at + width].copy_from_slice(&bytes[..width]);
}

/// A number that is there, one more or less.
fn nudge(out: &mut [u8], at: usize, rng: &mut ChaCha8Rng) {
    let by = [1u64, u64::MAX, 32, 8][below(rng, 4)];
    let width = [1, 2, 4, 8][below(rng, 4)].min(out.len() - at);
    let mut old = [0; 8];
    old[..width].copy_from_slice(&out[at..at + width]);
    let new = u64::from_le_bytes(old).wrapping_add(by).to_le_bytes();
    out[at..at + width].copy_from_slice(&new[..width]);
}

/// Spans of strings, numbers, words and marks.
fn tokens(json: &[u8]) -> Vec<std::ops::Range<usize>> {
    let (mut out, mut i) = (Vec::new(), 0);
    while i < json.len() {
        let from = i;
        i += 1;
        if json[from] == b'"' {
            while i < json.len() && json[i] != b'"' {
                i += 1 + usize::from(json[i] == b'\\');
            }
            i = (i + 1).min(json.len());
        } else if json[from].is_ascii_alphanumeric() || json[from] == b'-' {
            while i < json.len() && (json[i].is_ascii_alphanumeric() || b"+-.".contains(&json[i])) {
                i += 1;
            }
        }
        out.push(from..i);
    }
    out
}

/// Changes of JSON by its tokens.
fn text(seed: &[u8], other: &[u8], rng: &mut ChaCha8Rng) -> Vec<u8> {
    let mut out = seed.to_vec();
    for _ in 0..below(rng, 4) + 1 {
        let found = tokens(&out);
        if found.is_empty() || one_in(rng, 8) {
            out = raw(&out, other, rng);
            continue;
        }
        let a = found[below(rng, found.len())].clone();
        let b = found[below(rng, found.len())].clone();
        match below(rng, 8) {
            0 | 1 => {
                let token = TOKENS[below(rng, TOKENS.len())];
                out.splice(a, token.iter().copied());
            }
            2 => {
                let piece = out[b].to_vec();
                out.splice(a, piece);
            }
            3 => {
                let (low, high) = if a.start <= b.start { (a, b) } else { (b, a) };
                let piece = out[low.start..high.end].to_vec();
                out.splice(high.end..high.end, piece);
            }
            4 => drop(out.drain(a)),
            5 => {
                let theirs = tokens(other);
                if !theirs.is_empty() {
                    let piece = other[theirs[below(rng, theirs.len())].clone()].to_vec();
                    out.splice(a, piece);
                }
            }
            6 => {
                let number = NUMBERS[below(rng, NUMBERS.len())].to_string();
                let at = found.iter().find(|t| t.start >= a.start && out[t.start].is_ascii_digit());
                if let Some(at) = at {
                    out.splice(at.clone(), number.into_bytes());
                }
            }
            _ => {
                // A digit of a number: counts and offsets that are off by a little.
                let digit = out[a.start..].iter().position(u8::is_ascii_digit);
                if let Some(d) = digit {
                    out[a.start + d] = b'0' + below(rng, 10) as u8;
                }
            }
        }
    }
    out.truncate(1 << 20);
    out
}

/// Changes of one stored member, or of a name, in an archive whose checksums and sizes fit again.
fn zip(seed: &[u8], rng: &mut ChaCha8Rng) -> Vec<u8> {
    let mut members = members(seed);
    if members.is_empty() {
        return raw(seed, &[], rng);
    }
    let at = below(rng, members.len());
    match below(rng, 8) {
        0 => {
            let again = members[at].clone();
            members.push(again);
        }
        1 => drop(members.remove(at)),
        2 => members[at].0 = text(&members[at].0, b"../../x.npy", rng),
        3 => {
            // The archive as a member of itself.
            members[at].1 = seed.to_vec();
        }
        _ => {
            let other = members[below(rng, members.len())].1.clone();
            members[at].1 = raw(&members[at].1, &other, rng);
        }
    }
    archive(&members)
}

/// Names and contents of stored members, as far as the local headers can be followed.
pub fn members(mut bytes: &[u8]) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut out = Vec::new();
    while bytes.starts_with(b"PK\x03\x04") && bytes.len() >= 30 {
        let small = |at: usize| usize::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
        let size = u32::from_le_bytes([bytes[18], bytes[19], bytes[20], bytes[21]]) as usize;
        let (name, start) = (30 + small(26), 30 + small(26) + small(28));
        let Some(content) = bytes.get(start..start + size) else { break };
        out.push((bytes[30..name].to_vec(), content.to_vec()));
        bytes = &bytes[start + size..];
    }
    out
}

/// A zip archive of stored members.
pub fn archive(members: &[(Vec<u8>, Vec<u8>)]) -> Vec<u8> {
    let (mut out, mut directory) = (Vec::new(), Vec::new());
    for (name, content) in members {
        let mut common = vec![20, 0, 0, 0, 0, 0, 0, 0, 0x21, 0];
        common.extend_from_slice(&crc32fast::hash(content).to_le_bytes());
        common.extend_from_slice(&(content.len() as u32).to_le_bytes());
        common.extend_from_slice(&(content.len() as u32).to_le_bytes());
        common.extend_from_slice(&(name.len() as u16).to_le_bytes());
        common.extend_from_slice(&[0, 0]);
        directory.extend_from_slice(b"PK\x01\x02\x14\0");
        directory.extend_from_slice(&common);
        directory.extend_from_slice(&[0; 10]);
        directory.extend_from_slice(&(out.len() as u32).to_le_bytes());
        directory.extend_from_slice(name);
        out.extend_from_slice(b"PK\x03\x04");
        out.extend_from_slice(&common);
        out.extend_from_slice(name);
        out.extend_from_slice(content);
    }
    let (count, at, size) = (members.len() as u16, out.len() as u32, directory.len() as u32);
    out.extend_from_slice(&directory);
    out.extend_from_slice(b"PK\x05\x06\0\0\0\0");
    out.extend_from_slice(&count.to_le_bytes());
    out.extend_from_slice(&count.to_le_bytes());
    out.extend_from_slice(&size.to_le_bytes());
    out.extend_from_slice(&at.to_le_bytes());
    out.extend_from_slice(&[0, 0]);
    out
}
