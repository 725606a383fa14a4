//! The truncated singular value decomposition of a matrix that is only streamed.
//!
//! Block Krylov iteration (Halko, Martinsson and Tropp, arXiv 0909.4061; Musco and Musco, arXiv 1504.05477): each
//! pass reads M once and gives `Y = M Z^T` and `W = Y^T M`; what of W lies outside the rows there already,
//! orthonormalised, is the next Z. All Z together, with the eigenvectors of the Gram matrix of all Y, are the
//! answer (Rayleigh-Ritz), a projection of M: `|M - X|^2 = |M|^2 - |X|^2`.
//!
//! It stops when what one more half step would add, seen from the part of W outside, is small beside what is
//! missing. Memory: `4 passes width (rows + cols)` bytes for Z and Y, and a few blocks of `4 width cols`.

use nalgebra::{DMatrix, SymmetricEigen};

use super::tiles::{Tiles, block_rows, blocks};
use super::{Factors, Keep, Stack, refactor};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::factor::Factor;
use crate::kernels::Kernels;
use crate::learn::basis::Tick;
use crate::rng::Rng;

/// Stream of the random start; a number of its own, so that masks never share it.
const STREAM: u64 = 0x736b_6574_6368;
/// Rows that dependent ones leave less than this of their square are replaced by random ones.
const DEPENDENT: f64 = 1e-12;
/// Energy below this share of `|M|^2` is rounding of f32.
const ROUNDING: f64 = 1e-11;
/// A residual below this share of `|M|^2` is lost in the rounding of f32 sums and measured instead.
const LITTLE: f64 = 1e-5;
/// The rate of convergence is never taken to be better than what was seen, nor worse than this.
const SLOWEST: f64 = 0.9;

/// How hard to try.
#[derive(Clone, Copy, Debug)]
pub struct SketchOptions {
    /// Rows that each pass adds.
    pub width: usize,
    /// Of the random start.
    pub seed: u64,
    /// Energy that may be missing, relative to that of the best residual: 2e-3 is 1.001 of its norm.
    pub tolerance: f64,
    /// Passes over the matrix at most.
    pub max_passes: usize,
}

impl SketchOptions {
    /// For a residual at most 1.001 of that of the best approximation of rank `rank`.
    pub fn for_rank(rank: usize) -> Self {
        let width = (3 * rank).min(rank + 32).max(8).next_multiple_of(8);
        SketchOptions { width, seed: 0, tolerance: 1e-3, max_passes: 12 }
    }
}

/// The largest part of `m`, as `keep` says, with `norm2` the exact `|M|^2`.
///
/// `norm2 - kept2` is `|M - B^T A|^2` within 1 % (and 1e-13 of `|M|^2`): where little is left, it is measured by
/// one more pass. `values` are the singular values found, those beyond the rank too low the further they go.
/// With [`Keep::Energy`] or [`Keep::MaxError`] the rank grows as far as `width * max_passes` rows allow.
///
/// # Errors
/// Entries that are not finite; errors of `m` and of `tick`, which is told (rows read, rows to read at most).
pub fn decompose(
    k: &Kernels,
    m: &mut dyn Tiles,
    keep: Keep,
    o: &SketchOptions,
    tick: &mut Tick<'_>,
) -> Result<Factors> {
    decompose_from(k, m, &[], keep, o, tick).map(|(factors, _)| factors)
}

/// [`decompose`] from rows (n, cols) that are likely to span much of the answer, and the bytes that it took.
///
/// # Errors
/// As [`decompose`].
pub fn decompose_from(
    k: &Kernels,
    m: &mut dyn Tiles,
    start: &[f32],
    keep: Keep,
    o: &SketchOptions,
    tick: &mut Tick<'_>,
) -> Result<(Factors, usize)> {
    let (rows, cols) = (m.rows(), m.cols());
    let width = o.width.max(start.len() / cols.max(1)).max(1);
    if rows.min(cols) <= width {
        return whole(k, m, keep, tick);
    }
    Sketch::new(k, rows, cols, width, o).run(m, start, keep, tick)
}

/// A matrix with a side no longer than the sketch: it is its own factor.
fn whole(k: &Kernels, m: &mut dyn Tiles, keep: Keep, tick: &mut Tick<'_>) -> Result<(Factors, usize)> {
    let (rows, cols) = (m.rows(), m.cols());
    let mut data = vec![0.0f32; rows * cols];
    for block in blocks(rows, cols) {
        tick(block.start, rows)?;
        m.tile(block.start, &mut data[block.start * cols..block.end * cols])?;
    }
    tick(rows, rows)?;
    let norm2 = k.sum_squares(&data);
    if !norm2.is_finite() {
        return Err(Error::non_finite("matrix"));
    }
    let side = rows.min(cols);
    let identity: Vec<f32> = (0..side * side).map(|i| f32::from(u8::from(i % (side + 1) == 0))).collect();
    let mut stack = Stack::new(cols, rows);
    if rows <= cols {
        (stack.a, stack.b) = (data, identity);
    } else {
        stack.b = vec![0.0; rows * cols];
        for (j, row) in data.chunks_exact(cols).enumerate() {
            for (i, v) in row.iter().enumerate() {
                stack.b[i * rows + j] = *v;
            }
        }
        stack.a = identity;
    }
    stack.coef = vec![1.0; side];
    // A second copy where it is transposed; the Grams of `refactor` and what it makes of them.
    let bytes = 4 * rows * cols + stack.bytes() + REFACTOR * side * side;
    let mut factors = refactor(k, &stack, keep)?;
    factors.kept2 += norm2 - factors.norm2;
    factors.norm2 = norm2;
    Ok((factors, bytes))
}

/// `|M - B^T A|^2`.
fn residual(k: &Kernels, m: &mut dyn Tiles, factors: &Factors, tick: &mut Tick<'_>) -> Result<f64> {
    let (rows, cols, rank) = (m.rows(), m.cols(), factors.rank);
    let a = Factor::from_rows(&factors.a, rank, cols, Dtype::F32);
    let mut tile = vec![0.0f32; block_rows(rows, cols) * cols];
    let mut sum = 0.0;
    for block in blocks(rows, cols) {
        tick(block.start, rows)?;
        let tile = &mut tile[..block.len() * cols];
        m.tile(block.start, tile)?;
        let u: Vec<f32> = block.flat_map(|j| (0..rank).map(move |r| -factors.b[r * rows + j])).collect();
        a.combine_batch(k, &u, tile, true);
        sum += k.sum_squares(tile);
    }
    Ok(sum)
}

/// Bytes per square of the rank that `refactor` works in: both Grams, their product, L, V and temporaries.
const REFACTOR: usize = 8 * 8;

/// The rows of one pass and what M makes of them.
struct Block {
    /// (width, cols), orthonormal.
    z: Factor,
    /// `Z M^T`, (width, rows).
    y: Vec<f32>,
}

struct Sketch<'a> {
    k: &'a Kernels,
    rows: usize,
    cols: usize,
    width: usize,
    o: &'a SketchOptions,
    rng: Rng,
    blocks: Vec<Block>,
    /// Gram matrix of all Y.
    gram: DMatrix<f64>,
    norm2: f64,
    /// Y is `scale Z M^T`, a power of two that keeps squares of M inside the range of f32; 0 while M is.
    scale: f32,
}

/// Ritz values, largest first, with their vectors.
struct Ritz {
    values: Vec<f64>,
    vectors: DMatrix<f64>,
}

impl Ritz {
    fn of(gram: &DMatrix<f64>) -> Self {
        let e = SymmetricEigen::new(gram.clone());
        let mut order: Vec<usize> = (0..e.eigenvalues.len()).collect();
        order.sort_by(|&i, &j| e.eigenvalues[j].total_cmp(&e.eigenvalues[i]));
        Ritz {
            values: order.iter().map(|&i| e.eigenvalues[i].max(0.0)).collect(),
            vectors: e.eigenvectors.select_columns(&order),
        }
    }

    /// How many directions `keep` wants of a matrix with this norm, and whether they are there.
    fn wanted(&self, keep: Keep, norm2: f64) -> (usize, bool) {
        let share = match keep {
            Keep::Rank(rank) => {
                let rank = rank.max(1);
                return (rank.min(self.values.len()), rank <= self.values.len());
            }
            Keep::Energy(share) => share,
            Keep::MaxError(x) => 1.0 - x * x,
        };
        let (mut sum, mut rank) = (0.0, 0);
        while rank < self.values.len() && (rank == 0 || sum < share * norm2) {
            sum += self.values[rank];
            rank += 1;
        }
        (rank, sum >= share * norm2 - ROUNDING * norm2)
    }
}

impl<'a> Sketch<'a> {
    fn new(k: &'a Kernels, rows: usize, cols: usize, width: usize, o: &'a SketchOptions) -> Self {
        Sketch {
            k,
            rows,
            cols,
            width,
            o,
            rng: Rng::new(o.seed, STREAM),
            blocks: Vec::new(),
            gram: DMatrix::zeros(0, 0),
            norm2: 0.0,
            scale: 0.0,
        }
    }

    fn run(
        mut self,
        m: &mut dyn Tiles,
        start: &[f32],
        keep: Keep,
        tick: &mut Tick<'_>,
    ) -> Result<(Factors, usize)> {
        let mut next = start.to_vec();
        next.resize(self.width * self.cols, 0.0);
        // Zero rows count as dependent: random ones take their place.
        let (mut next, _) = self.outside(next);
        let passes = self.o.max_passes.max(1);
        let mut last = None;
        for pass in 0..passes {
            let w = self.pass(m, next, pass, passes, tick)?;
            let scale = f64::from(self.scale);
            let norm2 = self.norm2 * scale * scale;
            let ritz = Ritz::of(&self.gram);
            let (rank, there) = ritz.wanted(keep, norm2);
            let (rest, outside) = self.outside(w);
            let energy: f64 = ritz.values[..rank].iter().sum();
            let ahead = look_ahead(&ritz, rank, &outside, energy);
            // What this half step adds, against the one before it: later ones form a geometric series.
            let rate = match last {
                Some((before, seen)) if before == rank && energy > seen => {
                    ((ahead - energy) / (energy - seen)).min(SLOWEST)
                }
                _ => SLOWEST,
            };
            last = Some((rank, ahead));
            let missing = (ahead - energy) / (1.0 - rate);
            let settled = missing <= self.o.tolerance * (norm2 - energy).max(0.0) + ROUNDING * norm2;
            // The random start lies partly outside the rows of M; what follows lies inside.
            let all = rest.is_empty() || self.gram.nrows() >= self.rows + self.width;
            if (there && settled) || all || pass + 1 == passes {
                let (k, norm2) = (self.k, self.norm2);
                let (mut factors, bytes) = self.finish(&ritz, rank)?;
                if norm2 - factors.kept2 < LITTLE * norm2 {
                    factors.kept2 = norm2 - residual(k, m, &factors, tick)?;
                }
                tick(passes * m.rows(), passes * m.rows())?;
                return Ok((factors, bytes));
            }
            next = rest;
        }
        unreachable!("the last pass returns")
    }

    /// Reads M once: fills in Y of the rows `z`, the Gram matrix of all Y, and gives W.
    fn pass(
        &mut self,
        m: &mut dyn Tiles,
        z: Vec<f32>,
        pass: usize,
        passes: usize,
        tick: &mut Tick<'_>,
    ) -> Result<Vec<f32>> {
        let (rows, cols, width) = (self.rows, self.cols, z.len() / self.cols);
        let z = Factor::from_rows(&z, width, cols, Dtype::F32);
        let mut w = Factor::zeros(width, cols, Dtype::F32);
        let mut y = vec![0.0f32; width * rows];
        let height = block_rows(rows, cols);
        let mut tile = vec![0.0f32; height * cols];
        let mut u = vec![0.0f32; height * width];
        for block in blocks(rows, cols) {
            tick(pass * rows + block.start, passes * rows)?;
            let (tile, u) = (&mut tile[..block.len() * cols], &mut u[..block.len() * width]);
            m.tile(block.start, tile)?;
            if pass == 0 {
                let energy = self.k.sum_squares(tile);
                if !energy.is_finite() {
                    let detail = format!(" in rows {} to {}", block.start, block.end - 1);
                    return Err(Error::NonFinite { arg: "matrix".into(), detail });
                }
                self.norm2 += energy;
                if self.scale == 0.0 && energy > 0.0 {
                    self.scale =
                        (-(energy / tile.len() as f64).log2() / 2.0).round().clamp(-120.0, 120.0).exp2()
                            as f32;
                }
            }
            z.dots_batch(self.k, tile, u, self.scale);
            w.outer_batch(self.k, u, tile);
            for (j, u) in u.chunks_exact(width).enumerate() {
                for (r, u) in u.iter().enumerate() {
                    y[r * rows + block.start + j] = *u;
                }
            }
        }
        self.widen_gram(&y, width);
        self.blocks.push(Block { z, y });
        let mut w = w.to_f32(false);
        self.k.scale(self.scale, &mut w);
        Ok(w)
    }

    /// Adds the products of `y` with all Y to the Gram matrix.
    fn widen_gram(&mut self, y: &[f32], width: usize) {
        let old = self.gram.nrows();
        let mut gram = std::mem::replace(&mut self.gram, DMatrix::zeros(0, 0));
        gram = gram.resize(old + width, old + width, 0.0);
        let mut at = 0;
        for block in &self.blocks {
            let n = block.z.rank();
            let mut out = vec![0.0; width * n];
            self.k.products_of_rows(y, &block.y, self.rows, &mut out);
            for (i, row) in out.chunks_exact(n).enumerate() {
                for (j, v) in row.iter().enumerate() {
                    (gram[(old + i, at + j)], gram[(at + j, old + i)]) = (*v, *v);
                }
            }
            at += n;
        }
        let mut out = vec![0.0; width * width];
        self.k.gram_of_rows(y, self.rows, &mut out);
        for (i, row) in out.chunks_exact(width).enumerate() {
            for (j, v) in row.iter().enumerate() {
                gram[(old + i, old + j)] = *v;
            }
        }
        self.gram = gram;
    }

    /// The part of the rows of `w` outside all Z: orthonormalised, and its Gram matrix before that.
    fn outside(&mut self, mut w: Vec<f32>) -> (Vec<f32>, DMatrix<f64>) {
        let cols = self.cols;
        let spanned: usize = self.blocks.iter().map(|b| b.z.rank()).sum();
        let width = (w.len() / cols).min(cols - spanned);
        let mut before = None;
        // Twice is enough (Giraud et al., 2005), counted from the last random rows.
        let (mut clean, mut rounds) = (0, 0);
        while clean < 2 && rounds < 6 {
            for block in &self.blocks {
                let mut c = vec![0.0f32; w.len() / cols * block.z.rank()];
                block.z.dots_batch(self.k, &w, &mut c, -1.0);
                block.z.combine_batch(self.k, &c, &mut w, true);
            }
            let n = w.len() / cols;
            let mut gram = DMatrix::zeros(n, n);
            self.k.gram_of_rows(&w, cols, gram.as_mut_slice());
            let before = before.get_or_insert_with(|| gram.clone());
            if n > width {
                w.truncate(width * cols);
                gram = before.view((0, 0), (width, width)).clone_owned();
            }
            clean = if self.orthonormalise(&mut w, &gram) { 0 } else { clean + 1 };
            rounds += 1;
        }
        (w, before.unwrap_or_else(|| DMatrix::zeros(0, 0)))
    }

    /// `w := L^-1 w` with `w w^T = L L^T`; rows that depend on those before become random. Whether any did.
    fn orthonormalise(&mut self, w: &mut Vec<f32>, gram: &DMatrix<f64>) -> bool {
        let (inverse, weak) = inverse_root(gram);
        let mut out = vec![0.0f32; w.len()];
        self.k.mix_rows(&inverse, w, self.cols, &mut out);
        for &i in &weak {
            out[i * self.cols..(i + 1) * self.cols].fill_with(|| self.rng.symmetric(1.0));
        }
        *w = out;
        !weak.is_empty()
    }

    /// The first `rank` Ritz vectors as factors.
    fn finish(self, ritz: &Ritz, rank: usize) -> Result<(Factors, usize)> {
        let mut stack = Stack::new(self.cols, self.rows);
        stack.a = vec![0.0; rank * self.cols];
        stack.b = vec![0.0; rank * self.rows];
        stack.coef = vec![1.0; rank];
        let mut at = 0;
        for block in &self.blocks {
            let n = block.z.rank();
            let coef: Vec<f32> =
                (0..rank).flat_map(|r| (at..at + n).map(move |i| ritz.vectors[(i, r)] as f32)).collect();
            block.z.combine_batch(self.k, &coef, &mut stack.a, true);
            let y = Factor::from_rows(&block.y, n, self.rows, Dtype::F32);
            y.combine_batch(self.k, &coef, &mut stack.b, true);
            at += n;
        }
        let bytes = self.bytes(&stack);
        let unit = if self.scale > 0.0 { 1.0 / f64::from(self.scale) } else { 1.0 };
        self.k.scale(unit as f32, &mut stack.b);
        let mut factors = refactor(self.k, &stack, Keep::Rank(rank))?;
        // A projection: |M - X|^2 = |M|^2 - |X|^2.
        factors.norm2 = self.norm2;
        factors.values = ritz.values.iter().map(|v| unit * v.sqrt()).collect();
        Ok((factors, bytes))
    }

    /// Bytes at the fullest: all Z and Y, W with two copies, a block with its products, small matrices.
    fn bytes(&self, stack: &Stack) -> usize {
        let spanned: usize = self.gram.nrows();
        let stored: usize = self.blocks.iter().map(|b| b.z.memory_bytes() + 4 * b.y.len()).sum();
        let height = block_rows(self.rows, self.cols);
        let streaming = 4 * (3 * self.width * self.cols + height * (self.cols + self.width));
        let last = stack.bytes() + 4 * self.width * self.rows + REFACTOR * stack.rank() * stack.rank();
        stored + streaming.max(last) + 8 * 4 * spanned * spanned
    }
}

/// Row-major `L^-1` with `g = L L^T`, and the rows that depend on those before (which it leaves out).
fn inverse_root(g: &DMatrix<f64>) -> (Vec<f64>, Vec<usize>) {
    let n = g.nrows();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let scale: Vec<f64> =
        (0..n).map(|i| if g[(i, i)] > 0.0 { 1.0 / g[(i, i)].sqrt() } else { 0.0 }).collect();
    let (mut l, mut inverse, mut weak) = (vec![0.0; n * n], vec![0.0; n * n], Vec::new());
    for i in 0..n {
        let (done, row) = l.split_at_mut(i * n);
        let row = &mut row[..n];
        for j in 0..i {
            // The diagonal of a dependent row is 0, and so is the column below it.
            let pivot = done[j * n + j];
            let left = g[(i, j)] * scale[i] * scale[j] - dot(&row[..j], &done[j * n..j * n + j]);
            row[j] = if pivot > 0.0 { left / pivot } else { 0.0 };
        }
        let pivot = 1.0 - dot(&row[..i], &row[..i]);
        if scale[i] == 0.0 || !(pivot > DEPENDENT) {
            row.fill(0.0);
            weak.push(i);
            continue;
        }
        row[i] = pivot.sqrt();
        let (above, own) = inverse.split_at_mut(i * n);
        for (j, above) in above.chunks_exact(n).enumerate() {
            for (own, above) in own[..=j].iter_mut().zip(above) {
                *own -= row[j] * above;
            }
        }
        for own in &mut own[..i] {
            *own /= row[i];
        }
        own[i] = scale[i] / row[i];
    }
    (inverse, weak)
}

/// The energy of the best `rank` directions after half a step more: M projected on the span of all Y, whose Gram
/// matrix in the Ritz basis is `T + T^-1/2 V^T R V T^-1/2`, R the Gram matrix of what of W lies outside.
fn look_ahead(ritz: &Ritz, rank: usize, outside: &DMatrix<f64>, energy: f64) -> f64 {
    let (all, last) = (ritz.values.len(), outside.nrows());
    let m = (2 * rank + 8).min(all);
    let largest = ritz.values[0];
    if largest == 0.0 || last == 0 {
        return energy;
    }
    let mut v = ritz.vectors.view((all - last, 0), (last, m)).clone_owned();
    for (mut column, value) in v.column_iter_mut().zip(&ritz.values) {
        column *= if *value > ROUNDING * largest { 1.0 / value.sqrt() } else { 0.0 };
    }
    let mut ahead = v.transpose() * (outside * &v);
    for i in 0..m {
        ahead[(i, i)] += ritz.values[i];
    }
    let mut values: Vec<f64> = ahead.symmetric_eigenvalues().iter().copied().collect();
    values.sort_by(|a, b| b.total_cmp(a));
    values[..rank].iter().sum::<f64>().max(energy)
}

#[cfg(test)]
mod tests;
