//! A pattern bank as tensors, and back.

use serde::{Deserialize, Serialize};

use super::PatternBank;
use super::tensors::{Reader, document, tensor};
use crate::error::{Error, Result};
use crate::format::Tensor;

const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    version: u32,
    capacity: usize,
    threshold: f32,
    width: usize,
}

impl PatternBank {
    /// Everything as tensors whose names start with `prefix`.
    pub fn to_tensors(&self, prefix: &str) -> Vec<Tensor> {
        let name = |what: &str| format!("{prefix}{what}");
        let n = self.len();
        let state = Document {
            version: VERSION,
            capacity: self.capacity,
            threshold: self.threshold,
            width: self.width,
        };
        vec![
            tensor(name("centroids"), vec![n, self.width], self.centroids()),
            tensor(name("counts"), vec![n], self.counts.iter().copied()),
            tensor(name("rated"), vec![n], self.rated.iter().copied()),
            tensor(name("quality"), vec![n], self.quality.iter().copied()),
            document(name("state"), &state),
        ]
    }

    /// Reads what [`PatternBank::to_tensors`] gave; other tensors are not looked at.
    ///
    /// # Errors
    /// Tensors that are missing, of another shape or dtype, or that contradict each other.
    pub fn from_tensors(prefix: &str, tensors: &[Tensor]) -> Result<Self> {
        let r = Reader { what: "patterns", prefix, tensors };
        let state: Document = r.document("state")?;
        if state.version != VERSION {
            let reason = format!("version {}, this build reads {VERSION}", state.version);
            return Err(Error::unsupported("patterns", reason));
        }
        let bank = PatternBank::new(state.capacity, state.threshold, state.width);
        let mut bank = bank.map_err(|e| r.wrong("state", e))?;
        bank.counts = r.numbers("counts", &[None])?;
        let n = Some(bank.counts.len());
        let centroids = r.finite("centroids", &[n, Some(state.width)])?;
        bank.rated = r.numbers("rated", &[n])?;
        bank.quality = r.numbers("quality", &[n])?;
        if bank.len() > bank.capacity {
            return Err(r.wrong("counts", format!("{} patterns in {} places", bank.len(), bank.capacity)));
        }
        for i in 0..bank.len() {
            let (count, rated, sum) = (bank.counts[i], bank.rated[i], bank.quality[i]);
            // Means of unit directions and of qualities in [0, 1] stay inside these, rounding allowed for.
            let norm2: f32 = centroids[i * bank.width..][..bank.width].iter().map(|v| v * v).sum();
            if count == 0 || rated > count || !(0.0..=rated as f64).contains(&sum) || !(norm2 <= 1.01) {
                return Err(r.wrong("counts", format!("pattern {i} contradicts itself")));
            }
        }
        bank.put(&centroids);
        Ok(bank)
    }
}
