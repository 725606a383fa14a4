//! A state directory: the last saved state, and a journal of what came after it.
//!
//! ```text
//! state.safetensors      the whole loop; its rename is what commits a checkpoint
//! journal-<n>/           records since, and begin.safetensors: the loop as the first record found it
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;
use sha2::{Digest, Sha256};

use super::records::{Ended, Recorder, factor, kind, unpack};
use super::result::{Adaptation, Loop, Outcome};
use super::state::origin_of;
use super::warm_up::{Started, blank};
use super::window::Incoming;
use super::{Back, Sona};
use crate::adapter::Adapter;
use crate::error::{Error, Result};
use crate::factor::Factor;
use crate::format::{self, atomic};
use crate::journal::{self, DirLock, Header, Journal, Options, Record, event};
use crate::layer::Layer;
use crate::learn::Learner;

/// What opening a state directory found.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Opened {
    /// Whether a saved state was there.
    pub found: bool,
    /// Records that were replayed.
    pub replayed: u64,
    /// Damage that was set aside, other builds, events that could not be learned again.
    pub warnings: Vec<String>,
    /// Whether the weights have the bits that they had: the same build and instruction set wrote everything.
    pub exact: bool,
}

/// Where a loop lives on disk.
pub struct Places {
    pub(super) lock: Arc<DirLock>,
    pub(super) config: Option<String>,
    /// Number of the journal's directory.
    pub(super) journal: u64,
    pub(super) options: Option<Options>,
}

fn state_file(dir: &Path) -> PathBuf {
    dir.join("state.safetensors")
}

pub(super) fn journal_dir(dir: &Path, n: u64) -> PathBuf {
    dir.join(format!("journal-{n}"))
}

pub(super) fn begin_file(dir: &Path) -> PathBuf {
    dir.join("begin.safetensors")
}

pub(super) fn identity(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

/// How records are applied.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// Results are taken as they were written.
    Written,
    /// Results are computed anew: an event is left out.
    Anew,
}

impl Sona {
    /// Opens a state directory: locks it, goes on from what was saved there, replays what was journalled since,
    /// and from now on writes there. Without `options` nothing is journalled.
    ///
    /// # Errors
    /// A directory that another process holds, a state of other settings or of a newer format, what the system
    /// says. The loop is as it was then, or not to be used where a replay was cut short.
    pub fn open(&self, dir: &Path, options: Option<Options>, config: Option<String>) -> Result<Opened> {
        let _inside = self.gate.enter();
        fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
        let lock = Arc::new(DirLock::acquire(dir)?);
        let back = &mut *self.back();
        if self.place().is_some() {
            return Err(Error::config("dir", dir.display(), "none: this loop has a state directory already"));
        }
        let mut opened = Opened { exact: true, ..Opened::default() };
        let path = state_file(dir);
        let mut number = 1;
        if path.exists() {
            opened.found = true;
            let bytes = fs::read(&path).map_err(|e| Error::io(&path, e))?;
            let (mut bandit, mut inner) = (self.bandit(), self.inner());
            number = self.restore_into(back, &mut bandit, &mut inner, &bytes)?;
            drop((bandit, inner));
            let (isa, build) = origin_of(&bytes)?;
            self.compare(&mut opened, &isa, &build);
        }
        let places = Places { lock, config, journal: number, options };
        if !opened.found {
            self.write_state(back, &places)?;
        }
        sweep(dir, number);
        let in_dir = journal_dir(dir, number);
        if options.is_some() || in_dir.exists() {
            self.replay(back, &places, &mut opened)?;
        }
        let mut places = places;
        let ends = places.options.is_none() && in_dir.exists();
        if ends {
            // What comes now is not journalled, so the old journal ends here, and a later one begins anew.
            places.journal += 1;
            if opened.replayed > 0 || places.journal > 1 {
                let text = "opened without a journal: the one that was here ends, and with it what forget and audit know";
                opened.warnings.push(text.into());
            }
        }
        let number = places.journal;
        *self.place() = Some(places);
        if ends {
            self.checkpoint_into(back)?;
            sweep(dir, number);
        }
        back.quiet = false;
        if opened.found
            && let Err(e) = self.publish(back)
        {
            opened.warnings.push(format!("not published: {e}"));
        }
        Ok(opened)
    }

    fn compare(&self, opened: &mut Opened, isa: &str, build: &str) {
        let (here, us) = (self.kernels.isa().to_string(), env!("CARGO_PKG_VERSION"));
        if isa == here && build == us {
            return;
        }
        opened.exact = false;
        let text = format!(
            "written by microlora {build} on {isa}, read by {us} on {here}: weights agree to about 1e-5, not bit for bit"
        );
        if !opened.warnings.contains(&text) {
            opened.warnings.push(text);
        }
    }

    fn replay(&self, back: &mut Back, places: &Places, opened: &mut Opened) -> Result<()> {
        let dir = journal_dir(places.lock.dir(), places.journal);
        let (mut journal, recovered) = self.journal_in(&dir, places.options.unwrap_or_default())?;
        opened.warnings.extend(recovered.warning.clone());
        let begin = begin_file(&dir);
        if recovered.created || (!begin.exists() && recovered.records == 0) {
            let bytes = self.bytes_of(back, places.config.clone(), places.journal)?;
            atomic::write(&begin, |w| w.write_all(&bytes))?;
        }
        back.quiet = true;
        let from = self.inner().sequence;
        for record in journal.records()? {
            let record = record?;
            if record.id <= from {
                continue;
            }
            self.apply(back, &record, Mode::Written, &mut opened.warnings)?;
            self.inner().sequence = record.id;
            opened.replayed += 1;
        }
        if opened.replayed > 0 {
            for header in &recovered.headers {
                self.compare(opened, &header.isa, &header.build);
            }
        }
        journal.prepare()?;
        if places.options.is_some() {
            self.inner().recorder = Some(Recorder { journal });
        }
        if let Some(task) = back.task.take() {
            // Killed in the middle of a consolidation: its window waits again.
            self.cancel(task, None)?;
        }
        Ok(())
    }

    pub(super) fn journal_in(&self, dir: &Path, options: Options) -> Result<(Journal, journal::Recovered)> {
        fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
        let lock = Arc::new(DirLock::acquire(dir)?);
        Journal::open(&lock, options, &Header::new(&self.kernels.isa().to_string(), [0; 32]))
    }

    /// One record into this loop, as if it happened now. Nothing is recorded unless there is a recorder.
    pub(super) fn apply(
        &self,
        back: &mut Back,
        record: &Record,
        mode: Mode,
        warnings: &mut Vec<String>,
    ) -> Result<()> {
        let bad = |what: &str| Error::format("journal", format!("record {}: {what}", record.id));
        match record.kind {
            kind::EVENT => {
                let (number, sample) = read_event(record)?;
                let inner = &mut *self.inner();
                inner.next = number;
                let incoming = Incoming::of(&sample);
                let mut done = Adaptation::new(Loop::Instant, Outcome::Event);
                // An event that was refused is refused again.
                if let Err(e) = self.take_event(inner, incoming, &mut done) {
                    warnings.push(format!("event {number} was refused: {e}"));
                }
            }
            kind::BEGIN => {
                let inner = &mut *self.inner();
                self.begin_now(back, inner, record.payload == [1])?;
            }
            kind::DONE => {
                let mut task = back.task.take().ok_or_else(|| bad("an end without a beginning"))?;
                self.work_out(back, &mut task)?;
                let done = if mode == Mode::Anew {
                    self.judge(back, task)?
                } else {
                    let (ended, mut rest): (Ended, &[u8]) = unpack(&record.payload)?;
                    if ended.decision == super::finish::Decision::Accept {
                        if ended.members != task.candidates.len() {
                            return Err(bad("an ensemble of another size"));
                        }
                        for b in task.candidates.iter_mut().flatten() {
                            *b = Arc::new(factor(&mut rest, b.rank(), b.len())?);
                        }
                    }
                    self.finish(back, task, &ended)?
                };
                self.inner().stats.counts.turn(&done);
            }
            kind::CANCELLED => {
                if let Some(task) = back.task.take() {
                    let done = self.cancel(task, None)?;
                    self.inner().stats.counts.turn(&done);
                }
            }
            kind::STARTED => {
                let (started, mut rest): (Started, &[u8]) = unpack(&record.payload)?;
                let task = back.task.take();
                if mode == Mode::Anew && started.from_events {
                    let task = task.ok_or_else(|| bad("a warm-up without its window"))?;
                    self.warm_up_from(back, task)?;
                    return Ok(());
                }
                let live = self.lora.inspect(<[Learner]>::to_vec);
                let mut learners = Vec::new();
                for (live, unit) in live.iter().zip(started.units) {
                    let (rank, width) = (live.layer().rank(), live.layer().in_features());
                    learners.push(with_a(live, factor(&mut rest, rank, width)?, unit)?);
                }
                self.start_over(back, learners, task, Vec::new(), started.from_events)?;
            }
            kind::DEEP => {
                let adapter = Adapter::from_parts(&format::from_bytes(&record.payload, true)?.parts)?;
                let names = self.lora.names().iter();
                let new = names.map(|n| adapter.layer(n).map(|l| Learner::new(Arc::clone(l))));
                self.serve_trained(back, new.collect::<Result<_>>()?, Some((kind::DEEP, &record.payload)))?;
                let mut done = Adaptation::new(Loop::Deep, Outcome::Accepted);
                done.applied = true;
                self.inner().stats.counts.turn(&done);
            }
            kind::CHOICE | kind::REWARD => self.apply_choice(record)?,
            kind::REFUSED => {}
            _ => return Err(bad("of a kind that this microlora does not know: install a newer one")),
        }
        Ok(())
    }

    /// Saves the state in the directory; the journal goes on after it. Returns the bytes of the state.
    ///
    /// # Errors
    /// A loop without a directory, what the system says.
    pub fn checkpoint(&self) -> Result<u64> {
        let _inside = self.gate.enter();
        let back = &mut *self.back();
        self.checkpoint_into(back)
    }

    pub(super) fn checkpoint_into(&self, back: &mut Back) -> Result<u64> {
        if let Some(task) = back.task.take() {
            // A state holds whole turns only.
            self.cancel(task, None)?;
        }
        let places = self.place();
        let Some(places) = &*places else {
            return Err(Error::config(
                "checkpoint",
                "a loop without a state directory",
                "one that was opened",
            ));
        };
        let (bytes, sequence) = self.write_state(back, places)?;
        let inner = &mut *self.inner();
        if let Some(recorder) = &mut inner.recorder {
            recorder.journal.checkpoint(sequence, identity(&bytes))?;
        }
        Ok(bytes.len() as u64)
    }

    /// The state file, and the number of the last record that is in it.
    fn write_state(&self, back: &Back, places: &Places) -> Result<(Vec<u8>, u64)> {
        let bytes = self.bytes_of(back, places.config.clone(), places.journal)?;
        let sequence = super::state::sequence_of(&bytes)?;
        atomic::write(&state_file(places.lock.dir()), |w| w.write_all(&bytes))?;
        Ok((bytes, sequence))
    }

    /// Writes the journal through to the disk, whatever its policy; nothing where there is none.
    ///
    /// # Errors
    /// What the system says.
    pub fn sync(&self) -> Result<()> {
        let _inside = self.gate.enter();
        match &mut self.inner().recorder {
            Some(recorder) => recorder.journal.sync(),
            None => Ok(()),
        }
    }

    /// Leaves the state directory: a journal is synced, without one the state is saved; the lock is let go. The
    /// loop goes on without it.
    ///
    /// # Errors
    /// What the system says of it; the directory is left all the same.
    pub fn close(&self) -> Result<()> {
        let _inside = self.gate.enter();
        let back = &mut *self.back();
        let recorder = self.inner().recorder.take();
        let done = match recorder {
            Some(mut r) => r.journal.sync(),
            None if self.place().is_some() => self.checkpoint_into(back).map(drop),
            None => Ok(()),
        };
        *self.place() = None;
        done
    }

    /// Makes what the journal will need soon, and syncs where its interval is over; for the background loop.
    pub(super) fn tend_journal(&self) -> Result<()> {
        let wanted = self.inner().recorder.as_mut().and_then(|r| r.journal.wanted());
        let of = wanted.as_ref().map(|next| next.dir().to_owned());
        let spare = wanted.map(journal::NextSegment::make);
        let inner = &mut *self.inner();
        let Some(recorder) = &mut inner.recorder else { return Ok(()) };
        // A journal that was rewritten meanwhile took its folder along: what was made for it is not wanted.
        if let Some(spare) = spare.filter(|_| of.is_some_and(|dir| dir == recorder.journal.dir())) {
            recorder.journal.adopt(spare?)?;
        }
        recorder.journal.prepare()
    }
}

/// Number and content of an event's record.
pub(super) fn read_event(record: &Record) -> Result<(u64, crate::replay::Sample)> {
    let (number, payload) = record
        .payload
        .split_first_chunk::<8>()
        .ok_or_else(|| Error::format("journal", format!("record {}: too short", record.id)))?;
    let number = u64::from_le_bytes(*number);
    Ok((number, event::decode(number, payload)?))
}

/// A learner without history, with this A.
fn with_a(live: &Learner, a: Factor, unit: Option<f64>) -> Result<Learner> {
    let fresh = blank(live);
    let like = fresh.layer();
    let layer = Layer::new(a.cast(like.a.dtype()), (*like.b).clone(), like.alpha, like.rslora)?;
    let master = Layer::new(a, fresh.master().b.as_ref().clone(), like.alpha, like.rslora)?;
    let mut learner = Learner::with_master(Arc::new(layer), Some(Arc::new(master)));
    learner.basis_unit = unit;
    Ok(learner)
}

/// Journals that no state belongs to: left by a process that was killed while it made a new one.
fn sweep(dir: &Path, keep: u64) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let number =
            name.to_str().and_then(|n| n.strip_prefix("journal-")).and_then(|n| n.parse::<u64>().ok());
        if number.is_some_and(|n| n != keep) {
            drop(fs::remove_dir_all(entry.path()));
        }
    }
}
