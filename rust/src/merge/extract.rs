//! An adapter out of two sets of weights: the largest part of `W_tuned - W_base`, streamed.

use std::sync::Arc;
use std::time::Instant;

use half::{bf16, f16};
use serde::Serialize;

use super::factor::layer_of_shape;
use super::report::{ModuleReport, Report};
use crate::adapter::Adapter;
use crate::algebra::{Keep, SketchOptions, Tiles, decompose};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::format::TensorDtype;
use crate::format::shards::Model;
use crate::kernels::Kernels;

/// How to extract.
#[derive(Clone, Copy, Debug)]
pub struct ExtractOptions {
    /// How much to keep of each module.
    pub keep: Keep,
    /// Highest rank that energy or error may ask for.
    pub max_rank: usize,
    /// Stored dtype.
    pub dtype: Dtype,
    /// Of the sketch.
    pub seed: u64,
}

/// What was done, and what an adapter cannot carry.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ExtractReport {
    /// Module by module.
    #[serde(flatten)]
    pub report: Report,
    /// Weights without a change.
    pub unchanged: Vec<String>,
    /// Tensors that changed and are no matrices, or were not asked for: the adapter lacks them.
    pub left_out: Vec<String>,
}

/// A pair of matrices in memory, row-major.
#[derive(Clone, Debug)]
pub struct Pair<'a> {
    /// Module name.
    pub name: String,
    /// `W_tuned`.
    pub tuned: &'a [f32],
    /// `W_base`.
    pub base: &'a [f32],
    /// Columns as they lie.
    pub cols: usize,
    /// Whether they lie as (in, out) instead of (out, in).
    pub transposed: bool,
}

struct Difference<'a>(&'a Pair<'a>);

impl Tiles for Difference<'_> {
    fn rows(&self) -> usize {
        self.0.tuned.len() / self.0.cols
    }
    fn cols(&self) -> usize {
        self.0.cols
    }
    fn tile(&mut self, first: usize, out: &mut [f32]) -> Result<()> {
        let from = first * self.0.cols;
        let (t, b) = (&self.0.tuned[from..from + out.len()], &self.0.base[from..from + out.len()]);
        for ((o, t), b) in out.iter_mut().zip(t).zip(b) {
            *o = t - b;
        }
        Ok(())
    }
}

/// Rows of a tensor of a file, widened.
struct Rows<'a> {
    model: &'a Model,
    at: (usize, usize),
    dtype: Dtype,
    bytes: Vec<u8>,
    wide: Vec<f32>,
}

impl<'a> Rows<'a> {
    fn new(model: &'a Model, at: (usize, usize), arg: &str) -> Result<Self> {
        let entry = model.entry(at);
        let dtype = match entry.dtype {
            TensorDtype::F32 => Dtype::F32,
            TensorDtype::F16 => Dtype::F16,
            TensorDtype::BF16 => Dtype::Bf16,
            other => {
                let arg = format!("{arg}, tensor {}", entry.name);
                return Err(Error::Dtype { arg, got: other.to_string(), want: "F32, F16 or BF16".into() });
            }
        };
        Ok(Rows { model, at, dtype, bytes: Vec::new(), wide: Vec::new() })
    }

    /// `n` numbers from number `from` on.
    fn read(&mut self, from: usize, n: usize) -> Result<&[f32]> {
        let size = self.dtype.size();
        self.bytes.resize(n * size, 0);
        self.wide.resize(n, 0.0);
        let entry = self.model.entry(self.at);
        self.model.shards[self.at.0].read(entry.span.start + from * size, &mut self.bytes)?;
        match self.dtype {
            Dtype::F32 => {
                for (w, b) in self.wide.iter_mut().zip(self.bytes.chunks_exact(4)) {
                    *w = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                }
            }
            Dtype::F16 => {
                for (w, b) in self.wide.iter_mut().zip(self.bytes.chunks_exact(2)) {
                    *w = f16::from_le_bytes([b[0], b[1]]).to_f32();
                }
            }
            Dtype::Bf16 => {
                for (w, b) in self.wide.iter_mut().zip(self.bytes.chunks_exact(2)) {
                    *w = bf16::from_le_bytes([b[0], b[1]]).to_f32();
                }
            }
        }
        Ok(&self.wide)
    }
}

struct FileDifference<'a> {
    tuned: Rows<'a>,
    base: Rows<'a>,
    shape: [usize; 2],
}

impl Tiles for FileDifference<'_> {
    fn rows(&self) -> usize {
        self.shape[0]
    }
    fn cols(&self) -> usize {
        self.shape[1]
    }
    fn tile(&mut self, first: usize, out: &mut [f32]) -> Result<()> {
        out.copy_from_slice(self.tuned.read(first * self.shape[1], out.len())?);
        let base = self.base.read(first * self.shape[1], out.len())?;
        for (o, b) in out.iter_mut().zip(base) {
            *o -= b;
        }
        Ok(())
    }
}

/// Collects modules as they are done.
struct Work<'a> {
    k: &'a Kernels,
    options: ExtractOptions,
    modules: Vec<(String, Arc<crate::layer::Layer>)>,
    out: ExtractReport,
}

impl Work<'_> {
    fn add(
        &mut self,
        name: &str,
        m: &mut dyn Tiles,
        transposed: bool,
        tick: &mut super::Tick<'_>,
    ) -> Result<()> {
        let begin = Instant::now();
        let o = self.options;
        let (rows, cols) = (m.rows(), m.cols());
        let most = rows.min(cols);
        let (keep, width) = match o.keep {
            Keep::Rank(r) => (Keep::Rank(r.min(most)), r.min(most)),
            other => (other, o.max_rank.min(most).min(64)),
        };
        let mut sketch = SketchOptions { seed: o.seed, ..SketchOptions::for_rank(width) };
        if !matches!(keep, Keep::Rank(_)) {
            // Rows enough for the highest rank that may come out.
            sketch.max_passes = sketch.max_passes.max(o.max_rank.min(most).div_ceil(sketch.width) + 2);
        }
        let mut made = decompose(self.k, m, keep, &sketch, tick).map_err(|e| match e {
            Error::NonFinite { .. } => {
                Error::NonFinite { arg: "tuned - base".into(), detail: format!(" in module {name}") }
            }
            other => other,
        })?;
        if made.norm2 == 0.0 {
            self.out.unchanged.push(name.to_owned());
            return Ok(());
        }
        let mut notes = Vec::new();
        if made.rank > o.max_rank {
            let kept: f64 = made.values[..o.max_rank].iter().map(|v| v * v).sum();
            made.a.truncate(o.max_rank * cols);
            made.b.truncate(o.max_rank * rows);
            (made.rank, made.kept2) = (o.max_rank, kept);
            notes.push(format!("cut off at max_rank {}", o.max_rank));
        }
        let lost = (made.norm2 - made.kept2).max(0.0);
        let mut figures = ModuleReport {
            name: name.to_owned(),
            method: "extract".into(),
            norm: made.norm2.sqrt(),
            energy_kept: 1.0 - lost / made.norm2,
            error: (lost / made.norm2).sqrt(),
            rank_out: made.rank,
            bytes: 4 * (made.a.len() + made.b.len()) * sketch.max_passes,
            notes,
            ..ModuleReport::default()
        };
        let rank = made.rank;
        let shape = if transposed {
            std::mem::swap(&mut made.a, &mut made.b);
            (rows, cols)
        } else {
            (cols, rows)
        };
        let layer = layer_of_shape(made, shape, rank, o.dtype)?;
        figures.seconds = begin.elapsed().as_secs_f64();
        self.out.report.peak_bytes = self.out.report.peak_bytes.max(figures.bytes);
        self.out.report.modules.push(figures);
        self.modules.push((name.to_owned(), Arc::new(layer)));
        Ok(())
    }

    fn done(mut self, start: Instant) -> Result<(Adapter, ExtractReport)> {
        if self.modules.is_empty() {
            return Err(Error::config(
                "tuned",
                "the same weights as base",
                "at least one module that differs",
            ));
        }
        self.out.report.semantics = "exact".into();
        self.out.report.seconds = start.elapsed().as_secs_f64();
        Ok((Adapter { modules: self.modules, ..Adapter::default() }, self.out))
    }
}

fn work(k: &Kernels, options: ExtractOptions) -> Work<'_> {
    Work { k, options, modules: Vec::new(), out: ExtractReport::default() }
}

/// From matrices in memory.
///
/// # Errors
/// Shapes that differ, NaN (module named), nothing that differs.
pub fn extract_arrays(
    k: &Kernels,
    pairs: &[Pair<'_>],
    options: ExtractOptions,
    tick: &mut super::Tick<'_>,
) -> Result<(Adapter, ExtractReport)> {
    let (start, mut work) = (Instant::now(), work(k, options));
    for p in pairs {
        if p.cols == 0 || p.tuned.len() != p.base.len() || p.tuned.is_empty() {
            let (got, want) = (format!("{} numbers", p.base.len()), format!("{} as in tuned", p.tuned.len()));
            return Err(Error::shape(format!("base, module {}", p.name), got, want));
        }
    }
    for (done, p) in pairs.iter().enumerate() {
        tick(done, pairs.len())?;
        work.add(&p.name, &mut Difference(p), p.transposed, &mut |_, _| tick(done, pairs.len()))?;
    }
    tick(pairs.len(), pairs.len())?;
    work.done(start)
}

/// From two models on disk; `choose(module)` says whether a `<module>.weight` is wanted and lies as (in, out).
///
/// # Errors
/// Files that cannot be read, shapes that differ (module named), NaN, nothing that differs.
pub fn extract_files(
    k: &Kernels,
    [tuned, base]: [&std::path::Path; 2],
    options: ExtractOptions,
    choose: &mut dyn FnMut(&str) -> Result<Option<bool>>,
    tick: &mut super::Tick<'_>,
) -> Result<(Adapter, ExtractReport)> {
    let (start, mut work) = (Instant::now(), work(k, options));
    let (tuned, base) = (Model::open(tuned, "tuned")?, Model::open(base, "base")?);
    let mut names: Vec<&str> = tuned.names().collect();
    names.sort_unstable();
    let mut chosen = Vec::new();
    for name in names {
        let at = tuned.find(name).expect("a name of its own");
        let entry = tuned.entry(at);
        let module = name.strip_suffix(".weight").filter(|_| entry.shape.len() == 2);
        let wanted = module.map(&mut *choose).transpose()?.flatten();
        let other = base.find(name);
        match (module, wanted, other) {
            (Some(module), Some(transposed), Some(other)) => {
                let (got, want) = (&base.entry(other).shape, &entry.shape);
                if got != want {
                    let arg = format!("base, module {module}");
                    return Err(Error::shape(arg, format!("{got:?}"), format!("{want:?} as in tuned")));
                }
                chosen.push((module, at, other, transposed));
            }
            (_, _, Some(other)) => {
                if !same(&tuned, at, &base, other)? {
                    work.out.left_out.push(name.to_owned());
                }
            }
            (_, _, None) => work.out.left_out.push(name.to_owned()),
        }
    }
    let count = chosen.len();
    for (done, (module, at, other, transposed)) in chosen.into_iter().enumerate() {
        tick(done, count)?;
        let shape = [tuned.entry(at).shape[0], tuned.entry(at).shape[1]];
        let (tuned, base) = (Rows::new(&tuned, at, "tuned")?, Rows::new(&base, other, "base")?);
        let mut m = FileDifference { tuned, base, shape };
        work.add(module, &mut m, transposed, &mut |_, _| tick(done, count))?;
    }
    tick(count, count)?;
    work.done(start)
}

/// Whether two tensors hold the same bytes.
fn same(x: &Model, i: (usize, usize), y: &Model, j: (usize, usize)) -> Result<bool> {
    const PIECE: usize = 1 << 20;
    let (a, b) = (x.entry(i), y.entry(j));
    if a.dtype != b.dtype || a.shape != b.shape {
        return Ok(false);
    }
    let len = a.span.len();
    let (mut p, mut q) = (vec![0; len.min(PIECE)], vec![0; len.min(PIECE)]);
    let mut at = 0;
    while at < len {
        let n = PIECE.min(len - at);
        x.shards[i.0].read(a.span.start + at, &mut p[..n])?;
        y.shards[j.0].read(b.span.start + at, &mut q[..n])?;
        if p[..n] != q[..n] {
            return Ok(false);
        }
        at += n;
    }
    Ok(true)
}
