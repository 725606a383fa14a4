//! What the journal holds of a loop: events as they came, and what the other loops made, as weights.

use serde::{Deserialize, Serialize};

use super::Inner;
use super::finish::Decision;
use crate::error::{Error, Result};
use crate::factor::Factor;
use crate::journal::{Journal, event};
use crate::{Dtype, learn::Learner};

/// Kinds of records; their numbers are on disk.
pub(super) mod kind {
    /// An event: its number, then the event.
    pub const EVENT: u8 = 1;
    /// A consolidation took the window.
    pub const BEGIN: u8 = 2;
    /// It came to an end.
    pub const DONE: u8 = 3;
    /// It was given up.
    pub const CANCELLED: u8 = 4;
    /// Learners without history serve; the window was learned again on them.
    pub const STARTED: u8 = 5;
    /// A trained adapter serves.
    pub const DEEP: u8 = 6;
    /// A choice of the bandit.
    pub const CHOICE: u8 = 7;
    /// A reward for a choice.
    pub const REWARD: u8 = 8;
    /// The event before was refused by the rule: it shaped nothing.
    pub const REFUSED: u8 = 9;
}

/// Writes records down; absent where nothing is kept.
pub(super) struct Recorder {
    pub journal: Journal,
}

/// How a consolidation ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Ended {
    pub decision: Decision,
    pub loss_before: Option<f64>,
    pub loss_after: Option<f64>,
    pub used: usize,
    pub ungated: bool,
    /// Whether the window contradicted what was accepted, so that it is not rehearsed.
    pub distrusted: bool,
    /// Factors that follow: members, and modules of each.
    pub members: usize,
}

impl Inner {
    /// Appends a record; its number is one more than the last one's.
    pub fn record(&mut self, kind: u8, parts: &[&[u8]]) -> Result<()> {
        let Some(recorder) = &mut self.recorder else { return Ok(()) };
        recorder.journal.append(kind, self.sequence + 1, parts)?;
        self.sequence += 1;
        Ok(())
    }

    /// Appends the newest event of the window.
    #[inline]
    pub fn record_event(&mut self) -> Result<()> {
        let Some(recorder) = &mut self.recorder else { return Ok(()) };
        let sample = &self.window.newest().expect("it was just pushed").sample;
        let event = event::Event::new(sample)?;
        let [head, a, b, c, d] = event.parts();
        let number = sample.event.to_le_bytes();
        recorder.journal.append(kind::EVENT, self.sequence + 1, &[&number, head, a, b, c, d])?;
        self.sequence += 1;
        Ok(())
    }

    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    pub fn set_sequence(&mut self, sequence: u64) {
        self.sequence = sequence;
    }
}

/// A JSON head and factors behind it, as the payload of one record.
pub(super) fn pack<'a>(head: &impl Serialize, factors: impl Iterator<Item = &'a Factor>) -> Result<Vec<u8>> {
    let json = serde_json::to_vec(head).map_err(|e| Error::format("journal", e.to_string()))?;
    let mut out = (json.len() as u32).to_le_bytes().to_vec();
    out.extend(json);
    for f in factors {
        out.extend(f.to_bits(false));
    }
    Ok(out)
}

/// Takes [`pack`] apart; factors are shaped like those given.
pub(super) fn unpack<'a, T: for<'de> Deserialize<'de>>(payload: &[u8]) -> Result<(T, &[u8])> {
    let bad = || Error::format("journal", "a record is shorter than it says");
    let (len, rest) = payload.split_first_chunk::<4>().ok_or_else(bad)?;
    let (json, rest) = rest.split_at_checked(u32::from_le_bytes(*len) as usize).ok_or_else(bad)?;
    Ok((serde_json::from_slice(json).map_err(|e| Error::format("journal", e.to_string()))?, rest))
}

/// The next f32 factor of a payload.
pub(super) fn factor(rest: &mut &[u8], rank: usize, len: usize) -> Result<Factor> {
    let bad = || Error::format("journal", "a record is shorter than its factors");
    let (bits, after) = rest.split_at_checked(4 * rank * len).ok_or_else(bad)?;
    *rest = after;
    Factor::from_bits(bits, rank, len, Dtype::F32, false)
}

/// B of the f32 weights of learners.
pub(super) fn b_factors(members: &[Vec<Learner>]) -> impl Iterator<Item = &Factor> {
    members.iter().flatten().map(|l| &*l.master().b)
}
