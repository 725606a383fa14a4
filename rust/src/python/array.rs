//! NumPy arrays in and out: raw checks on the fast path, conversion on the slow one.
//!
//! A float32, C-contiguous, aligned array of native byte order is read where it lies. Everything else that
//! is floating point is copied; integers are refused. The caller must not write to an array during the call.
#![allow(unsafe_code)]

use numpy::npyffi::{self, NPY_TYPES, flags};
use numpy::{
    PyArray1, PyArray2, PyArrayDescrMethods, PyArrayDyn, PyArrayMethods, PyUntypedArray,
    PyUntypedArrayMethods,
};
use pyo3::exceptions::{PyException, PyMemoryError};
use pyo3::prelude::*;
use pyo3::types::PyFloat;

use super::error::{DTypeError, LayoutError, ShapeError};

const READ: i32 = flags::NPY_ARRAY_C_CONTIGUOUS | flags::NPY_ARRAY_ALIGNED;
const WRITE: i32 = READ | flags::NPY_ARRAY_WRITEABLE;

/// A float32 array that can be used in place.
#[derive(Clone, Copy)]
struct Raw {
    data: *mut f32,
    /// Rows, or `None` for a vector.
    rows: Option<usize>,
    cols: usize,
}

/// The array's buffer, if it is float32 of native byte order, of one or two dimensions, with `need` flags.
#[inline(always)]
fn raw(x: &Bound<'_, PyAny>, need: i32) -> Option<Raw> {
    // SAFETY: the GIL is held; PyArray_Check proves the layout that the fields are read with.
    unsafe {
        if npyffi::PyArray_Check(x.py(), x.as_ptr()) == 0 {
            return None;
        }
        let fields = &(*x.as_ptr().cast::<npyffi::PyArrayObject>()).fields;
        let descr = &(*fields.descr).fields;
        let native = matches!(descr.byteorder as u8, b'=' | b'<' | b'|');
        if descr.type_num != NPY_TYPES::NPY_FLOAT as i32 || !native || fields.flags & need != need {
            return None;
        }
        let (rows, cols) = match fields.nd {
            1 => (None, *fields.dimensions as usize),
            2 => (Some(*fields.dimensions as usize), *fields.dimensions.add(1) as usize),
            _ => return None,
        };
        Some(Raw { data: fields.data.cast(), rows, cols })
    }
}

/// An input of one or several rows.
pub(super) struct Input<'a> {
    data: Data<'a>,
    /// Rows, or `None` for a vector.
    pub rows: Option<usize>,
}

enum Data<'a> {
    Borrowed(&'a [f32]),
    Owned(Vec<f32>),
}

impl Input<'_> {
    /// All numbers, row-major.
    #[inline]
    pub fn as_slice(&self) -> &[f32] {
        match &self.data {
            Data::Borrowed(s) => s,
            Data::Owned(v) => v,
        }
    }
}

fn shape_text(shape: &[usize]) -> String {
    match shape {
        [n] => format!("({n},)"),
        _ => format!("({})", shape.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")),
    }
}

#[cold]
fn wrong_shape(arg: &str, shape: &[usize], cols: Option<usize>, rows_allowed: bool) -> PyErr {
    let n = cols.map_or("n".to_string(), |c| c.to_string());
    let want = if rows_allowed { format!("({n},) or (rows, {n})") } else { format!("({n},)") };
    ShapeError::new_err(format!("{arg}: got shape {}, expected {want}", shape_text(shape)))
}

/// Reads `x` as float32 rows of width `cols` (any width when `None`).
#[inline]
pub(super) fn input<'a>(
    arg: &str,
    x: &'a Bound<'_, PyAny>,
    cols: Option<usize>,
    rows_allowed: bool,
) -> PyResult<Input<'a>> {
    let Some(r) = raw(x, READ) else { return slow_input(arg, x, cols, rows_allowed) };
    let n = r.rows.unwrap_or(1) * r.cols;
    if cols.is_some_and(|c| c != r.cols) || n == 0 || (r.rows.is_some() && !rows_allowed) {
        let shape = r.rows.map_or(vec![r.cols], |rows| vec![rows, r.cols]);
        return Err(wrong_shape(arg, &shape, cols, rows_allowed));
    }
    // SAFETY: n aligned, initialised floats that x keeps alive; nobody writes to them while the GIL is held,
    // and callers that release it promise the same (documented).
    let data = Data::Borrowed(unsafe { std::slice::from_raw_parts(r.data, n) });
    Ok(Input { data, rows: r.rows })
}

/// A NumPy array of whatever `x` is; torch tensors are detached first, and torch is never imported.
fn as_array<'py>(arg: &str, x: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyUntypedArray>> {
    let py = x.py();
    let refuse = |e: PyErr| {
        if !e.is_instance_of::<PyException>(x.py()) || e.is_instance_of::<PyMemoryError>(x.py()) {
            return e;
        }
        let kind = x.get_type();
        DTypeError::new_err(format!(
            "{arg}: got {kind}, expected a float32 array or what NumPy can turn into one: {e}"
        ))
    };
    let asarray = py.import("numpy")?.getattr("asarray")?;
    let array = if x.hasattr("__torch_function__")? {
        // bfloat16 tensors have no NumPy dtype, so they are widened by torch itself.
        let x = x.call_method0("detach").map_err(refuse)?;
        asarray.call1((&x,)).or_else(|_| asarray.call1((x.call_method0("float")?,)))
    } else {
        asarray.call1((x,))
    };
    Ok(array.map_err(refuse)?.cast_into::<PyUntypedArray>()?)
}

#[cold]
fn slow_input<'a>(
    arg: &str,
    x: &Bound<'_, PyAny>,
    cols: Option<usize>,
    rows_allowed: bool,
) -> PyResult<Input<'a>> {
    let array = as_array(arg, x)?;
    let dtype = array.dtype();
    let kind: String = dtype.getattr("kind")?.extract()?;
    if kind != "f" {
        return Err(DTypeError::new_err(format!(
            "{arg}: got dtype {dtype}, expected float32 (floats are converted, integers are not)"
        )));
    }
    if !dtype.getattr("isnative")?.extract::<bool>()? {
        return Err(LayoutError::new_err(format!(
            "{arg}: got a byte-swapped array ({dtype}), expected native byte order: use x.astype(\"f4\")"
        )));
    }
    let shape = array.shape().to_vec();
    let fits = match shape[..] {
        [n] => cols.is_none_or(|c| c == n),
        [_, n] => rows_allowed && cols.is_none_or(|c| c == n),
        _ => false,
    };
    if !fits || shape.contains(&0) {
        return Err(wrong_shape(arg, &shape, cols, rows_allowed));
    }
    // Narrowed here: NumPy would warn where a float64 passes float32's range, we say NonFiniteError.
    let wide = array.call_method1("astype", ("f8",))?;
    let wide = wide.cast::<PyArrayDyn<f64>>()?;
    let data = wide.readonly().as_array().iter().map(|&v| v as f32).collect();
    Ok(Input { data: Data::Owned(data), rows: (shape.len() == 2).then(|| shape[0]) })
}

/// An output buffer of the caller.
pub(super) struct Output<'a> {
    data: *mut f32,
    len: usize,
    _keep: std::marker::PhantomData<&'a ()>,
}

// SAFETY: the pointer is used by one thread at a time, and the array it belongs to is kept by the caller.
unsafe impl Send for Output<'_> {}

impl Output<'_> {
    /// The buffer.
    #[inline]
    pub fn as_mut_slice(&mut self) -> &mut [f32] {
        // SAFETY: len writable, aligned floats; `output` proved that no input overlaps them.
        unsafe { std::slice::from_raw_parts_mut(self.data, self.len) }
    }
}

/// Takes `out` as float32 of exactly this shape: C-contiguous, writable, not overlapping `x`.
#[inline]
pub(super) fn output<'a>(
    out: &'a Bound<'_, PyAny>,
    x: &Input<'_>,
    rows: Option<usize>,
    cols: usize,
) -> PyResult<Output<'a>> {
    let Some(r) = raw(out, WRITE) else { return Err(bad_output(out)) };
    if r.rows != rows || r.cols != cols {
        let got = r.rows.map_or(vec![r.cols], |n| vec![n, r.cols]);
        let want = rows.map_or(vec![cols], |n| vec![n, cols]);
        let (got, want) = (shape_text(&got), shape_text(&want));
        return Err(ShapeError::new_err(format!("out: got shape {got}, expected {want}")));
    }
    let len = rows.unwrap_or(1) * cols;
    if let Data::Borrowed(s) = &x.data {
        let (a, b) = (s.as_ptr() as usize, r.data as usize);
        if a < b + len * 4 && b < a + s.len() * 4 {
            return Err(LayoutError::new_err("out: overlaps x, expected memory of its own"));
        }
    }
    Ok(Output { data: r.data, len, _keep: std::marker::PhantomData })
}

/// Takes a base weight `(out_features, in_features)` to change in place.
pub(super) fn weight<'a>(w: &'a Bound<'_, PyAny>, rows: usize, cols: usize) -> PyResult<Output<'a>> {
    let none = Input { data: Data::Owned(Vec::new()), rows: None };
    output(w, &none, Some(rows), cols).map_err(|e| rename(w.py(), e, "out:", "w:"))
}

/// The same error with its leading argument name replaced.
#[cold]
fn rename(py: Python<'_>, e: PyErr, from: &str, to: &str) -> PyErr {
    let text = e.value(py).to_string();
    match text.strip_prefix(from) {
        Some(rest) => PyErr::from_type(e.get_type(py), format!("{to}{rest}")),
        None => e,
    }
}

#[cold]
fn bad_output(out: &Bound<'_, PyAny>) -> PyErr {
    let Ok(array) = out.cast::<PyUntypedArray>() else {
        return DTypeError::new_err(format!("out: got {}, expected a float32 NumPy array", out.get_type()));
    };
    let dtype = array.dtype();
    if !dtype.is_equiv_to(&numpy::dtype::<f32>(out.py())) {
        return DTypeError::new_err(format!("out: got dtype {dtype}, expected float32 of native byte order"));
    }
    if !matches!(array.ndim(), 1 | 2) {
        return ShapeError::new_err(format!(
            "out: got shape {}, expected one or two dimensions",
            shape_text(array.shape())
        ));
    }
    // SAFETY: a NumPy array's flags, read under the GIL.
    let have = unsafe { (*array.as_array_ptr()).fields.flags };
    let what = if have & flags::NPY_ARRAY_WRITEABLE == 0 {
        "is read-only, expected a writable array"
    } else if have & flags::NPY_ARRAY_C_CONTIGUOUS == 0 {
        "is not C-contiguous, expected a C-contiguous array"
    } else {
        "is not aligned, expected an aligned array"
    };
    LayoutError::new_err(format!("out: {what}"))
}

/// A new vector filled by `f`; nothing is returned when `f` fails.
#[inline]
pub(super) fn new_vector<'py>(
    py: Python<'py>,
    n: usize,
    f: impl FnOnce(&mut [f32]) -> crate::Result<()>,
) -> PyResult<Bound<'py, PyAny>> {
    // SAFETY: the array is new, so nobody else sees it; f fills it or it is dropped unseen.
    unsafe {
        let array = PyArray1::<f32>::new(py, n, false);
        f(std::slice::from_raw_parts_mut(array.data(), n))?;
        Ok(array.into_any())
    }
}

/// A new `(rows, cols)` array of zeros, with its buffer to fill before anybody else sees it. The caller keeps
/// the array while it uses the buffer.
pub(super) fn new_rows<'py>(
    py: Python<'py>,
    rows: usize,
    cols: usize,
) -> PyResult<(Bound<'py, PyAny>, Output<'static>)> {
    let bytes = rows.checked_mul(cols).and_then(|n| n.checked_mul(4));
    crate::Error::check_memory("result", bytes)?;
    let array = PyArray2::<f32>::zeros(py, [rows, cols], false);
    let out = Output { data: array.data(), len: rows * cols, _keep: std::marker::PhantomData };
    Ok((array.into_any(), out))
}

/// A read-only `(rows, cols)` float32 array that owns its numbers.
pub(super) fn read_only<'py>(
    py: Python<'py>,
    data: Vec<f32>,
    shape: &[usize],
) -> PyResult<Bound<'py, PyAny>> {
    let array = PyArray1::from_vec(py, data).reshape(shape.to_vec())?.into_any();
    array.call_method1("setflags", (false,))?;
    Ok(array)
}

/// Whether `x` is a bare Python or NumPy number.
pub(super) fn is_number(x: &Bound<'_, PyAny>) -> bool {
    x.is_instance_of::<PyFloat>() || x.extract::<f64>().is_ok()
}
