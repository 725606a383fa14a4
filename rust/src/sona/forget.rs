//! Taking an event out of what was learned from it, and saying which events there were.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use serde::Serialize;

use super::finish::Decision;
use super::gather::concerns;
use super::records::{Ended, Recorder, kind, unpack};
use super::recover::{Mode, begin_file, journal_dir, read_event};
use super::state::sequence_of;
use super::window::Pending;
use super::{Back, Inner, Sona};
use crate::error::{Error, Result};
use crate::format::atomic;
use crate::journal::Journal;
use crate::learn::bandit::LiveBandit;
use crate::learn::{Feedback, Rule, TargetLoss};
use crate::swap::HotSwap;

/// How an event was forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forgotten {
    /// The events around it were learned again without it: exact.
    Replay,
    /// It was subtracted from the recursion: to rounding.
    Downdate,
}

impl Forgotten {
    /// The public name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Forgotten::Replay => "replay",
            Forgotten::Downdate => "downdate",
        }
    }
}

/// One line of an audit.
#[derive(Clone, Debug, Serialize)]
pub struct Audit {
    /// Number of the record.
    pub record: u64,
    /// What happened: event, consolidation, cancelled, warm_up, deep, choice, reward.
    pub kind: &'static str,
    /// Seconds since 1970.
    pub time: f64,
    /// Number of the event.
    pub event: Option<u64>,
    /// Module that it was about; none is every one.
    pub module: Option<String>,
    /// Kind of its feedback.
    pub feedback: Option<&'static str>,
    /// Its quality.
    pub quality: Option<f32>,
    /// Whether it was kept for the gate, so that it shaped no weights.
    pub held_out: Option<bool>,
    /// What a consolidation came to.
    pub outcome: Option<&'static str>,
}

fn refused(event: u64, why: impl Into<String>) -> Error {
    Error::Feedback(format!("event {event} cannot be forgotten: {}", why.into()))
}

impl Sona {
    /// Takes one event out of what was learned. `how`: by replay where that is possible, else by downdate.
    ///
    /// An event of the window goes by learning the window again on the accepted weights. An event before that
    /// goes by replaying the journal from its beginning, consolidations and all, into a new journal without it.
    ///
    /// # Errors
    /// An event that is unknown, or that neither way can take out; the message says why. Nothing changes then.
    pub fn forget(&self, event: u64, how: Option<Forgotten>) -> Result<Forgotten> {
        let _inside = self.gate.enter();
        let back = &mut *self.back();
        if let Some(task) = back.task.take() {
            self.cancel(task, None)?;
        }
        let (pending, complete, journalled) = {
            let inner = self.inner();
            if event == 0 || event >= inner.next {
                return Err(refused(event, format!("the last one was {}", inner.next - 1)));
            }
            let pending = inner.window.iter().find(|p| p.sample.event == event).cloned();
            (pending, inner.complete, inner.recorder.is_some())
        };
        if journalled {
            if how == Some(Forgotten::Downdate) {
                return Err(refused(event, "what is journalled must go from the disk too: use replay"));
            }
            // What is on disk must not hold it either, so everything is learned again from the disk.
            return self.forget_journalled(back, event);
        }
        let Some(p) = pending else {
            let why = match how {
                Some(Forgotten::Downdate) => "a downdate needs an event that is not consolidated yet",
                _ => "it has left the window, and there is no journal to replay",
            };
            return Err(refused(event, why));
        };
        match how {
            Some(Forgotten::Downdate) => self.downdate(back, &p),
            Some(Forgotten::Replay) if !complete => {
                let why = "events have left the window since the last consolidation, and there is no journal";
                Err(refused(event, why))
            }
            _ if complete => self.forget_pending(back, &p),
            _ => self.downdate(back, &p),
        }
    }

    /// The window again, on the accepted weights, without one of its events.
    fn forget_pending(&self, back: &Back, p: &Pending) -> Result<Forgotten> {
        let members = self.members.load_full();
        {
            let mut inner = self.inner();
            inner.window.remove(p.sample.event);
            inner.taken_through = Some(0);
            inner.overflowed = false;
        }
        let learners = back.slow.iter().map(|a| a.learners.clone()).collect();
        let served = self.serve(&members, learners, None);
        if served.is_err() {
            self.inner().taken_through = None;
        }
        match served? {
            Some(_) => Ok(Forgotten::Replay),
            None => Err(refused(p.sample.event, "too many events came meanwhile: try again")),
        }
    }

    /// `P^-1 -= w u u^T` and B with it, for an event of recursive least squares.
    fn downdate(&self, back: &Back, p: &Pending) -> Result<Forgotten> {
        let (s, event) = (&p.sample, p.sample.event);
        if p.held_out {
            self.inner().window.remove(event);
            return Ok(Forgotten::Downdate);
        }
        let settings = &self.lora.settings().instant;
        let Feedback::Target { target, loss: TargetLoss::Mse } = &*s.feedback else {
            return Err(refused(event, "a downdate needs a squared-error target"));
        };
        if settings.rule == Rule::Nlms {
            return Err(refused(event, "a downdate needs the rule rls, the learner's is nlms"));
        }
        if settings.forgetting < 1.0 {
            return Err(refused(event, "the learner forgets by itself (instant.forgetting below 1)"));
        }
        let lora = self.member_of(&s.x);
        let mut inner = self.inner();
        let squared = |f: &Feedback| matches!(f, Feedback::Target { loss: TargetLoss::Mse, .. });
        let after = || inner.window.iter().skip_while(|q| q.sample.event < event);
        if after().any(|q| !q.held_out && !squared(&q.sample.feedback)) {
            return Err(refused(
                event,
                "feedback other than squared-error targets came after it: use replay",
            ));
        }
        for m in self.concerned(s.module.map(|m| m as usize)) {
            let mut all = back.slow.iter().map(|a| &a.learners[m]);
            let scaled = all.all(|l| l.rls.is_some() || l.basis_unit.is_some());
            let taught = |q: &&Pending| !q.held_out && concerns(q.sample.module, m as u32);
            let first = inner.window.iter().filter(taught).find(|q| squared(&q.sample.feedback));
            if !scaled && (!inner.complete || first.is_some_and(|q| q.sample.event == event)) {
                return Err(refused(event, "it may have set the scale of the recursion: use replay"));
            }
        }
        let mut learners = lora.inspect(<[_]>::to_vec);
        for m in self.concerned(s.module.map(|m| m as usize)) {
            let step = crate::learn::learner::Event {
                x: &s.x,
                feedback: &s.feedback,
                base: s.base.as_deref(),
                weight: s.weight,
            };
            crate::learn::rls::downdate(&mut learners[m], self.kernels, step, target)?;
        }
        lora.exchange(&mut learners);
        inner.window.remove(event);
        Ok(Forgotten::Downdate)
    }

    /// Everything again from the beginning of the journal, into a new one that never held the event. Nothing is
    /// learned meanwhile, so that nothing is lost; readers go on.
    fn forget_journalled(&self, back: &mut Back, event: u64) -> Result<Forgotten> {
        let (mut bandit, mut inner) = (self.bandit(), self.inner());
        let bytes = self.replayed_without(&inner, event)?;
        self.take_over(back, &mut bandit, &mut inner, &bytes)?;
        drop((bandit, inner));
        back.quiet = false;
        self.publish(back)?;
        Ok(Forgotten::Replay)
    }

    /// A loop that never saw the event, as bytes; its journal lies beside the present one.
    fn replayed_without(&self, inner: &Inner, event: u64) -> Result<Vec<u8>> {
        let (dir, number, config, options) = {
            let places = self.place();
            let p = places.as_ref().expect("a journal lies in a directory");
            (p.lock.dir().to_owned(), p.journal, p.config.clone(), p.options.unwrap_or_default())
        };
        let old = &inner.recorder.as_ref().expect("there is a journal").journal;
        let (from, to) = (journal_dir(&dir, number), journal_dir(&dir, number + 1));
        let begin = beginning(old, &dir, &from, event)?;
        let begins_after = sequence_of(&begin)?;
        let lora = crate::MicroLora::from_adapter(&self.lora.adapter(), 0, *self.lora.settings())?;
        let twin = Sona::new(Arc::new(lora), Arc::new(HotSwap::new(false)?), self.settings.clone())?;
        drop(fs::remove_dir_all(&to));
        let made = (|| {
            let mut other = twin.back();
            twin.restore_into(&mut other, &mut twin.bandit(), &mut twin.inner(), &begin)?;
            other.quiet = true;
            let first = twin.inner().next;
            let waits = twin.inner().window.iter().any(|p| p.sample.event == event);
            if event < first && !waits {
                return Err(refused(event, format!("the journal begins with event {first}")));
            }
            let (journal, _) = twin.journal_in(&to, options)?;
            let waiting = twin.inner().window.iter().find(|p| p.sample.event == event).cloned();
            if let Some(p) = waiting {
                if !twin.inner().complete {
                    return Err(refused(event, "events had left the window when the journal began"));
                }
                twin.forget_pending(&other, &p)?;
            }
            let begin = twin.bytes_of(&other, config.clone(), number + 1)?;
            atomic::write(&begin_file(&to), |w| w.write_all(&begin))?;
            twin.inner().recorder = Some(Recorder { journal });
            // Consumed: a consolidation that began after it has ended.
            let (mut seen, mut taken, mut consumed) = (waits, false, false);
            for record in old.records()? {
                let record = record?;
                if record.id <= begins_after {
                    continue;
                }
                match record.kind {
                    kind::EVENT if read_event(&record)?.0 == event => {
                        seen = true;
                        continue;
                    }
                    kind::BEGIN => taken = seen,
                    kind::DONE => consumed |= taken,
                    kind::DEEP if consumed => {
                        let why = "a deep run has trained on what it taught: train anew without it";
                        return Err(refused(event, why));
                    }
                    _ => {}
                }
                twin.apply(&mut other, &record, Mode::Anew, &mut Vec::new())?;
            }
            if !seen {
                return Err(refused(event, "the journal does not hold it"));
            }
            if let Some(task) = other.task.take() {
                twin.cancel(task, None)?;
            }
            other.reservoir.forget(event);
            let mut mine = twin.inner();
            mine.next = inner.next;
            if let Some(mut r) = mine.recorder.take() {
                r.journal.sync()?;
            }
            drop(mine);
            twin.bytes_of(&other, config, number + 1)
        })();
        if made.is_err() {
            drop(fs::remove_dir_all(&to));
        }
        made
    }

    /// Goes on from a rewritten journal; its state's rename is the moment from which the old one is gone.
    fn take_over(
        &self,
        back: &mut Back,
        bandit: &mut Option<LiveBandit>,
        inner: &mut Inner,
        bytes: &[u8],
    ) -> Result<()> {
        let mut places = self.place();
        let p = places.as_mut().expect("a journal lies in a directory");
        let dir = p.lock.dir().to_owned();
        atomic::write(&dir.join("state.safetensors"), |w| w.write_all(bytes))?;
        let old = journal_dir(&dir, p.journal);
        p.journal += 1;
        let (journal, _) = self.journal_in(&journal_dir(&dir, p.journal), p.options.unwrap_or_default())?;
        inner.recorder = None;
        self.restore_into(back, bandit, inner, bytes)?;
        inner.recorder = Some(Recorder { journal });
        drop(fs::remove_dir_all(old));
        Ok(())
    }

    /// What the journal holds, oldest first: which events came, and what was made of them.
    ///
    /// # Errors
    /// A loop without a journal.
    pub fn audit(&self) -> Result<Vec<Audit>> {
        let _inside = self.gate.enter();
        let mut inner = self.inner();
        let inner = &mut *inner;
        let Some(recorder) = &inner.recorder else {
            return Err(Error::config("audit", "a loop without a journal", "one that was opened with one"));
        };
        let mut all = Vec::new();
        for record in recorder.journal.records()? {
            let record = record?;
            let mut line = Audit {
                record: record.id,
                kind: "event",
                time: record.timestamp_us as f64 / 1e6,
                event: None,
                module: None,
                feedback: None,
                quality: None,
                held_out: None,
                outcome: None,
            };
            match record.kind {
                kind::EVENT => {
                    let (number, s) = read_event(&record)?;
                    line.event = Some(number);
                    line.module = s.module.map(|m| self.lora.names()[m as usize].clone());
                    line.feedback = Some(s.feedback.name());
                    line.quality = s.quality;
                    let bare = matches!(*s.feedback, Feedback::Gradient { .. });
                    line.held_out = Some(inner.hold.contains(number) && !bare);
                }
                kind::BEGIN => continue,
                kind::DONE => {
                    let (ended, _): (Ended, _) = unpack(&record.payload)?;
                    line.kind = "consolidation";
                    line.outcome = Some(match ended.decision {
                        Decision::Accept => "accepted",
                        Decision::Keep => "kept",
                        Decision::RollBack => "rolled_back",
                    });
                }
                kind::REFUSED => {
                    let number = record.payload.first_chunk::<8>().map(|n| u64::from_le_bytes(*n));
                    if all.last().is_some_and(|line: &Audit| line.event == number) {
                        all.pop();
                    }
                    continue;
                }
                kind::CANCELLED => line.kind = "cancelled",
                kind::STARTED => line.kind = "warm_up",
                kind::DEEP => line.kind = "deep",
                kind::CHOICE => line.kind = "choice",
                kind::REWARD => line.kind = "reward",
                _ => line.kind = "unknown",
            }
            all.push(line);
        }
        Ok(all)
    }
}

/// The state that a replay starts from: where the journal begins, or the last checkpoint, where retention has taken
/// the records in between.
fn beginning(old: &Journal, dir: &Path, journal: &Path, event: u64) -> Result<Vec<u8>> {
    let read = |path: &Path| match fs::read(path) {
        Ok(bytes) => Ok(bytes),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Err(refused(
            event,
            format!("the state that the journal begins with is missing: {}", path.display()),
        )),
        Err(e) => Err(Error::io(path, e)),
    };
    let begin = read(&begin_file(journal))?;
    let first = old.records()?.next().transpose()?.map(|r| r.id);
    let whole = sequence_of(&begin)? + 1;
    if first.is_none_or(|id| id == whole) { Ok(begin) } else { read(&dir.join("state.safetensors")) }
}
