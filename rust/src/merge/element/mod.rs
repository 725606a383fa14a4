//! Methods that act entry by entry on the changes themselves: streamed, never as a whole in memory.
//!
//! A method is one file and one row of [`METHODS`](super::METHODS): it looks at the parents' changes as often as
//! it needs (thresholds, masks, weights), then turns a block of rows of every parent into one of the result, which
//! the sketch decomposes. Parents are taken in the order of their names, so a permutation changes nothing.
//!
//! Bytes beyond inputs and result, for m parents of ranks r_i with q rows (out) and n columns (in):
//! `4 q sum r_i` (B, scaled), `4 n sum r_i` where A is not f32, `4 (m + 1) n h` for blocks of `h` rows
//! (about 192 KiB each), the method's own (bits: `m q n / 8`; search for a threshold: at most `q n / 4` plus
//! 0.4 MiB), and the sketch's `4 (passes + 3) width (q + n)`. Never `4 q n`.

pub(crate) mod breadcrumbs;
pub(crate) mod dare;
pub(crate) mod della;
mod deltas;
mod elect;
pub(crate) mod fisher;
mod mask;
pub(crate) mod prune;
pub(crate) mod sce;
#[cfg(test)]
mod tests;
mod threshold;
pub(crate) mod ties;

use std::cell::Cell;
use std::ops::Range;

use super::factor::layer_of;
use super::report::{ModuleReport, Seen};
use super::spec::{Parent, Semantics, Spec};
use crate::algebra::{Factors, Grams, Keep, SketchOptions, Stack, Tiles, decompose_from};
use crate::error::{Error, Result};
use crate::kernels::Kernels;
use crate::layer::Layer;
use crate::learn::basis::Tick;
use crate::rng::Rng;

use deltas::Deltas;
use elect::Join;
use threshold::Numbers;

pub use mask::mask;

/// Rows of a warm start at most, as a multiple of the sketch's own width; beyond it they are mixed.
const SPAN: usize = 2;
/// Random rows beside a warm start, for what it does not see.
const BLIND: usize = 8;
/// Stream of the mixes of a warm start.
const STREAM: u64 = 0x7370_616e;

/// Makes a method ready for one module.
pub(crate) type Prepare = for<'a> fn(&Context<'a>, &mut Tick<'_>) -> Result<Box<dyn Method + 'a>>;

/// A method that is ready.
pub(crate) trait Method {
    /// The result's rows of a block from the parents' (which may be changed).
    fn block(&mut self, k: &Kernels, block: Range<usize>, parents: &mut [Vec<f32>], out: &mut [f32]);

    /// Bytes held.
    fn bytes(&self) -> usize;

    /// What should be known of how it went.
    fn notes(&self) -> Vec<String> {
        Vec::new()
    }
}

/// What a method sees of a module.
pub(crate) struct Context<'a> {
    pub k: &'a Kernels,
    pub module: &'a str,
    /// In the order of their names.
    pub parents: &'a [Parent<'a>],
    pub deltas: &'a Deltas,
    pub spec: &'a Spec,
    /// Bytes that getting ready took at most.
    peak: Cell<usize>,
}

impl Context<'_> {
    /// Rows and columns.
    fn shape(&self) -> [usize; 2] {
        [self.deltas.rows(), self.deltas.cols()]
    }

    /// Notes that so many bytes were held at once.
    fn held(&self, bytes: usize) {
        self.peak.set(self.peak.get().max(bytes));
    }

    /// The given largest magnitudes of each parent's change, with what `keep` makes of them.
    fn thresholds<T>(
        &self,
        ranks: &[usize],
        tick: &mut Tick<'_>,
        keep: impl Fn(&[f32]) -> T,
    ) -> Result<Vec<T>> {
        let all = 0..self.deltas.len();
        all.map(|i| {
            let mut numbers = OneDelta { c: self, i, tick: &mut *tick };
            self.held(threshold::bytes(&numbers, ranks.len()));
            Ok(keep(&threshold::largest(self.k, &mut numbers, ranks)?))
        })
        .collect()
    }
}

/// The entries of one parent's change.
struct OneDelta<'a, 'c, 't, 'u> {
    c: &'a Context<'c>,
    i: usize,
    tick: &'t mut Tick<'u>,
}

impl Numbers for OneDelta<'_, '_, '_, '_> {
    fn count(&self) -> usize {
        self.c.deltas.entries()
    }

    fn sample(&self, n: usize, rng: &mut Rng) -> Vec<f32> {
        let (d, [rows, cols]) = (self.c.deltas, self.c.shape());
        let columns = d.columns(self.i..self.i + 1);
        (0..n).map(|_| d.entry(self.i, &columns[0], below(rng, rows), below(rng, cols))).collect()
    }

    fn each(&mut self, f: &mut dyn FnMut(&[f32])) -> Result<()> {
        self.c.deltas.stream(self.c.k, self.i..self.i + 1, self.tick, &mut |_, tiles| {
            f(&tiles[0]);
            Ok(())
        })
    }

    fn bytes(&self) -> [usize; 2] {
        let d = self.c.deltas;
        [4 * d.cols() * d.rank(self.i), d.block_bytes()]
    }
}

/// A number in 0..n.
fn below(rng: &mut Rng, n: usize) -> usize {
    ((f64::from(rng.uniform()) * n as f64) as usize).min(n - 1)
}

/// What a method does to one parent's entries before they are joined.
trait Thin {
    fn thin(&mut self, k: &Kernels, parent: usize, row: usize, x: &mut [f32]);
    fn bytes(&self) -> usize;
}

/// A method that thins each parent on its own, then joins them.
struct Thinned<T> {
    thin: T,
    join: Join,
}

impl<T: Thin> Method for Thinned<T> {
    fn block(&mut self, k: &Kernels, block: Range<usize>, parents: &mut [Vec<f32>], out: &mut [f32]) {
        let cols = out.len() / block.len();
        for (at, (j, out)) in block.zip(out.chunks_exact_mut(cols)).enumerate() {
            let span = at * cols..(at + 1) * cols;
            for (i, parent) in parents.iter_mut().enumerate() {
                self.thin.thin(k, i, j, &mut parent[span.clone()]);
            }
            let rows: Vec<&[f32]> = parents.iter().map(|p| &p[span.clone()]).collect();
            self.join.join(k, &rows, out);
        }
    }

    fn bytes(&self) -> usize {
        self.thin.bytes()
    }
}

/// Entries whose magnitude lies in a band, one per parent.
struct Bands(Vec<[f32; 2]>);

/// The band that drops nothing.
const EVERYTHING: [f32; 2] = [0.0, f32::INFINITY];
/// The band that drops everything: entries are finite.
const NOTHING: [f32; 2] = [f32::INFINITY; 2];

impl Bands {
    /// Each parent's `keep` largest entries after the `skip` largest; entries equal to the first or the last of
    /// them stay too, wherever they are.
    fn between(c: &Context<'_>, skip: usize, keep: usize, tick: &mut Tick<'_>) -> Result<Self> {
        let (all, m) = (c.deltas.entries(), c.deltas.len());
        let keep = keep.min(all.saturating_sub(skip));
        if keep == 0 {
            return Ok(Bands(vec![NOTHING; m]));
        }
        let bands = match (skip, keep == all) {
            (_, true) => vec![EVERYTHING; m],
            (0, _) => c.thresholds(&[keep], tick, |t| [t[0], f32::INFINITY])?,
            _ => c.thresholds(&[skip + 1, skip + keep], tick, |t| [t[1], t[0]])?,
        };
        Ok(Bands(bands))
    }
}

impl Thin for Bands {
    fn thin(&mut self, k: &Kernels, parent: usize, _: usize, x: &mut [f32]) {
        let band = self.0[parent];
        if band != EVERYTHING {
            k.keep_band(band, x);
        }
    }

    fn bytes(&self) -> usize {
        0
    }
}

/// The merged change of one module.
pub(crate) struct Merged {
    /// Truncated to `rank`, perhaps shorter.
    pub factors: Factors,
    /// Rank of the result: as asked, else the largest of the parents'.
    pub rank: usize,
    /// Bytes taken at most, inputs and result not counted.
    pub peak_bytes: usize,
    /// Share of the entries that are not zero in every parent, where two parents differ in sign.
    pub sign_conflict: Option<f64>,
    /// What should be known of how it went.
    pub notes: Vec<String>,
}

/// Blocks of the result, made anew at every reading.
struct Blocks<'a> {
    k: &'a Kernels,
    deltas: &'a Deltas,
    method: Box<dyn Method + 'a>,
    buffers: Vec<Vec<f32>>,
}

impl<'a> Blocks<'a> {
    fn new(k: &'a Kernels, deltas: &'a Deltas, method: Box<dyn Method + 'a>) -> Self {
        Blocks { k, deltas, method, buffers: (0..deltas.len()).map(|_| deltas.buffer()).collect() }
    }

    fn bytes(&self) -> usize {
        self.method.bytes() + self.buffers.len() * self.deltas.block_bytes()
    }
}

impl Tiles for Blocks<'_> {
    fn rows(&self) -> usize {
        self.deltas.rows()
    }

    fn cols(&self) -> usize {
        self.deltas.cols()
    }

    fn tile(&mut self, first: usize, out: &mut [f32]) -> Result<()> {
        for (i, buffer) in self.buffers.iter_mut().enumerate() {
            buffer.resize(out.len(), 0.0);
            self.deltas.tile(self.k, i, first, buffer);
        }
        let block = first..first + out.len() / self.deltas.cols();
        self.method.block(self.k, block, &mut self.buffers, out);
        Ok(())
    }
}

/// Merges one module; parents are finite and of one shape.
///
/// # Errors
/// Changes or results beyond the range of f32, what the method refuses, cancellation.
pub(crate) fn merge(
    k: &Kernels,
    prepare: Prepare,
    module: &str,
    parents: &[Parent<'_>],
    spec: &Spec,
    tick: &mut Tick<'_>,
) -> Result<Merged> {
    let mut parents = parents.to_vec();
    parents.sort_by_key(|p| p.name);
    let deltas = Deltas::new(module, &parents)?;
    let c = Context { k, module, parents: &parents, deltas: &deltas, spec, peak: Cell::new(0) };
    let sign_conflict = if spec.full { Some(conflicts(k, &deltas, tick)?) } else { None };
    if spec.full {
        c.held(deltas.len() * deltas.block_bytes());
    }
    let method = prepare(&c, tick)?;
    let mut blocks = Blocks::new(k, &deltas, method);

    let rank = spec.rank.unwrap_or_else(|| parents.iter().map(|p| p.layer.rank()).max().unwrap_or(1));
    let fit = rank.min(deltas.rows()).min(deltas.cols());
    let plain = SketchOptions::for_rank(fit);
    let start = deltas.span(k, SPAN * plain.width, &mut Rng::new(spec.seed, STREAM));
    let width = plain.width.max((start.len() / deltas.cols() + BLIND).next_multiple_of(8));
    let mut o = SketchOptions { width, seed: spec.seed, ..plain };
    if spec.semantics == Semantics::Peft {
        // A full decomposition is what is asked for, to the last digits.
        (o.tolerance, o.max_passes) = (1e-13, 64);
    }
    let (factors, bytes) =
        decompose_from(k, &mut blocks, &start, Keep::Rank(fit), &o, tick).map_err(|e| match e {
            Error::NonFinite { .. } => Error::NonFinite {
                arg: format!("module {module}"),
                detail: " in the merged change: it overflows float32".into(),
            },
            other => other,
        })?;
    c.held(blocks.bytes() + 4 * start.len() + bytes);
    let mut notes = blocks.method.notes();
    if factors.norm2 == 0.0 {
        notes.push("the merged change is zero".into());
    }
    Ok(Merged { factors, rank, peak_bytes: deltas.bytes() + c.peak.get(), sign_conflict, notes })
}

/// [`merge`] as a layer with its report.
///
/// # Errors
/// As [`merge`]; a result beyond the range of its dtype.
pub(crate) fn layer(
    k: &Kernels,
    prepare: Prepare,
    module: &str,
    parents: &[Parent<'_>],
    spec: &Spec,
    tick: &mut Tick<'_>,
) -> Result<(Layer, ModuleReport)> {
    let made = merge(k, prepare, module, parents, spec, tick)?;
    let layers: Vec<&Layer> = parents.iter().map(|p| p.layer).collect();
    let (stack, groups) = Stack::of(&layers, &vec![1.0; layers.len()])?;
    let grams = Grams::of(k, &stack);
    let products = grams.products(&stack.coef, &groups);
    let seen = Seen { stack: &stack, grams: &grams, groups: &groups, products: &products };
    let mut report = seen.apart(k, parents, &made.factors);
    let after = stack.bytes() + 3 * grams.bytes();
    report.bytes = made.peak_bytes.max(after);
    report.sign_conflict = made.sign_conflict;
    report.notes = made.notes;
    let layer = layer_of(made.factors, &stack, made.rank, super::dtype_of(spec, &layers))?;
    Ok((layer, report))
}

/// Share of the entries that are not zero in every parent, where two parents differ in sign.
///
/// # Errors
/// Changes beyond the range of f32, cancellation.
pub(crate) fn sign_conflict(
    k: &Kernels,
    module: &str,
    parents: &[Parent<'_>],
    tick: &mut Tick<'_>,
) -> Result<f64> {
    conflicts(k, &Deltas::new(module, parents)?, tick)
}

fn conflicts(k: &Kernels, deltas: &Deltas, tick: &mut Tick<'_>) -> Result<f64> {
    let mut sums = [0usize; 2];
    deltas.stream(k, 0..deltas.len(), tick, &mut |_, tiles| {
        let rows: Vec<&[f32]> = tiles.iter().map(Vec::as_slice).collect();
        let [opposite, some] = k.conflicts(&rows);
        sums = [sums[0] + opposite, sums[1] + some];
        Ok(())
    })?;
    Ok(if sums[1] > 0 { sums[0] as f64 / sums[1] as f64 } else { 0.0 })
}
