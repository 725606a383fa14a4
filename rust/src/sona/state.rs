//! The whole loop as bytes, and back: weights and rule state of all members, accepted state, reservoir, patterns,
//! window and counters in one safetensors file with a JSON document.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::members::Members;
use super::stats::Counts;
use super::window::{Pending, Window};
use super::{Accepted, Back, Inner, Settings, Sona};
use crate::adapter::Adapter;
use crate::error::{Error, Result};
use crate::format::{self, AdapterParts, Tensor, TensorDtype};
use crate::journal::event;
use crate::learn::Learner;
use crate::learn::bandit::LiveBandit;
use crate::micro_lora::MicroLora;
use crate::replay::{PatternBank, Reservoir};
use crate::snapshot::Snapshot;

/// Version of the layout.
pub const STATE_VERSION: u32 = 1;
const DOCUMENT: &str = "sona/document";

#[derive(Serialize, Deserialize)]
struct Document {
    format: u32,
    build: String,
    isa: String,
    config: Option<String>,
    settings: Settings,
    next: u64,
    /// Records of the journal that are in this state.
    sequence: u64,
    /// Number of the journal's directory; 0 outside one.
    journal: u64,
    warm: bool,
    contradicted: u64,
    /// Whether live weights are the accepted ones with the window on top.
    complete: bool,
    /// Module of the bandit, where there is one.
    bandit: Option<usize>,
    enabled: bool,
    members: usize,
    /// Accepted events of every module, and quality, of each member.
    accepted: Vec<(Vec<u64>, (f64, u64))>,
    counts: Counts,
    held_out: Vec<bool>,
}

fn bytes_tensor(name: String, data: Vec<u8>) -> Tensor {
    Tensor { name, dtype: TensorDtype::U8, shape: vec![data.len()], data: data.into() }
}

fn bad(reason: impl Into<String>) -> Error {
    Error::format("state", reason)
}

/// What is copied under the locks; it becomes bytes without them.
struct Copied {
    document: Document,
    live: Vec<Snapshot>,
    slow: Vec<Accepted>,
    window: Vec<Pending>,
    centroids: Vec<f32>,
    tensors: Vec<Tensor>,
}

impl Sona {
    fn copy_state(&self, back: &Back, config: Option<String>, journal: u64) -> Copied {
        let bandit = self.bandit();
        let inner = self.inner();
        let members = self.members.load_full();
        let task = back.task.iter().flat_map(|t| &t.taken);
        let window: Vec<Pending> = task.chain(inner.window.iter()).cloned().collect();
        let document = Document {
            format: STATE_VERSION,
            build: env!("CARGO_PKG_VERSION").into(),
            isa: self.kernels.isa().to_string(),
            config,
            settings: self.settings.clone(),
            next: inner.next,
            sequence: inner.sequence(),
            journal,
            warm: back.warm,
            contradicted: back.contradicted,
            complete: inner.complete && back.task.is_none(),
            bandit: bandit.as_ref().map(LiveBandit::module),
            enabled: self.lora.enabled(),
            members: members.loras.len(),
            accepted: back.slow.iter().map(|a| (a.events.clone(), a.quality)).collect(),
            counts: inner.stats.counts.clone(),
            held_out: window.iter().map(|p| p.held_out).collect(),
        };
        let live = members.loras.iter().map(|l| l.snapshot()).collect();
        drop(inner);
        let mut tensors = back.reservoir.to_tensors("reservoir");
        tensors.extend(back.bank.to_tensors("patterns"));
        if let Some(b) = &*bandit {
            tensors.extend(b.to_tensors("bandit"));
        }
        let centroids = members.centroids.clone();
        Copied { document, live, slow: back.slow.clone(), window, centroids, tensors }
    }

    /// Everything that a loop needs to go on, bit for bit on the same build and instruction set.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn to_bytes(&self, config: Option<String>) -> Result<Vec<u8>> {
        let _inside = self.gate.enter();
        let back = self.back();
        self.bytes_of(&back, config, 0)
    }

    pub(super) fn bytes_of(&self, back: &Back, config: Option<String>, journal: u64) -> Result<Vec<u8>> {
        let Copied { document, live, slow, window, centroids, tensors: mut extra } =
            self.copy_state(back, config, journal);
        for (i, s) in live.iter().enumerate() {
            extra.push(bytes_tensor(format!("sona/live/{i}"), s.to_bytes()?));
        }
        for (i, a) in slow.iter().enumerate() {
            let like = &live[i.min(live.len() - 1)];
            extra.push(bytes_tensor(format!("sona/accepted/{i}"), self.as_snapshot(like, a).to_bytes()?));
            for (m, g) in a.grams.iter().enumerate() {
                let rank = a.learners[m].layer().rank();
                extra.push(Tensor {
                    name: format!("sona/gram/{i}/{m}"),
                    dtype: TensorDtype::F64,
                    shape: vec![rank, rank],
                    data: g.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>().into(),
                });
            }
        }
        let mut events = Vec::new();
        for p in &window {
            let e = event::Event::new(&p.sample)?;
            events.extend(p.sample.event.to_le_bytes());
            events.extend((e.bytes() as u64).to_le_bytes());
            e.parts().iter().for_each(|part| events.extend_from_slice(part));
        }
        extra.push(bytes_tensor("sona/window".into(), events));
        let data = centroids.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>();
        extra.push(bytes_tensor("sona/centroids".into(), data));
        let json = serde_json::to_vec(&document).map_err(|e| bad(e.to_string()))?;
        extra.push(bytes_tensor(DOCUMENT.into(), json));
        format::to_bytes(&AdapterParts { extra, ..AdapterParts::default() })
    }

    fn as_snapshot(&self, like: &Snapshot, accepted: &Accepted) -> Snapshot {
        let layers = accepted.learners.iter().map(|l| Arc::clone(l.layer()));
        let modules = self.lora.names().iter().cloned().zip(layers).collect();
        let adapter = Adapter { modules, ..Adapter::default() };
        Snapshot { adapter, learners: accepted.learners.clone(), ..like.clone() }
    }

    /// Goes on from the bytes of a loop with the same modules, shapes and settings.
    ///
    /// # Errors
    /// Bytes of something else, of a newer layout, damaged, or of other settings. Nothing changes then.
    pub fn restore(&self, bytes: &[u8]) -> Result<()> {
        let _inside = self.gate.enter();
        let mut back = self.back();
        if self.place().is_some() {
            let want = "one without: close() it first, its journal goes on from other weights";
            return Err(Error::config("restore", "a loop with a state directory", want));
        }
        let (mut bandit, mut inner) = (self.bandit(), self.inner());
        self.restore_into(&mut back, &mut bandit, &mut inner, bytes).map(drop)
    }

    /// Returns the number of the journal that goes with the state.
    pub(super) fn restore_into(
        &self,
        back: &mut Back,
        bandit_now: &mut Option<LiveBandit>,
        inner: &mut Inner,
        bytes: &[u8],
    ) -> Result<u64> {
        let read = Read::new(bytes)?;
        let doc = &read.document;
        let (got, want) = (serde_json::to_value(&doc.settings), serde_json::to_value(&self.settings));
        if let (Ok(serde_json::Value::Object(got)), Ok(serde_json::Value::Object(want))) = (got, want) {
            for (key, value) in &want {
                if got.get(key) != Some(value) {
                    let got = got.get(key).map_or("nothing".into(), ToString::to_string);
                    return Err(Error::config(key, value, format!("{got}, as the state was saved with")));
                }
            }
        }
        let live = (0..doc.members)
            .map(|i| Snapshot::from_bytes(&read.tensor(&format!("sona/live/{i}"))?.data))
            .collect::<Result<Vec<_>>>()?;
        let mut slow = Vec::new();
        for (i, (events, quality)) in doc.accepted.iter().enumerate() {
            let snapshot = Snapshot::from_bytes(&read.tensor(&format!("sona/accepted/{i}"))?.data)?;
            self.lora.check_same(&snapshot.adapter)?;
            let mut a = Accepted::new(self.in_order(&snapshot)?);
            for (m, g) in a.grams.iter_mut().enumerate() {
                let t = read.tensor(&format!("sona/gram/{i}/{m}"))?;
                if t.data.len() != 8 * g.len() {
                    return Err(bad(format!("{} does not fit its module", t.name)));
                }
                for (g, v) in g.iter_mut().zip(t.data.chunks_exact(8)) {
                    *g = f64::from_le_bytes(v.try_into().expect("eight bytes"));
                }
            }
            if events.len() != a.events.len() {
                return Err(bad("accepted events of other modules"));
            }
            (a.events, a.quality) = (events.clone(), *quality);
            slow.push(a);
        }
        let window = read.window()?;
        let reservoir = Reservoir::from_tensors("reservoir", &read.tensors)?;
        let bank = PatternBank::from_tensors("patterns", &read.tensors)?;
        let centroids = read.tensor("sona/centroids")?.data.to_vec();
        let read_f32 = |c: &[u8]| f32::from_le_bytes([c[0], c[1], c[2], c[3]]);
        let centroids: Vec<f32> = centroids.chunks_exact(4).map(read_f32).collect();
        let width = self.lora.shape(0).0;
        let wanted = if doc.members == 1 { [0, width] } else { [doc.members * width; 2] };
        if live.is_empty() || slow.len() != doc.members || !wanted.contains(&centroids.len()) {
            return Err(bad("members, accepted members and centroids do not agree"));
        }
        for s in &live {
            self.lora.check_same(&s.adapter)?;
        }
        let bandit = doc
            .bandit
            .map(|m| LiveBandit::from_tensors(&self.lora, m, "bandit", &read.tensors))
            .transpose()?;
        // Nothing failed: from here on it is taken.
        let mut loras = vec![Arc::clone(&self.lora)];
        for s in &live[1..] {
            loras.push(Arc::new(MicroLora::from_adapter(&s.adapter, 0, *self.lora.settings())?));
        }
        for (lora, s) in loras.iter().zip(&live) {
            lora.restore(s)?;
        }
        self.lora.set_enabled(doc.enabled);
        self.members.store(Arc::new(Members { loras, centroids }));
        *back = Back {
            reservoir,
            bank,
            slow,
            task: None,
            contradicted: doc.contradicted,
            started: None,
            warm: doc.warm,
            quiet: back.quiet,
        };
        inner.next = doc.next;
        inner.set_sequence(doc.sequence);
        inner.window = window;
        inner.stats.counts = doc.counts.clone();
        (inner.taken_through, inner.overflowed, inner.complete) = (None, false, doc.complete);
        *bandit_now = bandit;
        Ok(doc.journal)
    }

    /// Learners of a snapshot in the order of this loop's modules.
    pub(super) fn in_order(&self, s: &Snapshot) -> Result<Vec<Learner>> {
        let at = |name: &String| s.adapter.modules.iter().position(|(n, _)| n == name);
        let find = |name| at(name).map(|i| s.learners[i].clone());
        let all = self.lora.names().iter().map(find).collect::<Option<Vec<_>>>();
        all.ok_or_else(|| bad("a module is missing"))
    }
}

/// The configuration that a state was saved with.
///
/// # Errors
/// Bytes of something else, or of a newer layout.
pub fn config_of(bytes: &[u8]) -> Result<Option<String>> {
    Ok(Read::new(bytes)?.document.config)
}

/// Instruction set and build of a state.
pub(super) fn origin_of(bytes: &[u8]) -> Result<(String, String)> {
    let read = Read::new(bytes)?;
    Ok((read.document.isa, read.document.build))
}

/// Number of the last record that is in a state.
pub(super) fn sequence_of(bytes: &[u8]) -> Result<u64> {
    Ok(Read::new(bytes)?.document.sequence)
}

struct Read {
    tensors: Vec<Tensor>,
    document: Document,
}

impl Read {
    fn new(bytes: &[u8]) -> Result<Self> {
        let tensors = format::from_bytes(bytes, true)?.parts.extra;
        let found = tensors.iter().find(|t| t.name == DOCUMENT);
        let json = found.ok_or_else(|| bad("no state of a loop; an adapter is read by microlora.load"))?;
        #[derive(Deserialize)]
        struct Version {
            format: u32,
        }
        let version: Version = serde_json::from_slice(&json.data).map_err(|e| bad(e.to_string()))?;
        if version.format > STATE_VERSION {
            return Err(bad(format!(
                "layout {}, this microlora reads up to {STATE_VERSION}: install a newer one",
                version.format
            )));
        }
        let document = serde_json::from_slice(&json.data).map_err(|e| bad(e.to_string()))?;
        Ok(Read { document, tensors })
    }

    fn tensor(&self, name: &str) -> Result<&Tensor> {
        self.tensors.iter().find(|t| t.name == name).ok_or_else(|| bad(format!("{name} is missing")))
    }

    fn window(&self) -> Result<Window> {
        let data = &self.tensor("sona/window")?.data;
        let mut rest: &[u8] = data;
        let mut taken = Vec::new();
        for &held_out in &self.document.held_out {
            let cut = || bad("the window is cut off");
            let (head, after) = rest.split_at_checked(16).ok_or_else(cut)?;
            let word = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("eight bytes"));
            let len = usize::try_from(word(8)).map_err(|_| cut())?;
            let (body, after) = after.split_at_checked(len).ok_or_else(cut)?;
            taken.push(Pending { sample: event::decode(word(0), body)?, held_out });
            rest = after;
        }
        if !rest.is_empty() {
            return Err(bad("the window is longer than it says"));
        }
        let mut window = Window::default();
        window.put_back(taken);
        Ok(window)
    }
}
