//! `Chain`: frozen layers with adapters, from arrays.

use std::sync::{Arc, Mutex};

use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::array::{input, new_rows, read_only};
use super::dataset::Rows;
use super::error::DTypeError;
use super::micro_lora::PyMicroLora;
use crate::chain::{Chain, Frozen, Pass};
use crate::learn::train::{Trainee, Workspace};
use crate::snapshot::Snapshot;

/// Weight (out, in) and bias (out,) of one layer.
type LayerTuple<'py> = (Bound<'py, PyAny>, Option<Bound<'py, PyAny>>);
/// A weight and a bias as arrays.
type ArrayPair<'py> = (Bound<'py, PyAny>, Option<Bound<'py, PyAny>>);
/// Gradients of A, B and the magnitudes.
type Gradient<'py> = (Bound<'py, PyAny>, Bound<'py, PyAny>, Option<Bound<'py, PyAny>>);

/// The compiled part of `microlora.LoraChain`.
#[pyclass(name = "Chain", module = "microlora._core", frozen, subclass)]
pub(super) struct PyChain {
    inner: Chain,
    pass: Mutex<Pass>,
}

impl PyChain {
    pub fn inner(&self) -> &Chain {
        &self.inner
    }

    fn with_pass<R>(&self, f: impl FnOnce(&mut Pass) -> R) -> R {
        match self.pass.try_lock() {
            Ok(mut pass) => f(&mut pass),
            Err(_) => f(&mut Pass::default()),
        }
    }
}

#[pymethods]
impl PyChain {
    #[new]
    #[pyo3(signature = (lora, layers, *, activation, head, use_dora, gradient_checkpointing))]
    fn new(
        lora: &Bound<'_, PyMicroLora>,
        layers: Vec<LayerTuple<'_>>,
        activation: &str,
        head: &str,
        use_dora: Vec<bool>,
        gradient_checkpointing: bool,
    ) -> PyResult<Self> {
        let mut frozen = Vec::with_capacity(layers.len());
        for (i, (w, b)) in layers.iter().enumerate() {
            let arg = format!("layers[{i}]");
            let w = input(&arg, w, None, true)?;
            let Some(n_out) = w.rows else {
                let n = w.as_slice().len();
                return Err(crate::Error::shape(arg, format!("({n},)"), "(out, in)").into());
            };
            let bias = match b {
                Some(b) => Some(input(&format!("{arg} bias"), b, Some(n_out), false)?.as_slice().to_vec()),
                None => None,
            };
            let n_in = w.as_slice().len() / n_out;
            frozen.push(Frozen::new(&arg, w.as_slice(), n_out, n_in, bias)?);
        }
        let lora = Arc::clone(lora.get().inner());
        let inner =
            Chain::new(lora, frozen, activation.parse()?, head.parse()?, &use_dora, gradient_checkpointing)?;
        Ok(PyChain { inner, pass: Mutex::default() })
    }

    /// Width of a row of x.
    #[getter]
    fn in_features(&self) -> usize {
        self.inner.in_features()
    }

    /// Width of an output.
    #[getter]
    fn out_features(&self) -> usize {
        self.inner.out_features()
    }

    /// Resident bytes of the frozen layers.
    #[getter]
    fn frozen_bytes(&self) -> usize {
        self.inner.frozen_bytes()
    }

    /// Outputs of the network with its adapters.
    fn forward<'py>(&self, py: Python<'py>, x: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let x = input("x", x, Some(self.inner.in_features()), true)?;
        let data = x.as_slice();
        let z = py.detach(|| self.with_pass(|pass| self.inner.forward(data, pass)));
        let z = z.map_err(crate::Error::from)?;
        match x.rows {
            None => super::array::new_vector(py, z.len(), |y| {
                y.copy_from_slice(&z);
                Ok(())
            }),
            Some(rows) => {
                let (array, mut out) = new_rows(py, rows, self.inner.out_features())?;
                out.as_mut_slice().copy_from_slice(&z);
                Ok(array)
            }
        }
    }

    /// Mean gradient over the rows: of A (rank, in), B (out, rank) and, for DoRA, magnitudes (out,).
    #[pyo3(signature = (x, y, weights=None))]
    fn gradients<'py>(
        &self,
        py: Python<'py>,
        x: &Bound<'py, PyAny>,
        y: &Bound<'py, PyAny>,
        weights: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<(f32, usize, Vec<Gradient<'py>>)> {
        let rows = Rows::of(x, y, None, weights)?;
        let data = rows.data();
        let (k, mut ws) = (self.inner.lora().kernels(), Workspace::default());
        self.inner.check(&data)?;
        ws.prepare(self.inner.lora());
        py.detach(|| self.inner.run(k, data, true, &mut ws, None)).map_err(crate::Error::from)?;
        let mut out = Vec::new();
        for s in ws.means() {
            let a = read_only(py, s.a.to_f32(false), &[s.a.rank(), s.a.len()])?;
            let b = read_only(py, s.b.to_f32(true), &[s.b.len(), s.b.rank()])?;
            let m = match s.magnitude.len() {
                0 => None,
                n => Some(read_only(py, s.magnitude.clone(), &[n])?),
            };
            out.push((a, b, m));
        }
        Ok((ws.mean_loss(), ws.peak_activation_bytes(), out))
    }

    /// The layers with their adapters fused in.
    fn fuse<'py>(&self, py: Python<'py>) -> PyResult<Vec<ArrayPair<'py>>> {
        let fused = py.detach(|| self.inner.fuse());
        let arrays = fused.into_iter().zip(self.inner.frozen()).map(|((w, b), f)| {
            let w = read_only(py, w, &[f.out_features(), f.in_features()])?;
            Ok((w, b.map(|b| read_only(py, b, &[f.out_features()])).transpose()?))
        });
        arrays.collect()
    }

    /// Copies of the frozen W and b of each layer.
    fn frozen<'py>(&self, py: Python<'py>) -> PyResult<Vec<ArrayPair<'py>>> {
        let arrays = self.inner.frozen().iter().map(|f| {
            let w = read_only(py, f.w.to_f32(false), &[f.out_features(), f.in_features()])?;
            let b = f.bias.as_ref().map(|b| read_only(py, b.clone(), &[b.len()])).transpose()?;
            Ok((w, b))
        });
        arrays.collect()
    }

    /// Magnitudes of the layers that are DoRA, in order; empty for plain LoRA.
    fn magnitudes<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyAny>>> {
        self.inner.magnitudes().iter().map(|m| read_only(py, m.to_vec(), &[m.len()])).collect()
    }

    /// Replaces DoRA's magnitudes.
    fn set_magnitudes(&self, values: Vec<Bound<'_, PyAny>>) -> PyResult<()> {
        let mut magnitudes = Vec::with_capacity(values.len());
        for (i, v) in values.iter().enumerate() {
            magnitudes.push(input(&format!("magnitudes[{i}]"), v, None, false)?.as_slice().to_vec());
        }
        Ok(self.inner.set_magnitudes(magnitudes)?)
    }

    /// The state of what learns, as bytes.
    fn export_state<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &self.inner.lora().snapshot().to_bytes()?))
    }

    /// Takes what ``export_state`` gave.
    fn import_state(&self, data: &Bound<'_, PyAny>) -> PyResult<()> {
        let bytes = data
            .cast::<PyBytes>()
            .map_err(|_| DTypeError::new_err(format!("data: got {}, expected bytes", data.get_type())))?;
        Ok(self.inner.restore(&Snapshot::from_bytes(bytes.as_bytes())?)?)
    }
}
