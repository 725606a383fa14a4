//! An optimiser's moments as bytes: a safetensors container with its own format name.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::format::{Tensor, TensorDtype, container};

use super::optim::{ModuleSlots, OptimSettings, Optimizer, Slot};

const FORMAT: &str = "microlora-optimizer";
const VERSION: u32 = 1;
/// What errors call the bytes.
const FILE: &str = "optimizer state";

#[derive(Serialize, Deserialize)]
struct State {
    version: u32,
    settings: OptimSettings,
    shapes: Vec<[usize; 3]>,
    steps: u64,
    /// Steps of A, B and magnitudes of every module.
    slots: Vec<[u64; 3]>,
}

fn parts(s: &ModuleSlots) -> [(&'static str, &Slot); 3] {
    [("a", &s.a), ("b", &s.b), ("magnitude", &s.magnitude)]
}

fn tensor(name: String, v: &[f32]) -> Tensor {
    let data: Vec<u8> = v.iter().flat_map(|v| v.to_le_bytes()).collect();
    Tensor { name, dtype: TensorDtype::F32, shape: vec![v.len()], data: data.into() }
}

impl Optimizer {
    /// Moments, counts and settings; [`Optimizer::restore`] goes on bit for bit.
    ///
    /// # Errors
    /// Those of the container.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut tensors = Vec::new();
        for (i, slots) in self.slots.iter().enumerate() {
            for (part, slot) in parts(slots) {
                for (what, v) in [("m", &slot.m), ("v", &slot.v)] {
                    if !v.is_empty() {
                        tensors.push(tensor(format!("{i}/{part}/{what}"), v));
                    }
                }
            }
        }
        let state = State {
            version: VERSION,
            settings: self.settings,
            shapes: self.shapes.clone(),
            steps: self.steps,
            slots: self.slots.iter().map(|s| parts(s).map(|(_, s)| s.steps)).collect(),
        };
        let json = serde_json::to_string(&state).map_err(|e| Error::format(FILE, e.to_string()))?;
        let metadata = BTreeMap::from([("format".into(), FORMAT.into()), ("state".into(), json)]);
        let named = tensors.iter().map(|t| (t.name.clone(), t)).collect();
        let layout = container::lay_out(&metadata, named, FILE)?;
        let mut out = Vec::with_capacity(layout.len());
        layout.write_to(&mut out).map_err(|e| Error::io(FILE, e))?;
        Ok(out)
    }

    /// Takes what [`Optimizer::to_bytes`] wrote, whole or not at all.
    ///
    /// # Errors
    /// Other bytes, a newer version, other settings or shapes, numbers that are not finite.
    pub fn restore(&mut self, bytes: &[u8]) -> Result<()> {
        let bad = |reason: String| Error::format(FILE, reason);
        let file = container::parse(&bytes.to_vec().into(), FILE)?;
        if file.metadata.get("format").map(String::as_str) != Some(FORMAT) {
            return Err(bad(format!("not written by an optimizer (format is not {FORMAT})")));
        }
        let json = file.metadata.get("state").ok_or_else(|| bad("no state".into()))?;
        let version: serde_json::Value = serde_json::from_str(json).map_err(|e| bad(e.to_string()))?;
        let version = version.get("version").and_then(serde_json::Value::as_u64).unwrap_or(0);
        if version != u64::from(VERSION) {
            return Err(bad(format!("version {version}, this build reads {VERSION}")));
        }
        let state: State = serde_json::from_str(json).map_err(|e| bad(e.to_string()))?;
        if state.settings != self.settings {
            let (got, want) = (format!("{:?}", state.settings), format!("{:?}", self.settings));
            return Err(Error::config("optimizer", got, want));
        }
        if state.shapes != self.shapes || state.slots.len() != self.slots.len() {
            return Err(Error::config(
                "optimizer shapes",
                format!("{:?}", state.shapes),
                format!("{:?}", self.shapes),
            ));
        }
        let mut slots = Vec::with_capacity(state.slots.len());
        for (i, (steps, shape)) in state.slots.iter().zip(&self.shapes).enumerate() {
            let [n_in, n_out, rank] = *shape;
            let padded = |n: usize| rank * n.next_multiple_of(crate::kernels::TILE);
            let read = |part: &str, what: &str, len: usize| -> Result<Vec<f32>> {
                let name = format!("{i}/{part}/{what}");
                let Some(t) = file.tensors.iter().find(|t| t.name == name) else { return Ok(Vec::new()) };
                if t.dtype != TensorDtype::F32 || t.shape != [len] {
                    return Err(bad(format!("{name} has shape {:?}, expected [{len}] of F32", t.shape)));
                }
                let number = |c: &[u8]| f32::from_le_bytes([c[0], c[1], c[2], c[3]]);
                let v: Vec<f32> = t.data.chunks_exact(4).map(number).collect();
                if v.iter().all(|v| v.is_finite()) {
                    Ok(v)
                } else {
                    Err(bad(format!("{name} is not finite")))
                }
            };
            let slot = |part: &str, steps: u64, len: usize| -> Result<Slot> {
                Ok(Slot { m: read(part, "m", len)?, v: read(part, "v", len)?, steps })
            };
            slots.push(ModuleSlots {
                a: slot("a", steps[0], padded(n_in))?,
                b: slot("b", steps[1], padded(n_out))?,
                magnitude: slot("magnitude", steps[2], n_out)?,
            });
        }
        (self.slots, self.steps) = (slots, state.steps);
        Ok(())
    }
}
