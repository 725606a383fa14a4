//! Data sets from Python: what can be trained, rows, targets or labels, and the order of their visit.

use numpy::{PyArray1, PyArrayMethods, PyReadonlyArray1};
use pyo3::prelude::*;

use super::array::{Input, input};
use super::chain::PyChain;
use super::error::{ConfigError, DTypeError};
use super::micro_lora::PyMicroLora;
use crate::learn::train::{Data, Modules, Targets, Trainee};

/// A learner or a chain, as the training calls take it.
pub(super) enum Target<'a> {
    Lora(&'a PyMicroLora),
    Chain(&'a PyChain),
}

impl<'a> Target<'a> {
    pub fn of(target: &'a Bound<'_, PyAny>) -> PyResult<Self> {
        if let Ok(lora) = target.cast::<PyMicroLora>() {
            return Ok(Target::Lora(lora.get()));
        }
        if let Ok(chain) = target.cast::<PyChain>() {
            return Ok(Target::Chain(chain.get()));
        }
        let kind = target.get_type();
        Err(DTypeError::new_err(format!("target: got {kind}, expected a MicroLoRA or a LoraChain")))
    }

    /// What the core trains. Without `modules` a learner trains those whose widths fit.
    pub fn trainee(
        &self,
        modules: Option<Vec<String>>,
        widths: (usize, Option<usize>),
    ) -> PyResult<Box<dyn Trainee + 'a>> {
        match self {
            Target::Chain(chain) => match modules {
                None => Ok(Box::new(ChainRef(chain))),
                Some(m) => {
                    let text = format!("modules: got {m:?}, expected none (a chain trains all its layers)");
                    Err(ConfigError::new_err(text))
                }
            },
            Target::Lora(lora) => {
                let inner = lora.inner();
                let found = match modules {
                    Some(names) => names.iter().map(|n| inner.find(n)).collect::<Result<_, _>>()?,
                    None => fitting(inner, widths)?,
                };
                Ok(Box::new(Modules { lora: inner, modules: found }))
            }
        }
    }
}

fn fitting(lora: &crate::MicroLora, (n_in, n_out): (usize, Option<usize>)) -> PyResult<Vec<usize>> {
    let fits = |(i, o): (usize, usize)| i == n_in && n_out.is_none_or(|n| n == o);
    let found: Vec<usize> = (0..lora.names().len()).filter(|&m| fits(lora.shape(m))).collect();
    if found.is_empty() {
        let have: Vec<String> = lora
            .names()
            .iter()
            .enumerate()
            .map(|(m, n)| format!("{n} {} -> {}", lora.shape(m).0, lora.shape(m).1))
            .collect();
        let out = n_out.map_or("?".into(), |n| n.to_string());
        return Err(super::error::ShapeError::new_err(format!(
            "x, y: got rows {n_in} -> {out}, expected the widths of a module: {}",
            have.join(", ")
        )));
    }
    Ok(found)
}

/// A chain behind its Python object.
struct ChainRef<'a>(&'a PyChain);

impl Trainee for ChainRef<'_> {
    fn lora(&self) -> &crate::MicroLora {
        self.0.inner().lora()
    }
    fn check(&self, data: &Data<'_>) -> crate::Result<()> {
        self.0.inner().check(data)
    }
    fn run(
        &self,
        k: &crate::kernels::Kernels,
        batch: Data<'_>,
        learn: bool,
        ws: &mut crate::learn::train::Workspace,
        observe: Option<&mut dyn crate::learn::Regularizer>,
    ) -> Result<(), crate::learn::batch::BadRow> {
        self.0.inner().run(k, batch, learn, ws, observe)
    }
    fn modules(&self) -> Vec<String> {
        self.0.inner().modules()
    }
    fn outputs(
        &self,
        k: &crate::kernels::Kernels,
        x: &[f32],
        ws: &mut crate::learn::train::Workspace,
    ) -> Result<Vec<f32>, crate::learn::batch::BadRow> {
        self.0.inner().outputs(k, x, ws)
    }
}

/// Rows of a data set, held while the core reads them.
pub(super) struct Rows<'a> {
    x: Input<'a>,
    y: Y<'a>,
    base: Option<Input<'a>>,
    weights: Option<Input<'a>>,
    pub rows: usize,
}

enum Y<'a> {
    Values(Input<'a>),
    Labels(Vec<i64>),
}

/// Whether y is one-dimensional and of whole numbers, as an array, a list or a torch tensor.
fn is_labels(y: &Bound<'_, PyAny>) -> PyResult<bool> {
    let array = match y.cast::<numpy::PyUntypedArray>() {
        Ok(array) => array.clone().into_any(),
        // What is no array at all is refused, with its name, by the readers of floats.
        Err(_) => match y.py().import("numpy")?.call_method1("asarray", (y,)) {
            Ok(array) => array,
            Err(_) => return Ok(false),
        },
    };
    let kind: String = array.getattr("dtype")?.getattr("kind")?.extract()?;
    let whole = matches!(kind.as_str(), "i" | "u");
    Ok(array.getattr("ndim")?.extract::<usize>()? == 1 && (whole || kind == "f" && y.hasattr("ndim")?))
}

/// Integers of a one-dimensional array.
pub(super) fn integers(arg: &str, v: &Bound<'_, PyAny>) -> PyResult<Vec<i64>> {
    let refuse = || {
        let kind = v.getattr("dtype").map_or_else(|_| v.get_type().to_string(), |d| d.to_string());
        DTypeError::new_err(format!("{arg}: got {kind}, expected a one-dimensional array of integers"))
    };
    let array = v.py().import("numpy")?.call_method1("asarray", (v,))?;
    let kind: String = array.getattr("dtype")?.getattr("kind")?.extract()?;
    if !matches!(kind.as_str(), "i" | "u") || array.getattr("ndim")?.extract::<usize>()? != 1 {
        return Err(refuse());
    }
    let wide = array.call_method1("astype", ("i8",))?;
    let wide: PyReadonlyArray1<'_, i64> = wide.cast::<PyArray1<i64>>()?.readonly();
    Ok(wide.as_array().to_vec())
}

impl<'a> Rows<'a> {
    /// Reads x `(n, in)`, y `(n, out)` floats or `(n,)` integers, base `(n, out)` and weights `(n,)`.
    pub fn of(
        x: &'a Bound<'_, PyAny>,
        y: &'a Bound<'_, PyAny>,
        base: Option<&'a Bound<'_, PyAny>>,
        weights: Option<&'a Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let x = input("x", x, None, true)?;
        let rows = x.rows.unwrap_or(1);
        let labels = x.rows.is_some() && is_labels(y)?;
        let y = if labels { Y::Labels(integers("y", y)?) } else { Y::Values(input("y", y, None, true)?) };
        let base = base.map(|b| input("base", b, None, true)).transpose()?;
        let weights = weights.map(|w| input("weights", w, None, false)).transpose()?;
        Ok(Rows { x, y, base, weights, rows })
    }

    /// Widths of x and, where it has one, of y.
    pub fn widths(&self) -> (usize, Option<usize>) {
        let n_out = match &self.y {
            Y::Values(y) => Some(y.as_slice().len() / y.rows.unwrap_or(1)),
            Y::Labels(_) => None,
        };
        (self.x.as_slice().len() / self.rows, n_out)
    }

    pub fn data(&self) -> Data<'_> {
        Data {
            x: self.x.as_slice(),
            y: match &self.y {
                Y::Values(y) => Targets::Values(y.as_slice()),
                Y::Labels(y) => Targets::Labels(y),
            },
            base: self.base.as_ref().map(Input::as_slice),
            weights: self.weights.as_ref().map(Input::as_slice),
            rows: self.rows,
            replayed: None,
        }
    }
}
