//! Patterns: bounded online clusters of the directions of inputs.

use std::fmt;

use crate::error::{Error, Result};
use crate::kernels::{GROUP, Geometry, Kernels, TILE};

/// Bounded clusters of unit directions, found while events come.
///
/// A centroid is the mean of its members' directions. An input joins the nearest centroid by cosine; under the
/// threshold it starts one of its own. When there is no room the two nearest of all, the newcomer among them,
/// become one (a leader clustering that merges, after Hartigan, *Clustering Algorithms*, 1975).
#[derive(Clone)]
pub struct PatternBank {
    k: &'static Kernels,
    pub(super) capacity: usize,
    pub(super) threshold: f32,
    pub(super) width: usize,
    /// Means of unit directions, as a factor of `len` rows and zeros up to whole groups.
    rows: Vec<f32>,
    /// `1 / |centroid|`, 0 where a centroid has no direction.
    inverse: Vec<f32>,
    pub(super) counts: Vec<u64>,
    /// Members of known quality, and the sum of their qualities.
    pub(super) rated: Vec<u64>,
    pub(super) quality: Vec<f64>,
    merged: Option<(usize, usize)>,
    /// Cosines between centroids, `(capacity, capacity)`, and the rows that have moved since.
    cosines: Vec<f32>,
    stale: Vec<bool>,
    products: Vec<f32>,
    pairs: Vec<f32>,
}

impl fmt::Debug for PatternBank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PatternBank({} of {}, width {})", self.len(), self.capacity, self.width)
    }
}

impl PatternBank {
    /// An empty bank of at most `capacity` patterns of inputs `(width,)`; inputs within a cosine of `threshold`
    /// belong together.
    ///
    /// # Errors
    /// No capacity or above 1,024, no width, a threshold outside [-1, 1].
    pub fn new(capacity: usize, threshold: f32, width: usize) -> Result<Self> {
        if !(1..=1024).contains(&capacity) {
            return Err(Error::config("patterns", capacity, "1 to 1024"));
        }
        if !(-1.0..=1.0).contains(&threshold) {
            return Err(Error::config("pattern_threshold", threshold, "a cosine in [-1, 1]"));
        }
        if width == 0 {
            return Err(Error::config("width", width, "at least 1"));
        }
        Ok(PatternBank {
            k: Kernels::detect()?,
            capacity,
            threshold,
            width,
            rows: Vec::new(),
            inverse: Vec::new(),
            counts: Vec::new(),
            rated: Vec::new(),
            quality: Vec::new(),
            merged: None,
            cosines: Vec::new(),
            stale: Vec::new(),
            products: Vec::new(),
            pairs: Vec::new(),
        })
    }

    /// Patterns found.
    pub fn len(&self) -> usize {
        self.counts.len()
    }

    /// True before the first input.
    pub fn is_empty(&self) -> bool {
        self.counts.is_empty()
    }

    /// Width of inputs.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Most patterns.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Least cosine of a member at its coming.
    pub fn threshold(&self) -> f32 {
        self.threshold
    }

    /// Means of the members' directions, `(len, width)`; shorter than 1 as far as members differ.
    pub fn centroids(&self) -> Vec<f32> {
        (0..self.len()).flat_map(|i| self.centroid(i)).collect()
    }

    /// Mean of one pattern's members' directions, `(width,)`.
    ///
    /// # Panics
    /// `i` not under [`PatternBank::len`].
    pub fn centroid(&self, i: usize) -> Vec<f32> {
        assert!(i < self.len(), "pattern {i} of {}", self.len());
        let mut row: Vec<f32> = self.tiles(i).flat_map(|at| &self.rows[at]).copied().collect();
        row.truncate(self.width);
        row
    }

    /// Members of each pattern.
    pub fn counts(&self) -> &[u64] {
        &self.counts
    }

    /// Mean quality of each pattern's members of known quality; `None` where none is known.
    pub fn qualities(&self) -> Vec<Option<f64>> {
        let mean = |(&n, &sum): (&u64, &f64)| (n > 0).then(|| sum / n as f64);
        self.rated.iter().zip(&self.quality).map(mean).collect()
    }

    /// `(from, into)` when the last [`PatternBank::observe`] gave the members of `from` to `into`, and the number
    /// `from` to the newcomer.
    pub fn merged(&self) -> Option<(usize, usize)> {
        self.merged
    }

    /// Whole groups only, so that a new pattern moves no other.
    fn geometry(&self) -> Geometry {
        Geometry { rank: self.len().next_multiple_of(GROUP), len: self.width }
    }

    /// Where the tiles of a row lie.
    fn tiles(&self, i: usize) -> impl Iterator<Item = std::ops::Range<usize>> + use<> {
        let g = self.geometry();
        (0..g.tiles()).map(move |t| g.at(i, t)).map(|at| at..at + TILE)
    }

    /// `row = keep row + add x`.
    fn blend(&mut self, i: usize, keep: f32, x: &[f32], add: f32) {
        for (at, x) in self.tiles(i).zip(x.chunks(TILE)) {
            self.rows[at].iter_mut().zip(x).for_each(|(c, x)| *c = keep * *c + add * x);
        }
    }

    /// `<centroid, x>` of every pattern and of the zeros after them.
    fn products(&self, k: &Kernels, x: &[f32], mut out: Vec<f32>) -> Vec<f32> {
        let g = self.geometry();
        out.resize(g.rank, 0.0);
        if g.rank > 0 {
            k.dots(&self.rows, g, x, &mut out);
        }
        out
    }

    fn inverse_norm(&self, x: &[f32]) -> f32 {
        let norm2 = self.k.dot(x, x);
        if norm2.is_normal() {
            return 1.0 / norm2.sqrt();
        }
        let norm2: f64 = x.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
        if norm2 > 0.0 { (1.0 / norm2.sqrt()).min(f64::from(f32::MAX)) as f32 } else { 0.0 }
    }

    /// The nearest pattern and its cosine; `None` for an empty bank or an input of zeros.
    ///
    /// # Panics
    /// An input of another width.
    pub fn assign(&self, x: &[f32]) -> Option<(usize, f32)> {
        assert_eq!(x.len(), self.width, "input of a pattern bank");
        let inv = self.inverse_norm(x);
        if inv == 0.0 { None } else { self.nearest(&self.products(self.k, x, Vec::new()), inv) }
    }

    fn nearest(&self, products: &[f32], inv: f32) -> Option<(usize, f32)> {
        let cosines = products.iter().zip(&self.inverse).map(|(p, i)| p * inv * i);
        cosines.enumerate().reduce(|a, b| if b.1 > a.1 { b } else { a })
    }

    /// Counts an input, and moves or makes the pattern that it belongs to; returns that pattern, `None` for an
    /// input of zeros, which has no direction.
    ///
    /// # Panics
    /// An input of another width.
    pub fn observe(&mut self, x: &[f32], quality: Option<f32>) -> Option<usize> {
        assert_eq!(x.len(), self.width, "input of a pattern bank");
        self.merged = None;
        let inv = self.inverse_norm(x);
        if inv == 0.0 {
            return None;
        }
        let scratch = std::mem::take(&mut self.products);
        self.products = self.products(self.k, x, scratch);
        let at = match self.nearest(&self.products, inv) {
            Some((i, c)) if c >= self.threshold => self.join(i, x, inv),
            _ if self.len() < self.capacity => self.start(x, inv),
            Some((i, c)) => match self.closest_pair() {
                Some((into, from, between)) if between > c => {
                    self.merge(from, into);
                    self.replace(from, x, inv)
                }
                _ => self.join(i, x, inv),
            },
            None => unreachable!("a full bank has a nearest pattern"),
        };
        if let Some(q) = quality {
            self.rated[at] += 1;
            self.quality[at] += f64::from(q);
        }
        Some(at)
    }

    /// `c += (x / |x| - c) / n`, the running mean.
    fn join(&mut self, i: usize, x: &[f32], inv: f32) -> usize {
        self.counts[i] += 1;
        let step = (1.0 / self.counts[i] as f64) as f32;
        self.blend(i, 1.0 - step, x, step * inv);
        self.moved(i);
        i
    }

    fn start(&mut self, x: &[f32], inv: f32) -> usize {
        self.counts.push(0);
        self.rated.push(0);
        self.quality.push(0.0);
        self.inverse.push(0.0);
        self.stale.push(true);
        self.rows.resize(self.geometry().stored(), 0.0);
        self.replace(self.len() - 1, x, inv)
    }

    fn replace(&mut self, i: usize, x: &[f32], inv: f32) -> usize {
        self.blend(i, 0.0, x, inv);
        (self.counts[i], self.rated[i], self.quality[i]) = (1, 0, 0.0);
        self.moved(i);
        i
    }

    fn merge(&mut self, from: usize, into: usize) {
        let all = self.counts[from] + self.counts[into];
        let share = (self.counts[from] as f64 / all as f64) as f32;
        let gone = self.centroid(from);
        self.blend(into, 1.0 - share, &gone, share);
        self.counts[into] = all;
        self.rated[into] += self.rated[from];
        self.quality[into] += self.quality[from];
        self.moved(into);
        self.merged = Some((from, into));
    }

    fn moved(&mut self, i: usize) {
        let mut lanes = [0f32; TILE];
        for at in self.tiles(i) {
            lanes.iter_mut().zip(&self.rows[at]).for_each(|(l, v)| *l += v * v);
        }
        let norm2: f32 = lanes.iter().sum();
        self.inverse[i] = if norm2 > 0.0 { 1.0 / norm2.sqrt() } else { 0.0 };
        self.stale[i] = true;
    }

    /// Puts centroids `(len, width)` in, as many as there are counts.
    pub(super) fn put(&mut self, centroids: &[f32]) {
        self.inverse = vec![0.0; self.len()];
        self.stale = vec![true; self.len()];
        self.rows = vec![0.0; self.geometry().stored()];
        for (i, c) in centroids.chunks_exact(self.width).enumerate() {
            for (at, c) in self.tiles(i).zip(c.chunks(TILE)) {
                self.rows[at][..c.len()].copy_from_slice(c);
            }
            self.moved(i);
        }
    }

    /// The two nearest patterns, the larger first, and their cosine.
    fn closest_pair(&mut self) -> Option<(usize, usize, f32)> {
        let n = self.len();
        self.cosines.resize(self.capacity * self.capacity, 0.0);
        let mut products = std::mem::take(&mut self.pairs);
        for i in (0..n).filter(|&i| self.stale[i]) {
            products = self.products(self.k, &self.centroid(i), products);
            for j in (0..n).filter(|&j| j != i) {
                let c = products[j] * (self.inverse[i] * self.inverse[j]);
                self.cosines[i * self.capacity + j] = c;
                self.cosines[j * self.capacity + i] = c;
            }
        }
        self.pairs = products;
        self.stale.fill(false);
        let mut best: Option<(usize, usize, f32)> = None;
        for i in 0..n {
            for j in i + 1..n {
                let c = self.cosines[i * self.capacity + j];
                if best.is_none_or(|(.., b)| c > b) {
                    best = Some((i, j, c));
                }
            }
        }
        best.map(|(i, j, c)| if self.counts[j] > self.counts[i] { (j, i, c) } else { (i, j, c) })
    }

    /// Mixing weights of an input over the patterns, `(len,)`: softmax of the cosines over the temperature, or 1
    /// for the nearest and 0 elsewhere. An input of zeros weighs all alike, or the first.
    ///
    /// # Panics
    /// An input of another width, or `out` of another length than [`PatternBank::len`].
    pub fn weights(&self, k: &Kernels, x: &[f32], temperature: f32, hard: bool, out: &mut [f32]) {
        assert_eq!(x.len(), self.width, "input of a pattern bank");
        assert_eq!(out.len(), self.len(), "weights of a pattern bank");
        let inv = self.inverse_norm(x);
        let products = self.products(k, x, Vec::new());
        for (i, w) in out.iter_mut().enumerate() {
            *w = products[i] * inv * self.inverse[i];
        }
        let Some((nearest, top)) = self.nearest(&products, inv) else { return };
        if hard {
            out.fill(0.0);
            out[nearest] = 1.0;
            return;
        }
        out.iter_mut().for_each(|w| *w = ((*w - top) / temperature).exp());
        let total: f32 = out.iter().sum();
        k.scale(1.0 / total, out);
    }

    /// Bytes resident, all of it.
    pub fn memory_bytes(&self) -> usize {
        let floats = [&self.rows, &self.inverse, &self.cosines, &self.products, &self.pairs];
        let floats: usize = floats.iter().map(|v| v.capacity()).sum();
        let words = self.counts.capacity() + self.rated.capacity() + self.quality.capacity();
        size_of::<Self>() + 4 * floats + 8 * words + self.stale.capacity()
    }
}
