//! A replay memory as bytes: a safetensors container with its own format name.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::format::{Tensor, TensorDtype, container};
use crate::rng::{Rng, RngState};

use super::replay_memory::{CHOOSE, DRAW, Kept, ReplayMemory, ReplaySettings};

const FORMAT: &str = "microlora-replay";
const VERSION: u32 = 1;
/// What errors call the bytes.
const FILE: &str = "replay memory";

#[derive(Serialize, Deserialize)]
struct State {
    version: u32,
    settings: ReplaySettings,
    modules: Vec<String>,
    seen: u64,
    choose: RngState,
    draw: RngState,
}

fn bad(reason: impl Into<String>) -> Error {
    Error::format(FILE, reason.into())
}

fn floats(name: &str, v: &[f32], rows: usize) -> Tensor {
    let data: Vec<u8> = v.iter().flat_map(|v| v.to_le_bytes()).collect();
    let shape = vec![rows, v.len() / rows];
    Tensor { name: name.into(), dtype: TensorDtype::F32, shape, data: data.into() }
}

fn integers(name: &str, v: impl Iterator<Item = i64>) -> Tensor {
    let data: Vec<u8> = v.flat_map(i64::to_le_bytes).collect();
    Tensor { name: name.into(), dtype: TensorDtype::I64, shape: vec![data.len() / 8], data: data.into() }
}

/// The numbers of a float tensor of `rows` rows.
fn read_floats(t: &Tensor, rows: usize) -> Result<Vec<f32>> {
    if t.dtype != TensorDtype::F32 || t.shape.len() != 2 || t.shape[0] != rows || t.shape[1] == 0 {
        return Err(bad(format!(
            "{} has shape {:?} of {:?}, expected F32 of {rows} rows",
            t.name, t.shape, t.dtype
        )));
    }
    let number = |c: &[u8]| f32::from_le_bytes([c[0], c[1], c[2], c[3]]);
    let v: Vec<f32> = t.data.chunks_exact(4).map(number).collect();
    if v.iter().all(|v| v.is_finite()) { Ok(v) } else { Err(bad(format!("{} is not finite", t.name))) }
}

/// The numbers of an integer tensor.
fn read_integers(t: &Tensor, high: u64) -> Result<Vec<i64>> {
    if t.dtype != TensorDtype::I64 || t.shape.len() != 1 {
        return Err(bad(format!("{} has shape {:?} of {:?}, expected I64 (n,)", t.name, t.shape, t.dtype)));
    }
    let number = |c: &[u8]| i64::from_le_bytes([c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]]);
    let v: Vec<i64> = t.data.chunks_exact(8).map(number).collect();
    let fits = |v: &i64| u64::try_from(*v).is_ok_and(|v| v < high);
    if v.iter().all(fits) { Ok(v) } else { Err(bad(format!("{} has numbers outside 0 to {high}", t.name))) }
}

impl ReplayMemory {
    /// Rows, settings and where the draws stand; [`ReplayMemory::restore`] goes on bit for bit.
    ///
    /// # Errors
    /// Those of the container.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let (kept, rows) = (&*self.kept, self.kept.rows());
        let mut tensors = Vec::new();
        if rows > 0 {
            tensors.push(integers("places", kept.places.iter().map(|p| *p as i64)));
            for (name, v) in [("x", &kept.x), ("outputs", &kept.outputs), ("weights", &kept.weights)] {
                tensors.push(floats(name, v, rows));
            }
            if kept.labels.is_empty() {
                tensors.push(floats("targets", &kept.targets, rows));
            } else {
                tensors.push(integers("labels", kept.labels.iter().copied()));
            }
        }
        let state = State {
            version: VERSION,
            settings: self.settings,
            modules: kept.modules.clone(),
            seen: self.seen,
            choose: self.choose.state(),
            draw: self.draw.state(),
        };
        let json = serde_json::to_string(&state).map_err(|e| bad(e.to_string()))?;
        let metadata = BTreeMap::from([("format".into(), FORMAT.into()), ("state".into(), json)]);
        let named = tensors.iter().map(|t| (t.name.clone(), t)).collect();
        let layout = container::lay_out(&metadata, named, FILE)?;
        let mut out = Vec::with_capacity(layout.len());
        layout.write_to(&mut out).map_err(|e| Error::io(FILE, e))?;
        Ok(out)
    }

    /// Takes what [`ReplayMemory::to_bytes`] wrote, whole or not at all.
    ///
    /// # Errors
    /// Other bytes, a newer version, other settings, numbers that no memory holds.
    pub fn restore(&mut self, bytes: &[u8]) -> Result<()> {
        let file = container::parse(&bytes.to_vec().into(), FILE)?;
        if file.metadata.get("format").map(String::as_str) != Some(FORMAT) {
            return Err(bad(format!("not written by a replay memory (format is not {FORMAT})")));
        }
        let json = file.metadata.get("state").ok_or_else(|| bad("no state"))?;
        let version: serde_json::Value = serde_json::from_str(json).map_err(|e| bad(e.to_string()))?;
        let version = version.get("version").and_then(serde_json::Value::as_u64).unwrap_or(0);
        if version != u64::from(VERSION) {
            return Err(bad(format!("version {version}, this build reads {VERSION}")));
        }
        let state: State = serde_json::from_str(json).map_err(|e| bad(e.to_string()))?;
        if state.settings != self.settings {
            let (got, want) = (format!("{:?}", state.settings), format!("{:?}", self.settings));
            return Err(Error::config("replay", got, want));
        }
        let seed = self.settings.seed;
        for (name, rng, stream) in [("choose", state.choose, CHOOSE), ("draw", state.draw, DRAW)] {
            if (rng.seed, rng.stream) != (seed, stream) {
                return Err(bad(format!(
                    "{name}: stream {} of seed {}, expected {stream} of {seed}",
                    rng.stream, rng.seed
                )));
            }
        }
        let kept = read_kept(&file.tensors, &state)?;
        let full = state.seen.min(self.settings.capacity as u64);
        if kept.rows() as u64 != full {
            return Err(bad(format!(
                "{} rows after {} that were seen, expected {full}",
                kept.rows(),
                state.seen
            )));
        }
        self.kept = Arc::new(kept);
        self.seen = state.seen;
        (self.choose, self.draw) = (Rng::resume(state.choose), Rng::resume(state.draw));
        Ok(())
    }
}

fn read_kept(tensors: &[Tensor], state: &State) -> Result<Kept> {
    let find = |name: &str| tensors.iter().find(|t| t.name == name);
    let Some(places) = find("places") else {
        return if tensors.is_empty() { Ok(Kept::default()) } else { Err(bad("no places")) };
    };
    let places: Vec<u64> = read_integers(places, state.seen)?.into_iter().map(|p| p as u64).collect();
    let rows = places.len();
    let need = |name: &str| find(name).ok_or_else(|| bad(format!("no {name}")));
    let (x, outputs) = (read_floats(need("x")?, rows)?, read_floats(need("outputs")?, rows)?);
    let weights = read_floats(need("weights")?, rows)?;
    if weights.len() != rows || weights.iter().any(|w| *w < 0.0) {
        return Err(bad("weights: expected one of 0 or above per row"));
    }
    let mut kept = Kept { places, x, outputs, weights, modules: state.modules.clone(), ..Kept::default() };
    match (find("labels"), find("targets")) {
        (Some(labels), None) => {
            kept.labels = read_integers(labels, (kept.outputs.len() / rows.max(1)) as u64)?;
            if kept.labels.len() != rows {
                return Err(bad(format!("{} labels, expected {rows}", kept.labels.len())));
            }
        }
        (None, Some(targets)) => kept.targets = read_floats(targets, rows)?,
        _ => return Err(bad("expected either labels or targets")),
    }
    Ok(kept)
}
