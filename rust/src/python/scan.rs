//! The doctor's look into files: tensors and their numbers, whatever is wrong with them.

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;

use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::adapter_file::{LimitsTuple, PyAdapterFile, limits_of};
use crate::error::{Error, Result};
use crate::format::json::show;
use crate::format::pattern::{Table, whole};
use crate::format::scan::{self, Scan};
use crate::format::{Tensor, atomic, container};

/// norm, largest magnitude, NaN, infinite, zero, fits f16, fits bf16.
type StatsRow = (f64, f64, u64, u64, u64, bool, bool);
/// name, dtype, shape, numbers.
type TensorRow = (String, String, Vec<usize>, Option<StatsRow>);

/// A file's tensors as they lie in it.
#[pyclass(name = "Scan", module = "microlora._core", frozen)]
pub(super) struct PyScan {
    inner: Scan,
}

impl PyScan {
    fn tensor(&self, at: usize) -> Result<&Tensor> {
        self.inner.tensors.get(at).ok_or_else(|| Error::config("tensor", at, "the number of a tensor"))
    }
}

#[pymethods]
impl PyScan {
    /// The content of a file that a reader understood, under PEFT's names without a prefix.
    #[staticmethod]
    fn of(file: &PyAdapterFile) -> Self {
        PyScan { inner: Scan::of(&file.inner.parts) }
    }

    /// Why the container cannot be read, in its reader's words.
    #[getter]
    fn damage(&self) -> Option<String> {
        self.inner.damage.clone()
    }

    /// The header's entries.
    #[getter]
    fn header(&self) -> BTreeMap<String, String> {
        self.inner.metadata.clone()
    }

    /// `(name, dtype, shape, (norm, largest magnitude, NaN, infinite, zero, fits f16, fits bf16))` of each.
    fn rows(&self, py: Python<'_>) -> Vec<TensorRow> {
        let row = |t: &Tensor| {
            let s = scan::stats(t);
            let s = s.map(|s| (s.norm, s.max_abs, s.nan, s.inf, s.zeros, s.fits_f16, s.fits_bf16));
            (t.name.clone(), t.dtype.to_string(), t.shape.clone(), s)
        };
        py.detach(|| self.inner.tensors.iter().map(row).collect())
    }

    /// Bytes of one tensor.
    fn data<'py>(&self, py: Python<'py>, tensor: usize) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &self.tensor(tensor)?.data))
    }

    /// `|B A|_F` without scaling, or None where these are no factors of one layer, or need more than 2^34
    /// multiplications.
    fn delta_norm(&self, py: Python<'_>, a: usize, b: usize, experts: bool) -> PyResult<Option<f64>> {
        let (a, b) = (self.tensor(a)?, self.tensor(b)?);
        Ok(py.detach(|| scan::delta_norm(a, b, experts))?)
    }
}

/// Looks into a safetensors file; a broken one has `damage`.
#[pyfunction]
#[pyo3(signature = (path, limits=None))]
pub(super) fn scan_file(py: Python<'_>, path: PathBuf, limits: Option<LimitsTuple>) -> PyResult<PyScan> {
    let limits = limits_of(limits);
    Ok(PyScan { inner: py.detach(|| scan::scan(&path, &limits))? })
}

/// For each path the number of the first key of a PEFT pattern table that matches it, then the numbers of
/// keys that match none, and those that are refused with the reason.
#[pyfunction]
#[allow(clippy::type_complexity)]
pub(super) fn match_patterns(
    py: Python<'_>,
    keys: Vec<String>,
    paths: Vec<String>,
) -> PyResult<(Vec<Option<usize>>, Vec<usize>, Vec<(usize, String)>)> {
    py.detach(|| {
        let mut table = Table::default();
        let mut refused = Vec::new();
        for (at, key) in keys.iter().enumerate() {
            if let Err(why) = table.push(key, at) {
                refused.push((at, why));
            }
        }
        let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
        table.check_work(&paths).map_err(|e| Error::format("pattern", e))?;
        let found = paths.iter().map(|p| table.find(p).map(|(_, &at)| at)).collect();
        let unmatched: HashSet<&str> = table.unmatched(&paths).into_iter().collect();
        let unmatched = (0..keys.len()).filter(|&at| unmatched.contains(keys[at].as_str())).collect();
        Ok((found, unmatched, refused))
    })
}

/// Whether a regular expression matches each path as a whole; an expression that only Python can run is a
/// `ConfigError`.
#[pyfunction]
pub(super) fn match_whole(py: Python<'_>, pattern: &str, paths: Vec<String>) -> PyResult<Vec<bool>> {
    py.detach(|| {
        let regex = whole(pattern).map_err(|e| Error::config("pattern", show(pattern), e))?;
        Ok(paths.iter().map(|p| regex.is_match(p)).collect())
    })
}

/// Writes tensors (name, dtype, shape, bytes) and header entries to a safetensors file, whole or not at all.
#[pyfunction]
pub(super) fn write_safetensors(
    py: Python<'_>,
    path: PathBuf,
    tensors: Vec<(String, String, Vec<usize>, Vec<u8>)>,
    header: BTreeMap<String, String>,
) -> PyResult<()> {
    let tensors: Vec<Tensor> = tensors
        .into_iter()
        .map(|(name, dtype, shape, data)| {
            Tensor::new(name, super::adapter_file::dtype_of(&dtype)?, shape, data)
        })
        .collect::<Result<_>>()?;
    py.detach(|| {
        let named = tensors.iter().map(|t| (t.name.clone(), t)).collect();
        let layout = container::lay_out(&header, named, &path.display().to_string())?;
        atomic::write(&path, |out| layout.write_to(out))
    })?;
    Ok(())
}
