//! Where loaded numbers come from: every tensor's bytes must be bytes of the file.

use microlora::format::{FactorParts, Loaded, Tensor};

/// Every tensor of `loaded` lies in `file`: as it is, turned, or in the other byte order.
pub fn check(loaded: &Loaded, file: &[u8]) {
    if has_deflated(file) {
        return; // its numbers are nowhere as such
    }
    // Blocks are expanded to f32 beside them.
    let expanded = loaded.quantized.is_some();
    for m in loaded.parts.modules.iter().filter(|_| !expanded) {
        assert!(m.a.is_finite() && m.b.is_finite(), "{}: not finite", m.path);
        assert!(m.alpha.is_finite() && m.rank > 0, "{}", m.path);
        [&m.a, &m.b].into_iter().for_each(|t| tensor(t, file));
    }
    loaded.parts.extra.iter().for_each(|t| tensor(t, file));
    for m in loaded.quantized.iter().flatten() {
        for factor in [&m.a, &m.b] {
            match factor {
                FactorParts::Plain(t) => tensor(t, file),
                FactorParts::Blocks { kind, rows, cols, data, .. } => {
                    assert_eq!(kind.row_bytes(*cols).map(|n| n * rows), Some(data.len()), "{}", m.path);
                    assert!(contains(file, data), "{}: blocks from nowhere", m.path);
                }
            }
        }
    }
}

fn tensor(t: &Tensor, file: &[u8]) {
    let elements: usize = t.shape.iter().product();
    assert_eq!(elements * t.dtype.bitsize(), 8 * t.data.len(), "{}", t.name);
    let size = (t.dtype.bitsize() / 8).max(1);
    let found = contains(file, &t.data)
        || contains(file, &swapped(&t.data, size))
        || turned(t, size).is_some_and(|d| contains(file, &d) || contains(file, &swapped(&d, size)));
    assert!(found, "{}: numbers from nowhere", t.name);
}

fn swapped(data: &[u8], size: usize) -> Vec<u8> {
    data.chunks(size).flat_map(|c| c.iter().rev().copied()).collect()
}

fn turned(t: &Tensor, size: usize) -> Option<Vec<u8>> {
    let &[rows, columns] = &t.shape[..] else { return None };
    let at = |r: usize, c: usize| &t.data[(r * columns + c) * size..][..size];
    Some((0..columns).flat_map(|c| (0..rows).flat_map(move |r| at(r, c).iter().copied())).collect())
}

/// Knuth, Morris and Pratt's search: hostile files repeat themselves.
fn contains(file: &[u8], part: &[u8]) -> bool {
    let mut back = vec![0usize; part.len()];
    let mut k = 0;
    for i in 1..part.len() {
        while k > 0 && part[i] != part[k] {
            k = back[k - 1];
        }
        k += usize::from(part[i] == part[k]);
        back[i] = k;
    }
    let mut k = 0;
    part.is_empty()
        || file.iter().any(|&byte| {
            while k > 0 && byte != part[k] {
                k = back[k - 1];
            }
            k += usize::from(byte == part[k]);
            k == part.len()
        })
}

/// Whether a zip archive may have a deflated member.
fn has_deflated(file: &[u8]) -> bool {
    file.starts_with(b"PK") && file.windows(12).any(|w| w.starts_with(b"PK\x01\x02") && w[10..] == [8, 0])
}
