//! Events as bytes, exactly: what [`Sample`] holds, the numbers as they lie in memory (little-endian f32).
//!
//! ```text
//!  0  u8  kind of feedback: 1 target (mse), 2 target (cosine), 3 gradient, 4 reward, 5 preference, 6 contrastive
//!  1  u8  bit 0: base is there, bit 1: quality, bit 2: module      2  u16 zero
//!  4  u32 module      8  u32 length of x     12  u32 length of base
//! 16  u32 width of the feedback              20  u32 its rows (2 of a preference, 1 + negatives of a contrast)
//! 24  f32 quality    28  f32 weight          32  f32 advantage
//! 36  f32 reward, p or tau                   40  f32 beta           44  u32 zero
//! 48  x, base, rows of the feedback
//! ```
//!
//! The event's number is the id of its record.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::learn::{Feedback, TargetLoss};
use crate::replay::Sample;

#[cfg(target_endian = "big")]
compile_error!("numbers are journalled as they lie in memory, which must be little-endian");

const HEAD: usize = 48;

/// An event on its way into the journal; its vectors stay where they are.
pub struct Event<'a> {
    head: [u8; HEAD],
    body: [&'a [u8]; 4],
}

impl<'a> Event<'a> {
    /// Reads off the parts of `sample`. Allocates nothing.
    ///
    /// # Errors
    /// Vectors of 2^32 numbers and more.
    pub fn new(sample: &'a Sample) -> Result<Self> {
        let (kind, scalars, rows, width): (u8, [f32; 2], [&[f32]; 2], usize) = match &*sample.feedback {
            Feedback::Target { target, loss } => {
                (if *loss == TargetLoss::Mse { 1 } else { 2 }, [0.0; 2], [target, &[]], target.len())
            }
            Feedback::Gradient { gradient } => (3, [0.0; 2], [gradient, &[]], gradient.len()),
            Feedback::Reward { reward, response } => (4, [*reward, 0.0], [response, &[]], response.len()),
            Feedback::Preference { chosen, rejected, p, beta } => {
                (5, [*p, *beta], [chosen, rejected], chosen.len())
            }
            Feedback::Contrastive { rows, width, tau } => (6, [*tau, 0.0], [rows, &[]], *width),
        };
        let base = sample.base.as_deref().unwrap_or(&[]);
        let count = (rows[0].len() + rows[1].len()).checked_div(width).unwrap_or(0);
        let mut numbers = [0; 4];
        for (to, len) in numbers.iter_mut().zip([sample.x.len(), base.len(), width, count]) {
            let limit = |_| Error::shape("event", format!("{len} numbers"), "fewer than 2^32");
            *to = u32::try_from(len).map_err(limit)?;
        }
        let flags = u8::from(sample.base.is_some())
            | u8::from(sample.quality.is_some()) << 1
            | u8::from(sample.module.is_some()) << 2;
        let mut head = [0; HEAD];
        (head[0], head[1]) = (kind, flags);
        let [x_len, base_len, width, count] = numbers;
        let words = [sample.module.unwrap_or(0), x_len, base_len, width, count];
        let floats = [sample.quality.unwrap_or(0.0), sample.weight, sample.advantage, scalars[0], scalars[1]];
        let floats = floats.map(f32::to_bits);
        for (place, word) in head[4..44].chunks_exact_mut(4).zip(words.into_iter().chain(floats)) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        let body = [&sample.x, base, rows[0], rows[1]].map(bytemuck::cast_slice);
        Ok(Event { head, body })
    }

    /// What [`super::Journal::append`] takes.
    pub fn parts(&self) -> [&[u8]; 5] {
        [&self.head, self.body[0], self.body[1], self.body[2], self.body[3]]
    }

    /// Bytes of payload.
    pub fn bytes(&self) -> usize {
        self.parts().iter().map(|p| p.len()).sum()
    }
}

/// Bytes that an event takes in the journal, all in all, for inputs and outputs of these widths, `base` and
/// `rows` rows of feedback.
pub const fn record_bytes(inputs: usize, outputs: usize, base: bool, rows: usize) -> usize {
    super::record::size(HEAD + 4 * (inputs + outputs * (rows + base as usize)))
}

fn bad<T>(reason: impl Into<String>) -> Result<T> {
    Err(Error::format("event", reason))
}

/// The event of record `id`, every number with the bits that it was written with.
///
/// # Errors
/// [`Error::Format`] where the bytes are none that [`Event`] makes.
pub fn decode(id: u64, payload: &[u8]) -> Result<Sample> {
    let Some((head, body)) = payload.split_first_chunk::<HEAD>() else {
        return bad(format!("{} bytes are too few", payload.len()));
    };
    let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let number = |at: usize| f32::from_bits(word(at));
    let (kind, flags) = (head[0], head[1]);
    let (module, lens) = (word(4), [8, 12, 16, 20].map(|at| word(at) as usize));
    let [x_len, base_len, width, rows] = lens;
    let want_rows = match kind {
        1..=4 => rows == 1,
        5 => rows == 2,
        6 => rows >= 2,
        _ => return bad(format!("feedback of kind {kind}")),
    };
    let unused = [
        (flags & 1 == 0, base_len as u32),
        (flags & 2 == 0, word(24)),
        (flags & 4 == 0, module),
        (kind < 4, word(36)),
        (kind != 5, word(40)),
    ];
    let zeros = head[2] == 0 && head[3] == 0 && word(44) == 0 && flags < 8;
    if !zeros || !want_rows || width == 0 || unused.iter().any(|(unset, v)| *unset && *v != 0) {
        return bad("fields that do not fit together");
    }
    let feedback_len = width.checked_mul(rows);
    let total = feedback_len.and_then(|f| f.checked_add(x_len + base_len)).and_then(|n| n.checked_mul(4));
    if total != Some(body.len()) {
        return bad(format!("{} bytes of numbers, the lengths say otherwise", body.len()));
    }
    let scalars = [24, 28, 32, 36, 40].map(number);
    if scalars.iter().any(|v| !v.is_finite()) {
        return bad("a scalar that is NaN or infinite");
    }
    let [quality, weight, advantage, a, b] = scalars;
    let mut rest = body;
    let mut take = |n: usize| -> Result<Vec<f32>> {
        let (bytes, after) = rest.split_at(4 * n);
        rest = after;
        let number = |c: &[u8]| f32::from_le_bytes([c[0], c[1], c[2], c[3]]);
        let numbers: Vec<f32> = bytes.chunks_exact(4).map(number).collect();
        if numbers.iter().all(|v| v.is_finite()) { Ok(numbers) } else { bad("NaN or infinity") }
    };
    let x = take(x_len)?;
    let base = if flags & 1 == 1 { Some(take(base_len)?) } else { None };
    let positive = |v: f32| if v > 0.0 { Ok(v) } else { bad(format!("{v}, expected more than 0")) };
    let feedback = match kind {
        1 => Feedback::Target { target: take(width)?, loss: TargetLoss::Mse },
        2 => Feedback::Target { target: take(width)?, loss: TargetLoss::Cosine },
        3 => Feedback::Gradient { gradient: take(width)? },
        4 => Feedback::Reward { reward: a, response: take(width)? },
        5 if !(0.0..=1.0).contains(&a) => return bad(format!("p of {a}")),
        5 => Feedback::Preference { chosen: take(width)?, rejected: take(width)?, p: a, beta: positive(b)? },
        _ => Feedback::Contrastive { rows: take(width * rows)?, width, tau: positive(a)? },
    };
    Ok(Sample {
        event: id,
        module: (flags & 4 != 0).then_some(module),
        x,
        base,
        feedback: Arc::new(feedback),
        quality: (flags & 2 != 0).then_some(quality),
        weight,
        advantage,
    })
}
