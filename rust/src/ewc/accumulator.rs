//! Squares of per-sample gradients, summed over a batch, averaged over a task.
//!
//! A sample's gradient is an outer product, so its squares are one too: `(dL/dA)^2 = (w^2)^T x^2` and
//! `(dL/dB)^2 = (u^2)^T g^2`. Squaring the rows and then multiplying costs one backward; squaring the mean
//! gradient of a batch would cost the same and be something else.

use super::Statistic;
use super::buffer::Buffer;
use super::state::{Reader, Writer};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::factor::Factor;
use crate::kernels::{Geometry, Kernels};
use crate::layer::Layer;
use crate::learn::Samples;

/// Rows of single events that wait, and rows that are worked on at a time.
pub(crate) const ROWS: usize = 32;
/// Products of sums of squares beyond this would leave f32 somewhere on the way.
const LIMIT: f64 = 1e36;

/// Refuses rows that are not finite or cannot be squared in f32.
pub(crate) fn check(k: &Kernels, s: &Samples<'_>) -> Result<()> {
    let [x, g, u, w] = [s.x, s.g, s.u, s.w].map(|v| f64::from(k.dot(v, v)));
    for (arg, sum, v) in [("x", x, s.x), ("gradient", g, s.g)] {
        if !sum.is_finite() && !k.all_finite(v) {
            return Err(Error::non_finite(arg));
        }
    }
    // `!(a <= b)` also refuses NaN.
    if !(x <= LIMIT && g <= LIMIT && x * w <= LIMIT && u * g <= LIMIT) {
        let detail = ": the squares of its gradient would overflow float32".into();
        return Err(Error::NonFinite { arg: "gradient".into(), detail });
    }
    Ok(())
}

/// Widths of a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Dims {
    pub rank: usize,
    pub n_in: usize,
    pub n_out: usize,
}

impl Dims {
    pub fn of(layer: &Layer) -> Self {
        Dims { rank: layer.rank(), n_in: layer.in_features(), n_out: layer.out_features() }
    }

    /// Zeros in the layout of A and of B.
    pub fn pair(self) -> [Factor; 2] {
        [self.n_in, self.n_out].map(|len| Factor::zeros(self.rank, len, Dtype::F32))
    }

    fn row(self) -> usize {
        self.n_in + self.n_out + 2 * self.rank
    }
}

/// Means over the samples of one task.
#[derive(Debug)]
pub(crate) struct Accumulator {
    pub dims: Dims,
    statistic: Statistic,
    decay: Option<f64>,
    cap: u64,
    /// Sums of the open batch, in the layouts of A and B; only where the kind needs them.
    open: Option<[Factor; 2]>,
    /// Column sums of x^2 and g^2 of the open batch.
    columns: [Factor; 2],
    /// Rows of the open batch over all its passes, and how many of them were taken.
    batch: Option<(usize, usize)>,
    /// Running means of the task.
    fisher: Option<[Factor; 2]>,
    /// Running means of x^2 and g^2.
    moments: [Vec<f64>; 2],
    /// Samples in the means, those of them since the task began, and closed batches.
    n: u64,
    task_n: u64,
    steps: u64,
    buffer: Option<Box<Buffer>>,
    /// An event with more rows than the buffer holds, until it is committed.
    large: Option<Box<Buffer>>,
    staged: usize,
    /// Means of x^2 and g^2 over the earlier tasks, and their samples.
    past: [Vec<f64>; 2],
    past_n: u64,
}

impl Accumulator {
    pub fn new(dims: Dims, statistic: Statistic, decay: Option<f64>, cap: Option<u64>) -> Self {
        let factors = || statistic.needs_factors().then(|| dims.pair());
        let zeros = || [vec![0.0; dims.n_in], vec![0.0; dims.n_out]];
        Accumulator {
            dims,
            statistic,
            decay,
            cap: cap.unwrap_or(u64::MAX),
            open: factors(),
            columns: [dims.n_in, dims.n_out].map(|len| Factor::zeros(1, len, Dtype::F32)),
            batch: None,
            fisher: factors(),
            moments: zeros(),
            n: 0,
            task_n: 0,
            steps: 0,
            buffer: None,
            large: None,
            staged: 0,
            past: zeros(),
            past_n: 0,
        }
    }

    /// Samples counted since the task began, those in the buffer among them.
    pub fn count(&self) -> u64 {
        self.task_n + self.buffer.as_ref().map_or(0, |b| u64::from(b.samples))
    }

    /// Whether the task has all the samples that it may have.
    pub fn is_full(&self) -> bool {
        self.count() >= self.cap
    }

    /// Whether a batch is open that nobody has closed yet.
    pub fn is_open(&self) -> bool {
        self.batch.is_some()
    }

    fn need_closed(&self) -> Result<()> {
        if !self.is_open() {
            return Ok(());
        }
        Err(Error::config("batch", "an open one", "seen(n) or discard() after observe"))
    }

    // -- batches --

    /// Adds rows to the open batch; [`Accumulator::close`] tells how many samples they were.
    pub fn observe(&mut self, k: &Kernels, s: &Samples<'_>) -> Result<()> {
        let Dims { rank, n_in, n_out } = self.dims;
        let rows = s.x.len() / n_in;
        for (arg, got, width) in
            [("x", s.x, n_in), ("gradient", s.g, n_out), ("u", s.u, rank), ("w", s.w, rank)]
        {
            if rows == 0 || got.len() != rows * width {
                let got = format!("{} numbers", got.len());
                return Err(Error::shape(arg, got, format!("({}, {width})", rows.max(1))));
            }
        }
        check(k, s)?;
        if self.batch.is_none() {
            self.flush(k);
        }
        let take = rows.min(usize::try_from(self.cap.saturating_sub(self.task_n)).unwrap_or(usize::MAX));
        let (all, taken) = self.batch.unwrap_or_default();
        self.batch = Some((all + rows, taken + take));
        let mut buffer = Buffer::new(self.dims, take.min(ROWS));
        for from in (0..take).step_by(ROWS) {
            let m = ROWS.min(take - from);
            for i in 0..m {
                let at = from + i;
                let row = Samples {
                    x: &s.x[at * n_in..][..n_in],
                    g: &s.g[at * n_out..][..n_out],
                    u: &s.u[at * rank..][..rank],
                    w: &s.w[at * rank..][..rank],
                };
                buffer.put(k, self.dims, self.statistic, i, &row);
            }
            self.add(k, &buffer, m, &[1.0; ROWS], &[1.0; ROWS]);
        }
        Ok(())
    }

    /// Whether the open batch, if there is one, can be of `n` samples.
    pub fn check_close(&self, n: usize) -> Result<()> {
        match self.batch {
            Some((rows, _)) if n == 0 || rows % n != 0 => {
                Err(Error::config("n", n, format!("the samples of an open batch of {rows} rows")))
            }
            _ => Ok(()),
        }
    }

    /// Closes the open batch of `n` samples; returns how many were counted, or `None` without one. Every
    /// sample may have several rows of gradients, and its x counts once.
    pub fn close(&mut self, n: usize) -> Option<u64> {
        let (rows, taken) = self.batch.take()?;
        let passes = rows / n;
        let taken = taken / passes;
        if taken == 0 {
            return Some(0);
        }
        if passes > 1 {
            self.columns[0].stream_mut().iter_mut().for_each(|v| *v /= passes as f32);
        }
        let total = (self.n + taken as u64) as f64;
        let (keep, add) = match self.decay {
            Some(d) => (1.0 - d, (1.0 - d) / taken as f64),
            None => (taken as f64 / total, 1.0 / total),
        };
        self.fold(keep, add);
        self.n += taken as u64;
        self.task_n += taken as u64;
        self.steps += 1;
        Some(taken as u64)
    }

    /// Drops the open batch.
    pub fn discard(&mut self) {
        self.staged = 0;
        self.large = None;
        if self.batch.take().is_some() {
            self.clear_open();
        }
    }

    fn clear_open(&mut self) {
        for f in self.columns.iter_mut().chain(self.open.iter_mut().flatten()) {
            f.stream_mut().fill(0.0);
        }
    }

    /// Adds `m` rows of a buffer to the open sums.
    fn add(&mut self, k: &Kernels, b: &Buffer, m: usize, fresh: &[f32], weight: &[f32]) {
        let Dims { rank, n_in, n_out } = self.dims;
        let (x, g) = (&b.x[..m * n_in], &b.g[..m * n_out]);
        if let Some([fa, fb]) = &mut self.open {
            fa.outer_batch(k, &b.w[..m * rank], x);
            fb.outer_batch(k, &b.u[..m * rank], g);
        }
        let mut column = |i: usize, coef: &[f32], rows: &[f32]| {
            let geometry = Geometry { rank: 1, len: self.columns[i].len() };
            k.outer_batch(self.columns[i].stream_mut(), geometry, coef, rows);
        };
        if self.statistic == Statistic::Magnitudes {
            let square = |v: &[f32]| v.iter().map(|v| v * v).collect::<Vec<_>>();
            column(0, &fresh[..m], &square(x));
            column(1, &weight[..m], &square(g));
        } else {
            column(0, &fresh[..m], x);
            column(1, &weight[..m], g);
        }
    }

    /// `mean += add * open - keep * mean`, and empties the open sums.
    fn fold(&mut self, keep: f64, add: f64) {
        if let (Some(means), Some(open)) = (&mut self.fisher, &mut self.open) {
            for (f, o) in means.iter_mut().zip(open) {
                let (keep, add) = (keep as f32, add as f32);
                for (f, o) in f.stream_mut().iter_mut().zip(o.stream_mut()) {
                    *f += add * *o - keep * *f;
                    *o = 0.0;
                }
            }
        }
        for (mean, sum) in self.moments.iter_mut().zip(&mut self.columns) {
            for (mean, sum) in mean.iter_mut().zip(sum.stream_mut()) {
                *mean += add * f64::from(*sum) - keep * *mean;
                *sum = 0.0;
            }
        }
    }

    // -- single events --

    /// Puts one event's rows (all of one sample) where [`Accumulator::commit`] will count them.
    pub fn stage(&mut self, k: &Kernels, rows: &[Samples<'_>]) -> Result<()> {
        self.need_closed()?;
        for row in rows {
            check(k, row)?;
        }
        let dims = self.dims;
        if rows.len() > ROWS {
            self.large = Some(Box::new(Buffer::new(dims, rows.len())));
        } else if self.buffer.as_ref().is_some_and(|b| b.rows + rows.len() > ROWS) {
            self.flush(k);
        }
        let buffer = match &mut self.large {
            Some(large) => large,
            None => self.buffer.get_or_insert_with(|| Box::new(Buffer::new(dims, ROWS))),
        };
        for (i, row) in rows.iter().enumerate() {
            let at = buffer.rows + i;
            buffer.put(k, dims, self.statistic, at, row);
            buffer.owner[at] = buffer.samples;
        }
        self.staged = rows.len();
        Ok(())
    }

    /// Counts the staged event.
    pub fn commit(&mut self, k: &Kernels) {
        let staged = std::mem::take(&mut self.staged);
        if let Some(mut large) = self.large.take() {
            self.flush(k);
            (large.rows, large.samples) = (staged, 1);
            self.take_in(k, &large);
        } else if let Some(buffer) = self.buffer.as_mut().filter(|_| staged > 0) {
            buffer.rows += staged;
            buffer.samples += 1;
        }
    }

    /// Brings the waiting events into the means. Whoever reads them calls this first.
    pub fn flush(&mut self, k: &Kernels) {
        let Some(mut buffer) = self.buffer.take() else { return };
        if buffer.samples > 0 {
            self.take_in(k, &buffer);
            (buffer.rows, buffer.samples) = (0, 0);
        }
        self.buffer = Some(buffer);
    }

    fn take_in(&mut self, k: &Kernels, b: &Buffer) {
        let m = b.samples;
        let begins = |i: usize| i == 0 || b.owner[i - 1] != b.owner[i];
        // Each event is a batch of its own for a moving average: the later, the heavier.
        let weight = |i: usize| match self.decay {
            Some(d) => ((1.0 - d) * d.powi((m - 1 - b.owner[i]) as i32)) as f32,
            None => 1.0,
        };
        let weights: Vec<f32> = (0..b.rows).map(weight).collect();
        let fresh: Vec<f32> = (0..b.rows).map(|i| if begins(i) { weights[i] } else { 0.0 }).collect();
        let rank = self.dims.rank;
        if self.decay.is_some() {
            let scaled = |v: &[f32]| {
                let rows = v[..b.rows * rank].chunks_exact(rank).zip(&weights);
                rows.flat_map(|(row, &c)| row.iter().map(move |v| v * c)).collect::<Vec<_>>()
            };
            let (u, w) = (scaled(&b.u), scaled(&b.w));
            let view = Buffer { u, w, x: b.x.clone(), g: b.g.clone(), owner: Vec::new(), ..*b };
            self.add(k, &view, b.rows, &fresh, &weights);
        } else {
            self.add(k, b, b.rows, &fresh, &weights);
        }
        let (m, total) = (f64::from(m), (self.n + u64::from(m)) as f64);
        match self.decay {
            Some(d) => self.fold(1.0 - d.powf(m), 1.0),
            None => self.fold(m / total, 1.0 / total),
        }
        self.n += u64::from(b.samples);
        self.task_n += u64::from(b.samples);
        self.steps += u64::from(b.samples);
    }

    // -- reading --

    /// What a mean is multiplied by: 1, or the correction of a moving average that began at 0.
    fn correction(&self) -> f64 {
        self.decay.map_or(1.0, |d| 1.0 / (1.0 - d.powf(self.steps as f64)))
    }

    /// The task's means of squares in the layouts of A and B; `None` before the first sample.
    pub fn fisher(&self) -> Option<[Factor; 2]> {
        let mut means = self.fisher.clone().filter(|_| self.n > 0)?;
        let c = self.correction() as f32;
        if c != 1.0 {
            means.iter_mut().for_each(|f| f.stream_mut().iter_mut().for_each(|v| *v *= c));
        }
        Some(means)
    }

    /// The task's means of x^2 and g^2; `None` before the first sample.
    pub fn moments(&self) -> Option<[Vec<f64>; 2]> {
        let c = self.correction();
        (self.n > 0).then(|| self.moments.clone().map(|m| m.into_iter().map(|v| v * c).collect()))
    }

    /// Means of x^2 and g^2 over all samples so far, and how many they are.
    pub fn all_moments(&self) -> ([Vec<f64>; 2], u64) {
        let total = self.past_n + self.n;
        let Some(mut now) = self.moments() else { return (self.past.clone(), total) };
        if self.past_n > 0 {
            let share = self.n as f64 / total as f64;
            for (now, past) in now.iter_mut().zip(&self.past) {
                now.iter_mut().zip(past).for_each(|(v, p)| *v = p + share * (*v - p));
            }
        }
        (now, total)
    }

    /// Begins the next task; a moving average goes on.
    pub fn next_task(&mut self) {
        self.task_n = 0;
        if self.decay.is_some() {
            return;
        }
        (self.past, self.past_n) = self.all_moments();
        for f in self.fisher.iter_mut().flatten() {
            f.stream_mut().fill(0.0);
        }
        for m in &mut self.moments {
            m.fill(0.0);
        }
        (self.n, self.steps) = (0, 0);
    }

    pub fn memory_bytes(&self) -> usize {
        let factors = |p: &Option<[Factor; 2]>| p.iter().flatten().map(Factor::memory_bytes).sum::<usize>();
        let means = 2 * 8 * (self.dims.n_in + self.dims.n_out);
        let columns: usize = self.columns.iter().map(Factor::memory_bytes).sum();
        let buffer = self.buffer.as_ref().map_or(0, |_| ROWS * (4 * self.dims.row() + 4));
        factors(&self.open) + factors(&self.fisher) + columns + means + buffer
    }

    // -- state --

    /// Tensors of the task's means and of an open batch. The buffer must be flushed.
    pub fn save(&self, out: &mut Writer) {
        let open = self.batch.map_or([0.0; 2], |(rows, taken)| [rows, taken].map(|v| v as f64));
        let means = [self.n, self.task_n, self.steps, self.past_n].map(|v| v as f64);
        let counts = [&means[..], &open[..]].concat();
        out.f64s("counts", &counts);
        for (i, side) in ["a", "b"].into_iter().enumerate() {
            if let Some(f) = &self.fisher {
                out.factor(&format!("fisher_{side}"), &f[i]);
            }
            if let Some(f) = self.open.as_ref().filter(|_| self.is_open()) {
                out.factor(&format!("open_{side}"), &f[i]);
            }
        }
        for (i, side) in ["x", "g"].into_iter().enumerate() {
            out.f64s(&format!("moment_{side}"), &self.moments[i]);
            out.f64s(&format!("past_{side}"), &self.past[i]);
            if self.is_open() {
                out.factor(&format!("sum_{side}"), &self.columns[i]);
            }
        }
    }

    /// Takes what [`Accumulator::save`] wrote.
    pub fn load(&mut self, from: &mut Reader<'_>) -> Result<()> {
        let counts = from.f64s("counts", 6)?;
        let bad = counts.iter().any(|v| !(*v >= 0.0 && *v <= 2f64.powi(53) && v.fract() == 0.0));
        if bad {
            return Err(from.wrong("counts", "not whole numbers"));
        }
        let count = |i: usize| counts[i] as u64;
        (self.n, self.task_n, self.steps, self.past_n) = (count(0), count(1), count(2), count(3));
        self.batch = (count(4) > 0).then(|| (count(4) as usize, count(5) as usize));
        let Dims { rank, n_in, n_out } = self.dims;
        for (i, (side, len)) in [("a", n_in), ("b", n_out)].into_iter().enumerate() {
            if let Some(f) = &mut self.fisher {
                f[i] = from.factor(&format!("fisher_{side}"), rank, len)?;
            }
            if let Some(f) = self.open.as_mut().filter(|_| self.batch.is_some()) {
                f[i] = from.factor(&format!("open_{side}"), rank, len)?;
            }
        }
        for (i, (side, len)) in [("x", n_in), ("g", n_out)].into_iter().enumerate() {
            self.moments[i] = from.f64s(&format!("moment_{side}"), len)?;
            self.past[i] = from.f64s(&format!("past_{side}"), len)?;
            if self.batch.is_some() {
                self.columns[i] = from.factor(&format!("sum_{side}"), 1, len)?;
            }
        }
        Ok(())
    }
}
