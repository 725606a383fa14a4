//! One tensor, block by block: its factors, its hashes, and the memory that both directions share.

use half::{bf16, f16};
use sha2::{Digest, Sha256};

use super::plan::Layout;
use super::residual::{self, Ordered};
use crate::dtype::Dtype;
use crate::factor::SharedFactor;
use crate::kernels::{Kernels, Product, Stored, Weight};
use crate::layer::Layer;
use crate::parallel;

/// Bytes of a block, or one row where that is longer.
const BLOCK: usize = 512 << 10;

/// The two factors of a module as the kernel wants them for one layout of the weight.
pub(super) struct Delta {
    /// `(rows of the weight, rank)`.
    rows: Vec<f32>,
    /// `(rank, columns of the weight)`.
    columns: SharedFactor,
    scale: f64,
}

impl Delta {
    pub fn new(layer: &Layer, layout: Layout) -> Self {
        let (rows, columns) = match layout {
            Layout::OutIn => (&layer.b, &layer.a),
            Layout::InOut => (&layer.a, &layer.b),
        };
        let rank = layer.rank() as f64;
        let columns = match columns.dtype() {
            Dtype::F32 => columns.clone(),
            _ => columns.cast(Dtype::F32).into(),
        };
        // Not `Layer::scaling`, which is rounded to f32.
        let scale = layer.alpha / if layer.rslora { rank.sqrt() } else { rank };
        Delta { rows: rows.to_f32(true), columns, scale }
    }

    /// Bytes of the copies made for it, at most.
    pub fn bytes(&self) -> usize {
        self.rows.len() * size_of::<f32>() + self.columns.memory_bytes()
    }

    fn product(&self, first: usize, rows: usize, sign: f64) -> Product<'_> {
        let rank = self.columns.rank();
        Product {
            rows: &self.rows[first * rank..(first + rows) * rank],
            columns: self.columns.stream(),
            geometry: self.columns.geometry(),
            scale: sign * self.scale,
        }
    }
}

/// Rows that one block holds.
pub(super) fn block_rows(columns: usize, size: usize) -> usize {
    (BLOCK / (columns * size)).max(1)
}

/// Numbers of one block in aligned memory.
#[derive(Default)]
pub(super) struct Buffer {
    words: Vec<u64>,
    len: usize,
}

impl Buffer {
    /// Makes room for so many bytes; what they hold is not said.
    pub fn resize(&mut self, bytes: usize) {
        self.words.resize(bytes.div_ceil(8).max(self.words.len()), 0);
        self.len = bytes;
    }

    pub fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.len]
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.words)[..self.len]
    }

    fn of<E: Weight>(&self) -> &[E] {
        bytemuck::cast_slice(self.bytes())
    }

    fn of_mut<E: Weight>(&mut self) -> &mut [E] {
        bytemuck::cast_slice_mut(self.bytes_mut())
    }

    fn capacity(&self) -> usize {
        self.words.capacity() * 8
    }
}

/// Why a block cannot be fused.
pub(super) enum Bad {
    /// The base has NaN or infinity at this number of the block.
    Base(usize),
    /// The sum is beyond the dtype's range.
    Sum(usize),
}

/// Memory for blocks, and the sums over those of one tensor.
#[derive(Default)]
pub(super) struct Work {
    /// What was read.
    pub w: Buffer,
    /// What is written.
    pub out: Buffer,
    back: Buffer,
    scratch: Vec<u8>,
    /// Residual blocks that wait to be written.
    pub residual: Vec<u8>,
    before: Sha256,
    after: Sha256,
}

/// Calls `$f::<E>($args)` with the type of `$dtype`.
macro_rules! by_dtype {
    ($dtype:expr, $self:ident.$f:ident($($arg:expr),*)) => {
        match $dtype {
            Dtype::F32 => $self.$f::<f32>($($arg),*),
            Dtype::F16 => $self.$f::<f16>($($arg),*),
            Dtype::Bf16 => $self.$f::<bf16>($($arg),*),
        }
    };
}

impl Work {
    /// `out = round(w + delta)` for the rows in `w`; with `keep` the residual and both hashes go on. Returns
    /// how many numbers rounding lost.
    pub fn fuse(
        &mut self,
        k: &Kernels,
        dtype: Dtype,
        d: &Delta,
        first: usize,
        keep: bool,
    ) -> Result<usize, Bad> {
        by_dtype!(dtype, self.fuse_as(k, d, first, keep))
    }

    fn fuse_as<E: Stored + Weight + Ordered>(
        &mut self,
        k: &Kernels,
        d: &Delta,
        first: usize,
        keep: bool,
    ) -> Result<usize, Bad> {
        let n = self.w.len;
        self.out.resize(n);
        if keep {
            self.back.resize(n);
        }
        let Work { w, out, back, scratch, residual, before, after } = self;
        if let Some(at) = first_bad::<E>(w.of()) {
            return Err(Bad::Base(at));
        }
        let p = d.product(first, n / size_of::<E>() / d.columns.len(), 1.0);
        if !keep {
            k.fuse(&p, w.of::<E>(), out.of_mut(), None);
            return first_bad::<E>(out.of()).map_or(Ok(0), |at| Err(Bad::Sum(at)));
        }
        let lossy = beside(
            || before.update(w.bytes()),
            || {
                k.fuse(&p, w.of::<E>(), out.of_mut(), Some(back.of_mut()));
                if let Some(at) = first_bad::<E>(out.of()) {
                    return Err(Bad::Sum(at));
                }
                after.update(out.bytes());
                Ok(residual::encode::<E>(w.of(), back.of(), scratch, residual))
            },
        )?;
        Ok(lossy)
    }

    /// `out = round(w - delta)` with the residual block put back; both hashes go on.
    pub fn unfuse(
        &mut self,
        k: &Kernels,
        dtype: Dtype,
        d: &Delta,
        first: usize,
        block: (u8, &[u8]),
    ) -> Result<(), &'static str> {
        by_dtype!(dtype, self.unfuse_as(k, d, first, block))
    }

    fn unfuse_as<E: Stored + Weight + Ordered>(
        &mut self,
        k: &Kernels,
        d: &Delta,
        first: usize,
        (kind, payload): (u8, &[u8]),
    ) -> Result<(), &'static str> {
        let n = self.w.len;
        self.out.resize(n);
        let Work { w, out, before, after, .. } = self;
        let p = d.product(first, n / size_of::<E>() / d.columns.len(), -1.0);
        beside(
            || after.update(w.bytes()),
            || {
                k.fuse(&p, w.of::<E>(), out.of_mut(), None);
                residual::apply::<E>(kind, payload, out.of_mut())?;
                before.update(out.bytes());
                Ok(())
            },
        )
    }

    /// SHA-256 of the original and of the fused tensor, in hexadecimal; starts anew.
    pub fn take_hashes(&mut self) -> [String; 2] {
        [hex(&self.before.finalize_reset()), hex(&self.after.finalize_reset())]
    }

    /// Bytes held.
    pub fn memory(&self) -> usize {
        let buffers = self.w.capacity() + self.out.capacity() + self.back.capacity();
        buffers + self.scratch.capacity() + self.residual.capacity()
    }
}

/// Runs `a` beside `b` where threads are on (see `set_num_threads`), else before it.
fn beside<R: Send>(a: impl FnOnce() + Send, b: impl FnOnce() -> R + Send) -> R {
    match parallel::pool_for(usize::MAX) {
        Some(pool) => pool.join(a, b).1,
        None => {
            a();
            b()
        }
    }
}

/// The first number that is not finite.
fn first_bad<E: Weight>(x: &[E]) -> Option<usize> {
    let all = x.iter().fold(true, |ok, v| ok & v.finite());
    if all { None } else { x.iter().position(|v| !v.finite()) }
}

/// SHA-256 of bytes, in hexadecimal.
pub(super) fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(digest: &[u8]) -> String {
    digest.iter().map(|b| format!("{b:02x}")).collect()
}
