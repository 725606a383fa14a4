//! Blocks of numbers in the quantised layouts.

use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::array::{input, new_rows};
use crate::error::{Error, Result};
use crate::quant::{BLOCKS, BlockType, check_blocks, check_finite, quantize_rows};

/// `(name, number in ggml, elements, bytes)` of every block type, most exact first.
#[pyfunction]
pub(super) fn block_types() -> Vec<(&'static str, u32, usize, usize)> {
    BLOCKS.iter().map(|r| (r.name, r.ggml, r.elements, r.bytes)).collect()
}

/// Quantises the rows of `x`.
#[pyfunction]
#[pyo3(signature = (x, r#type))]
pub(super) fn quantize_blocks<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyAny>,
    r#type: &str,
) -> PyResult<Bound<'py, PyBytes>> {
    let kind: BlockType = r#type.parse()?;
    let x = input("x", x, None, true)?;
    let numbers = x.as_slice();
    let rows = x.rows.ok_or_else(|| Error::shape("x", format!("({},)", numbers.len()), "two dimensions"))?;
    let cols = numbers.len() / rows;
    let bytes = py.detach(|| quantize_rows(kind, "x", numbers, rows, cols))?;
    Ok(PyBytes::new(py, &bytes))
}

/// The numbers of quantised rows.
#[pyfunction]
#[pyo3(signature = (data, r#type, rows, cols))]
pub(super) fn dequantize_blocks<'py>(
    py: Python<'py>,
    data: &[u8],
    r#type: &str,
    rows: usize,
    cols: usize,
) -> PyResult<Bound<'py, PyAny>> {
    let kind: BlockType = r#type.parse()?;
    check_blocks(kind, "data", data, rows, cols)?;
    let (array, mut out) = new_rows(py, rows, cols)?;
    py.detach(|| -> Result<()> {
        check_finite(kind, "data", data)?;
        kind.dequantize(data, out.as_mut_slice());
        Ok(())
    })?;
    Ok(array)
}
