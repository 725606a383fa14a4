//! Bodies over blocks for one row of x: codes become f32 in registers.

use std::mem::MaybeUninit;

use super::geometry::AHEAD;
use super::quant::ROWS;
use super::quant_blocks::{Block, SPAN, Scales};
use super::vector::Vector;

/// Columns whose heads are read at once: scales then come from memory by broadcast, and not from a register by a
/// shuffle, of which widening the codes needs enough.
const HEADS: usize = 256;

/// Heads of some columns of blocks.
type Heads<B, const R: usize> = [MaybeUninit<[<B as Block>::Head; R]>; 8];

/// Where the rows of one pass lie: `R` of a group of `height`.
#[derive(Clone, Copy)]
pub(super) struct Run {
    heads: *const u8,
    codes: *const u8,
    /// Bytes from one column of blocks to the next.
    step: usize,
    /// Columns of blocks.
    pub blocks: usize,
}

impl Run {
    /// Rows from `r` on of the group of `height` at `base`.
    #[inline(always)]
    pub unsafe fn new<B: Block>(base: *const u8, height: usize, r: usize, cols: usize) -> Self {
        // SAFETY: the caller gives a whole group; r < height.
        let (heads, codes) = unsafe { (base.add(r * B::HEAD), base.add(height * B::HEAD + r * B::CODES)) };
        let step = height * (B::HEAD + B::CODES);
        Run { heads, codes, step, blocks: cols / B::ELEMENTS }
    }

    /// Heads of up to [`HEADS`] columns from one block on, each times its coefficient; gives how many blocks.
    #[inline(always)]
    unsafe fn heads<V: Vector, B: Block, const R: usize>(
        self,
        from: usize,
        coef: &[f32; R],
        to: &mut Heads<B, R>,
    ) -> usize {
        let n = (self.blocks - from).min(HEADS / B::ELEMENTS);
        for (j, to) in to.iter_mut().enumerate().take(n) {
            // SAFETY: from + j < blocks.
            unsafe { to.write(B::heads::<V, R>(self.heads.add((from + j) * self.step), coef)) };
        }
        n
    }

    /// The head of one block of a single row.
    #[inline(always)]
    pub unsafe fn one_head<V: Vector, B: Block>(self, block: usize) -> [B::Head; 1] {
        // SAFETY: the caller gives block < blocks.
        unsafe { B::heads::<V, 1>(self.heads.add(block * self.step), &[1.0]) }
    }

    /// Asks for the column of blocks that lies [`AHEAD`] of this one: vector units are what the bodies wait for when
    /// the matrix is warm, and a prefetch needs none.
    #[inline(always)]
    unsafe fn prefetch<V: Vector>(self, codes: *const u8) {
        let mut line = 0;
        while line < self.step {
            // SAFETY: a prefetch reads nothing and never faults; the address is formed by wrapping arithmetic.
            unsafe { V::prefetch(codes.wrapping_add(AHEAD + line)) };
            line += 64;
        }
    }

    /// Codes of one column of blocks.
    #[inline(always)]
    pub unsafe fn codes(self, block: usize) -> *const u8 {
        // SAFETY: the caller gives block < blocks.
        unsafe { self.codes.add(block * self.step) }
    }
}

/// Rows of a matrix in passes of [`ROWS`] or of one, each with its run and its first row.
macro_rules! passes {
    ($B:ident, $w:expr, $rows:expr, $cols:expr, ($run:ident, $row:ident) => $four:expr, $one:expr) => {{
        let per_row = $cols / $B::ELEMENTS * ($B::HEAD + $B::CODES);
        let mut first = 0;
        while first < $rows {
            let height = ($rows - first).min(ROWS);
            let base = $w.add(first * per_row);
            if height == ROWS {
                let ($run, $row) = (Run::new::<$B>(base, height, 0, $cols), first);
                $four;
            } else {
                for r in 0..height {
                    let ($run, $row) = (Run::new::<$B>(base, height, r, $cols), first + r);
                    $one;
                }
            }
            first += height;
        }
    }};
}

/// `acc[r] += row r . x` of one column of blocks.
#[inline(always)]
unsafe fn dots_block<V: Vector, B: Block, const R: usize>(
    codes: *const u8,
    heads: &[B::Head; R],
    x: *const f32,
    acc: &mut [V; R],
) {
    let (vectors, halves) = (SPAN / V::W, if B::HALVES { 2 } else { 1 });
    // SAFETY: the caller gives the codes of R blocks and as many x as one has elements.
    unsafe {
        for unit in 0..B::ELEMENTS / (SPAN * B::TOGETHER) {
            for s in 0..B::TOGETHER {
                let span = unit * B::TOGETHER + s;
                let x = x.add(span * SPAN);
                let mut xv = [V::splat(0.0); 4];
                for i in 0..vectors {
                    xv[i] = V::load(x.add(i * V::W));
                }
                let mut total = xv[0];
                if B::Head::OFFSETS {
                    for i in 1..vectors {
                        total = total.add(xv[i]);
                    }
                }
                for r in 0..R {
                    let span_codes = B::span::<V>(codes.add(r * B::CODES), unit, s);
                    for half in 0..halves {
                        let (from, n) = (half * vectors / halves, vectors / halves);
                        let mut part = B::vector::<V>(span_codes, from).mul(xv[from]);
                        for i in from + 1..from + n {
                            part = B::vector::<V>(span_codes, i).fma(xv[i], part);
                        }
                        acc[r] = part.fma(V::splat(heads[r].scale(span, half)), acc[r]);
                    }
                    if B::Head::OFFSETS {
                        acc[r] = total.fma(V::splat(heads[r].offset(span)), acc[r]);
                    }
                }
            }
        }
    }
}

/// `<row r, x>` of `R` rows.
#[inline(always)]
unsafe fn dots_run<V: Vector, B: Block, const R: usize>(run: Run, x: *const f32) -> [f32; R] {
    // SAFETY: the caller gives a run of R rows and as many x as it has columns.
    unsafe {
        let mut acc = [V::splat(0.0); R];
        let mut some: Heads<B, R> = [const { MaybeUninit::uninit() }; 8];
        let mut from = 0;
        while from < run.blocks {
            let n = run.heads::<V, B, R>(from, &[1.0; R], &mut some);
            for (j, heads) in some.iter().enumerate().take(n) {
                let (block, heads) = (from + j, heads.assume_init_ref());
                let codes = run.codes(block);
                run.prefetch::<V>(codes);
                dots_block::<V, B, R>(codes, heads, x.add(block * B::ELEMENTS), &mut acc);
            }
            from += n;
        }
        let mut out = [0.0; R];
        V::sums(acc.as_ptr(), R, out.as_mut_ptr());
        out
    }
}

#[inline(always)]
pub(super) unsafe fn put(sums: &[f32], out: *mut f32, s: f32, add: bool) {
    for (r, v) in sums.iter().enumerate() {
        // SAFETY: the caller gives as many writable elements of out as there are sums.
        unsafe { *out.add(r) = if add { *out.add(r) + s * v } else { s * v } };
    }
}

/// `out[r] = <row r, x>` (`out[r] +=` when `add`).
///
/// # Safety
/// `w` holds a packed matrix of `rows` rows of `cols`, `x` `cols`, `out` `rows` writable; the ISA of `V` is present.
#[inline(always)]
pub(super) unsafe fn dots<V: Vector, B: Block>(
    w: *const u8,
    [rows, cols]: [usize; 2],
    x: *const f32,
    out: *mut f32,
    add: bool,
) {
    // SAFETY: a run lies in w, its rows from `row` on in out.
    unsafe {
        passes!(
            B,
            w,
            rows,
            cols,
            (run, row) => put(&dots_run::<V, B, ROWS>(run, x), out.add(row), 1.0, add),
            put(&dots_run::<V, B, 1>(run, x), out.add(row), 1.0, add)
        );
    }
}

/// `y (+)= sum_r coef[r] row r` of one column of blocks, whose heads hold the coefficients.
#[inline(always)]
unsafe fn combine_block<V: Vector, B: Block, const R: usize>(
    codes: *const u8,
    heads: &[B::Head; R],
    y: *mut f32,
    add: bool,
) {
    let (vectors, halves) = (SPAN / V::W, if B::HALVES { 2 } else { 1 });
    // SAFETY: the caller gives the codes of R blocks and as many y as one has elements.
    unsafe {
        for unit in 0..B::ELEMENTS / (SPAN * B::TOGETHER) {
            for s in 0..B::TOGETHER {
                let span = unit * B::TOGETHER + s;
                let y = y.add(span * SPAN);
                let mut offset = 0.0;
                for head in heads {
                    offset += head.offset(span);
                }
                let mut acc = [V::splat(offset); 4];
                for i in 0..if add { vectors } else { 0 } {
                    let before = V::load(y.add(i * V::W));
                    acc[i] = if B::Head::OFFSETS { before.add(acc[i]) } else { before };
                }
                for r in 0..R {
                    let span_codes = B::span::<V>(codes.add(r * B::CODES), unit, s);
                    for i in 0..vectors {
                        let scale = V::splat(heads[r].scale(span, i * halves / vectors));
                        acc[i] = B::vector::<V>(span_codes, i).fma(scale, acc[i]);
                    }
                }
                for i in 0..vectors {
                    acc[i].store(y.add(i * V::W));
                }
            }
        }
    }
}

/// `y (+)= sum_r coef[r] row r` over `R` rows.
#[inline(always)]
unsafe fn combine_run<V: Vector, B: Block, const R: usize>(
    run: Run,
    coef: *const f32,
    y: *mut f32,
    add: bool,
) {
    // SAFETY: the caller gives a run of R rows, R elements of coef and as many y as the run has columns.
    unsafe {
        let coef: [f32; R] = coef.cast::<[f32; R]>().read_unaligned();
        let mut some: Heads<B, R> = [const { MaybeUninit::uninit() }; 8];
        let mut from = 0;
        while from < run.blocks {
            let n = run.heads::<V, B, R>(from, &coef, &mut some);
            for (j, heads) in some.iter().enumerate().take(n) {
                let (block, heads) = (from + j, heads.assume_init_ref());
                let codes = run.codes(block);
                run.prefetch::<V>(codes);
                combine_block::<V, B, R>(codes, heads, y.add(block * B::ELEMENTS), add);
            }
            from += n;
        }
    }
}

/// `y = sum_r coef[r] row r` (`y +=` when `add`).
///
/// # Safety
/// As [`dots`], with `rows` elements of `coef` and `cols` writable ones of `y`.
#[inline(always)]
pub(super) unsafe fn combine<V: Vector, B: Block>(
    w: *const u8,
    [rows, cols]: [usize; 2],
    coef: *const f32,
    y: *mut f32,
    add: bool,
) {
    // SAFETY: a run lies in w, its rows from `row` on in coef; y is read only once it was written, or to add.
    unsafe {
        passes!(
            B,
            w,
            rows,
            cols,
            (run, row) => combine_run::<V, B, ROWS>(run, coef.add(row), y, add || row > 0),
            combine_run::<V, B, 1>(run, coef.add(row), y, add || row > 0)
        );
    }
}
