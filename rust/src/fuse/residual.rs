//! What rounding lost, as differences of whole numbers: almost all zero, stored sparsely.
//!
//! Finite floats in the order of their values are consecutive whole numbers (bits with the sign folded), so the
//! original minus what unfusing would give is a small whole number, and adding it back is exact. A block is
//! one byte of kind, the length of its payload (varint) and the payload: pairs of varints (weights skipped,
//! zigzag of the difference), or the original bytes where those are fewer.

use bytemuck::{Pod, cast_slice};
use half::{bf16, f16};

const SPARSE: u8 = 0;
const RAW: u8 = 1;
/// Most bytes before a payload: kind and length.
pub(super) const LEAD: usize = 11;
/// Weights that are compared together.
const STRIDE: usize = 32;

/// A float as its place in the order of its type.
pub(super) trait Ordered: Pod {
    /// The place; -0 is one below +0.
    fn place(self) -> i64;
    /// The float at a place, modulo the number of places.
    fn at(place: i64) -> Self;
}

macro_rules! ordered {
    ($float:ty, $int:ty, $bits:ty) => {
        impl Ordered for $float {
            fn place(self) -> i64 {
                let bits = self.to_bits() as $int;
                i64::from(if bits < 0 { !(bits & <$int>::MAX) } else { bits })
            }
            fn at(place: i64) -> Self {
                let place = place as $int;
                let bits = if place < 0 { !place | <$int>::MIN } else { place };
                <$float>::from_bits(bits as $bits)
            }
        }
    };
}
ordered!(f32, i32, u32);
ordered!(f16, i16, u16);
ordered!(bf16, i16, u16);

/// Appends the block that turns `back` into `w`; returns how many numbers differ.
pub(super) fn encode<E: Ordered>(w: &[E], back: &[E], scratch: &mut Vec<u8>, out: &mut Vec<u8>) -> usize {
    scratch.clear();
    let raw: &[u8] = cast_slice(w);
    let (mut lossy, mut next) = (0, 0);
    for (s, (a, b)) in w.chunks(STRIDE).zip(back.chunks(STRIDE)).enumerate() {
        if cast_slice::<E, u8>(a) == cast_slice::<E, u8>(b) {
            continue;
        }
        for (i, (a, b)) in a.iter().zip(b).enumerate() {
            let difference = a.place() - b.place();
            if difference != 0 {
                let at = s * STRIDE + i;
                lossy += 1;
                if scratch.len() < raw.len() {
                    varint(scratch, (at - next) as u64);
                    varint(scratch, ((difference << 1) ^ (difference >> 63)) as u64);
                }
                next = at + 1;
            }
        }
    }
    let (kind, payload) = if scratch.len() < raw.len() { (SPARSE, &scratch[..]) } else { (RAW, raw) };
    out.push(kind);
    varint(out, payload.len() as u64);
    out.extend_from_slice(payload);
    lossy
}

/// Kind and payload length of a block from its first bytes, and how many bytes they took.
pub(super) fn lead(head: &[u8], block_bytes: usize) -> Result<(u8, usize, usize), &'static str> {
    let (&kind, mut rest) = head.split_first().ok_or("the residual ends too early")?;
    let len = take(&mut rest)?;
    let fits = match kind {
        SPARSE => len < block_bytes as u64,
        RAW => len == block_bytes as u64,
        _ => return Err("the residual has a block of an unknown kind"),
    };
    if !fits {
        return Err("the residual has a block of an impossible length");
    }
    Ok((kind, len as usize, head.len() - rest.len()))
}

/// Turns what unfusing gave into the original.
pub(super) fn apply<E: Ordered>(kind: u8, mut payload: &[u8], back: &mut [E]) -> Result<(), &'static str> {
    if kind == RAW {
        bytemuck::cast_slice_mut::<E, u8>(back).copy_from_slice(payload);
        return Ok(());
    }
    let mut next = 0usize;
    while !payload.is_empty() {
        let (skip, code) = (take(&mut payload)?, take(&mut payload)?);
        let at = usize::try_from(skip).ok().and_then(|s| next.checked_add(s));
        let slot = at.and_then(|at| back.get_mut(at)).ok_or("the residual points outside of its block")?;
        let difference = (code >> 1) as i64 ^ -((code & 1) as i64);
        *slot = E::at(slot.place().wrapping_add(difference));
        next = at.unwrap_or(next) + 1;
    }
    Ok(())
}

fn varint(out: &mut Vec<u8>, mut n: u64) {
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

fn take(from: &mut &[u8]) -> Result<u64, &'static str> {
    let mut n = 0u64;
    for (i, &byte) in from.iter().enumerate().take(10) {
        n |= u64::from(byte & 0x7f) << (7 * i);
        if byte & 0x80 == 0 {
            *from = &from[i + 1..];
            return Ok(n);
        }
    }
    Err("the residual holds a number that does not end")
}

#[cfg(test)]
mod tests {
    use std::cmp::Ordering;

    use super::*;

    fn there_and_back<E: Ordered + PartialOrd + std::fmt::Debug>(all: &[E]) {
        for pair in all.windows(2) {
            let expected = match pair[0].partial_cmp(&pair[1]) {
                Some(Ordering::Equal) | None => continue,
                Some(order) => order,
            };
            assert_eq!(pair[0].place().cmp(&pair[1].place()), expected, "{pair:?}");
        }
        for x in all {
            let again = E::at(x.place());
            assert_eq!(bytemuck::bytes_of(x), bytemuck::bytes_of(&again));
        }
    }

    #[test]
    fn every_half_has_its_place() {
        there_and_back::<f16>(&(0..=u16::MAX).map(f16::from_bits).collect::<Vec<_>>());
        there_and_back::<bf16>(&(0..=u16::MAX).map(bf16::from_bits).collect::<Vec<_>>());
        let some = (0..=u32::MAX).step_by(65_521).map(f32::from_bits).collect::<Vec<_>>();
        there_and_back::<f32>(&some);
        assert_eq!(0.0f32.place() - (-0.0f32).place(), 1);
        assert_eq!(f32::from_bits(1).place(), 1);
    }

    #[test]
    fn blocks_bring_every_number_back_and_never_outgrow_the_original() {
        let w: Vec<f32> = (0..1000).map(|i| (i as f32 - 500.0) * 1e-3).collect();
        for step in [1, 2, 7, 333, 5000] {
            let mut back = w.clone();
            for i in (0..back.len()).step_by(step) {
                back[i] = f32::from_bits(back[i].to_bits() ^ 0x8000_0003);
            }
            let (mut scratch, mut block) = (Vec::new(), Vec::new());
            let lossy = encode(&w, &back, &mut scratch, &mut block);
            assert_eq!(lossy, 1000usize.div_ceil(step));
            assert!(block.len() <= 4000 + LEAD);
            let (kind, len, at) = lead(&block, 4000).unwrap();
            assert_eq!(block.len(), at + len);
            apply(kind, &block[at..], &mut back).unwrap();
            assert_eq!(back, w);
        }
    }

    #[test]
    fn damaged_blocks_are_refused() {
        assert!(lead(&[], 4).is_err());
        assert!(lead(&[2, 0], 4).is_err());
        assert!(lead(&[SPARSE, 4], 4).is_err());
        assert!(lead(&[RAW, 3], 4).is_err());
        assert!(lead(&[RAW, 0x80], 4).is_err());
        for payload in
            [&[0x80u8; 12][..], &[2, 2], &[0], &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 0]]
        {
            assert!(apply(SPARSE, payload, &mut [0.0f32; 2]).is_err(), "{payload:?}");
        }
    }
}
