//! A learner frozen in time: an adapter plus what its rules remember, and its bytes.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::adapter::Adapter;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::factor::Factor;
use crate::format::{self, Tensor, TensorDtype};
use crate::layer::Layer;
use crate::learn::Learner;
use crate::learn::accumulate::Gradients;
use crate::learn::learner::Baseline;
use crate::learn::rls::Rls;
use crate::micro_lora::Counters;
use crate::rng::RngState;

/// What `restore` needs to go on bit for bit.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// The weights.
    pub adapter: Adapter,
    pub(crate) learners: Vec<Learner>,
    /// Version of the learner when it was taken.
    pub version: u64,
    pub(crate) rng: RngState,
    pub(crate) counters: Counters,
}

/// Names of the tensors that hold a learner's state.
pub(crate) const LEARNER_PREFIX: &str = "learner/";
const STATE: &str = "learner/state";

#[derive(Serialize, Deserialize)]
struct StateJson {
    version: u64,
    rng: RngState,
    counters: Counters,
    modules: Vec<ModuleJson>,
}

#[derive(Serialize, Deserialize)]
struct ModuleJson {
    ridge: Option<f64>,
    basis_unit: Option<f64>,
    baseline_count: u64,
    baseline_value: f64,
    pending: u64,
    pending_bounds: [f64; 2],
}

fn f64_bytes(v: &[f64]) -> Vec<u8> {
    v.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn factor_tensor(name: String, f: &Factor) -> Tensor {
    Tensor { name, dtype: TensorDtype::F32, shape: vec![f.rank(), f.len()], data: f.to_bits(false).into() }
}

impl Snapshot {
    /// Our single-file bytes, with the learner's state as extra tensors.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut parts = self.adapter.to_parts();
        let mut modules = Vec::new();
        for (i, l) in self.learners.iter().enumerate() {
            let name = |what: &str| format!("{LEARNER_PREFIX}{i}/{what}");
            if l.has_master() {
                parts.extra.push(factor_tensor(name("master_a"), &l.master().a));
                parts.extra.push(factor_tensor(name("master_b"), &l.master().b));
            }
            if let Some(m) = &l.magnitude {
                let data = m.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>().into();
                let shape = vec![m.len()];
                parts.extra.push(Tensor { name: name("magnitude"), dtype: TensorDtype::F32, shape, data });
            }
            if let Some(rls) = &l.rls {
                let rank = l.layer().rank();
                let data = f64_bytes(&rls.p).into();
                parts.extra.push(Tensor {
                    name: name("p"),
                    dtype: TensorDtype::F64,
                    shape: vec![rank, rank],
                    data,
                });
            }
            let pending = l.gradients.as_ref().filter(|g| g.count > 0);
            if let Some(g) = pending {
                parts.extra.push(factor_tensor(name("grad_a"), &g.a));
                parts.extra.push(factor_tensor(name("grad_b"), &g.b));
            }
            modules.push(ModuleJson {
                ridge: l.rls.as_ref().map(|r| r.ridge),
                basis_unit: l.basis_unit,
                baseline_count: l.baseline.count,
                baseline_value: l.baseline.value,
                pending: pending.map_or(0, |g| g.count),
                pending_bounds: pending.map_or([0.0; 2], |g| g.bounds),
            });
        }
        let state = StateJson { version: self.version, rng: self.rng, counters: self.counters, modules };
        let json = serde_json::to_vec(&state).map_err(|e| Error::format("snapshot", e.to_string()))?;
        parts.extra.push(Tensor {
            name: STATE.into(),
            dtype: TensorDtype::U8,
            shape: vec![json.len()],
            data: json.into(),
        });
        format::to_bytes(&parts)
    }

    /// Reads what [`Snapshot::to_bytes`] wrote.
    ///
    /// # Errors
    /// Bytes of anything else, or state that does not fit the weights.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let mut parts = format::from_bytes(bytes, true)?.parts;
        let bad = |reason: &str| Error::format("snapshot", reason.to_string());
        let (state, extra): (Vec<_>, Vec<_>) =
            std::mem::take(&mut parts.extra).into_iter().partition(|t| t.name.starts_with(LEARNER_PREFIX));
        parts.extra = extra;
        let adapter = Adapter::from_parts(&parts)?;
        let find = |name: String| state.iter().find(|t| t.name == name);
        let json = find(STATE.into()).ok_or_else(|| bad("no learner state; load it as an adapter"))?;
        let json: StateJson = serde_json::from_slice(&json.data).map_err(|e| bad(&e.to_string()))?;
        if json.modules.len() != adapter.modules.len() {
            return Err(bad("learner state and weights have different modules"));
        }
        let mut learners = Vec::new();
        for (i, (m, (_, layer))) in json.modules.iter().zip(&adapter.modules).enumerate() {
            let factor = |what: &str, like: &Factor| -> Result<Option<Factor>> {
                let Some(t) = find(format!("{LEARNER_PREFIX}{i}/{what}")) else { return Ok(None) };
                if t.dtype != TensorDtype::F32 || t.shape != [like.rank(), like.len()] {
                    return Err(bad(&format!("{} does not fit the weights", t.name)));
                }
                let f = Factor::from_bits(&t.data, like.rank(), like.len(), Dtype::F32, false)?;
                if f.is_finite() { Ok(Some(f)) } else { Err(bad(&format!("{} is not finite", t.name))) }
            };
            let master = match (factor("master_a", &layer.a)?, factor("master_b", &layer.b)?) {
                (Some(a), Some(b)) => Some(Arc::new(Layer::new(a, b, layer.alpha, layer.rslora)?)),
                _ => None,
            };
            let mut l = Learner::with_master(Arc::clone(layer), master);
            if let Some(t) = find(format!("{LEARNER_PREFIX}{i}/p")) {
                let rank = layer.rank();
                if t.dtype != TensorDtype::F64 || t.shape != [rank, rank] {
                    return Err(bad("p does not fit the rank"));
                }
                let mut p = Vec::with_capacity(rank * rank);
                for chunk in t.data.chunks_exact(8) {
                    p.push(f64::from_le_bytes(chunk.try_into().map_err(|_| bad("p is cut off"))?));
                }
                let ridge = m.ridge.ok_or_else(|| bad("p without its ridge"))?;
                if p.iter().any(|v| !v.is_finite()) || !(ridge.is_finite() && ridge > 0.0) {
                    return Err(bad("p or its ridge is not a finite number above 0"));
                }
                l.rls = Some(Rls { p, ridge });
            }
            if let Some(t) = find(format!("{LEARNER_PREFIX}{i}/magnitude")) {
                if t.dtype != TensorDtype::F32 || t.shape != [layer.out_features()] {
                    return Err(bad("magnitude does not fit the outputs"));
                }
                let read = |c: &[u8]| f32::from_le_bytes([c[0], c[1], c[2], c[3]]);
                let values: Vec<f32> = t.data.chunks_exact(4).map(read).collect();
                if values.iter().any(|v| !v.is_finite()) {
                    return Err(bad("magnitude is not finite"));
                }
                l.magnitude = Some(Arc::new(values));
            }
            if m.pending > 0 {
                let (Some(a), Some(b)) = (factor("grad_a", &layer.a)?, factor("grad_b", &layer.b)?) else {
                    return Err(bad("pending gradients are missing"));
                };
                l.gradients = Some(Box::new(Gradients {
                    a,
                    b,
                    magnitude: Vec::new(),
                    count: m.pending,
                    bounds: m.pending_bounds,
                }));
            }
            let numbers =
                [m.baseline_value, m.basis_unit.unwrap_or(1.0), m.pending_bounds[0], m.pending_bounds[1]];
            if numbers.iter().any(|v| !v.is_finite()) {
                return Err(bad("learner state is not finite"));
            }
            l.basis_unit = m.basis_unit;
            l.baseline = Baseline { count: m.baseline_count, value: m.baseline_value };
            learners.push(l);
        }
        Ok(Snapshot { adapter, learners, version: json.version, rng: json.rng, counters: json.counters })
    }
}
