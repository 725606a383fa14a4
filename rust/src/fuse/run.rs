//! The two passes over a model: read, change, hash, write; names are given when all of it is right.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::Instant;

use super::block::{Bad, Delta, Work, block_rows};
use super::output::{Output, Sink};
use super::plan::{self, Layout, Touched};
use super::sidecar::{Record, Sidecar, Writer};
use super::{FuseOptions, FuseReport, FusedTensor, Tick};
use crate::adapter::Adapter;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::format::atomic::Staged;
use crate::format::container::Entry;
use crate::format::json::show;
use crate::format::shards::{Model, Shard};
use crate::format::tensor::factor_dtype;
use crate::kernels::Kernels;

/// Bytes that are copied at once where nothing changes.
const COPY: usize = 1 << 20;

/// Adds `s B A` of every module to the weights of `base`, written to `out`.
///
/// # Errors
/// Modules that do not match exactly one tensor, shapes and dtypes that do not fit, places that would overwrite
/// the base or an older side-car, NaN or infinity in a touched weight or in the sum, the tick's own errors.
/// No file is there then that was not there before.
pub fn fuse(
    base: &Path,
    adapter: &Adapter,
    out: &Path,
    opts: &FuseOptions<'_>,
    tick: &mut Tick<'_>,
) -> Result<FuseReport> {
    let start = Instant::now();
    let k = Kernels::detect()?;
    let model = Model::open(base, "base")?;
    let plan = plan::plan(&model, adapter, opts)?;
    plan::check_places(&model, "base", out, opts.sidecar)?;
    let planned: Vec<Record> = plan.touched.iter().map(|t| record(&model, adapter, t)).collect();
    let mut sidecar = opts.sidecar.map(|path| Writer::new(path, adapter, &planned)).transpose()?;
    let mut pass = Pass::new(&model, out, tick)?;
    pass.report.notes = plan.notes;
    let mut planned = plan.touched.iter().zip(planned).peekable();
    pass.run(&model, |pass, shard, place, entry| {
        let Some((touched, mut record)) = planned.next_if(|(t, _)| t.place == place) else {
            return Ok(false);
        };
        let layer = &adapter.modules[touched.module].1;
        let delta = Delta::new(layer, touched.layout);
        let dtype = dtype_of(entry)?;
        record.lossy = 0;
        let columns = entry.shape[1];
        let mut first = 0;
        while first < entry.shape[0] {
            pass.read_rows(shard, entry, first, record.block_rows)?;
            let done = pass.work.fuse(k, dtype, &delta, first, sidecar.is_some());
            record.lossy += done.map_err(|bad| refuse(bad, entry, first, columns, dtype))?;
            if let Some(sidecar) = &mut sidecar {
                sidecar.write(&mut pass.work.residual)?;
            }
            pass.write_out()?;
            first = first.saturating_add(record.block_rows);
        }
        pass.note_memory(delta.bytes());
        let [original, fused] = pass.work.take_hashes();
        (record.original_sha256, record.fused_sha256) = (original, fused);
        let mut done = described(&record, touched.layout_from);
        done.residual_bytes = sidecar.as_mut().map_or(0, |s| s.end(record));
        pass.touched(entry, done);
        Ok(true)
    })?;
    let (ready, mut report) = pass.finish()?;
    let staged: Option<Staged> = match sidecar {
        None => None,
        Some(writer) => {
            let (bytes, hash) = writer.adapter();
            (report.adapter_bytes, report.adapter_sha256) = (bytes, hash.to_owned());
            let (staged, bytes) = writer.finish()?;
            report.sidecar_bytes = bytes;
            Some(staged)
        }
    };
    // The side-car comes first: a model without one could not be unfused.
    if let Some(staged) = staged {
        staged.commit()?;
    }
    if let Err(e) = ready.commit() {
        if let Some(path) = opts.sidecar {
            let _ = std::fs::remove_file(path);
        }
        return Err(e);
    }
    report.seconds = start.elapsed().as_secs_f64();
    Ok(report)
}

/// Takes the adapter of a side-car off the weights of `fused`, written to `out`, bit for bit.
///
/// # Errors
/// A side-car, adapter or fused tensor whose SHA-256 is not the recorded one, tensors that are missing or of
/// another shape or dtype, places that would overwrite the input, the tick's own errors. No file is there then
/// that was not there before.
pub fn unfuse(fused: &Path, sidecar: &Path, out: &Path, tick: &mut Tick<'_>) -> Result<FuseReport> {
    let start = Instant::now();
    let k = Kernels::detect()?;
    let car = Sidecar::open(sidecar)?;
    let model = Model::open(fused, "fused")?;
    plan::check_places(&model, "fused", out, None)?;
    let modules: HashMap<&str, usize> =
        car.adapter.modules.iter().enumerate().map(|(i, (name, _))| (name.as_str(), i)).collect();
    let jobs = car.records.iter().enumerate().map(|(i, r)| job(&model, &car, &modules, i, r));
    let mut jobs = jobs.collect::<Result<Vec<_>>>()?;
    jobs.sort_by_key(|j| j.place);
    if let Some(twice) = jobs.windows(2).find(|pair| pair[0].place == pair[1].place) {
        let name = &car.records[twice[0].record].tensor;
        return Err(Error::format(car.display(), format!("tensor {}: two records", show(name))));
    }
    if plan::same_place(sidecar, out) {
        let got = show(&out.display().to_string());
        return Err(Error::config("out", got, "another place than sidecar, which is left as it is"));
    }
    let mut pass = Pass::new(&model, out, tick)?;
    let mut jobs = jobs.into_iter().peekable();
    let mut payload = Vec::new();
    pass.run(&model, |pass, shard, place, entry| {
        let Some(job) = jobs.next_if(|j| j.place == place) else { return Ok(false) };
        let record = &car.records[job.record];
        let delta = Delta::new(&car.adapter.modules[job.module].1, job.layout);
        let dtype = dtype_of(entry)?;
        let mut residual = car.residual(job.record);
        let residual_bytes = residual.left();
        let mut first = 0;
        while first < entry.shape[0] {
            pass.read_rows(shard, entry, first, record.block_rows)?;
            let kind = residual.next(pass.work.w.bytes().len(), &mut payload)?;
            let done = pass.work.unfuse(k, dtype, &delta, first, (kind, &payload));
            done.map_err(|e| Error::format(car.display(), e))?;
            pass.write_out()?;
            first = first.saturating_add(record.block_rows);
        }
        pass.note_memory(delta.bytes() + payload.capacity());
        let [original, fused] = pass.work.take_hashes();
        if fused != record.fused_sha256 {
            let reason = format!(
                "tensor {}: SHA-256 is {fused}, but the side-car {} was written for {}: the tensor was changed after \
                 fusing, or the side-car is another model's",
                show(&entry.name),
                car.display(),
                record.fused_sha256
            );
            return Err(Error::format(shard.display(), reason));
        }
        if residual.left() != 0 || original != record.original_sha256 {
            let reason = format!(
                "its residual does not restore tensor {}: SHA-256 is {original}, expected {}",
                show(&entry.name),
                record.original_sha256
            );
            return Err(Error::format(car.display(), reason));
        }
        let done = FusedTensor { residual_bytes, ..described(record, "sidecar") };
        pass.touched(entry, done);
        Ok(true)
    })?;
    let (ready, mut report) = pass.finish()?;
    ready.commit()?;
    report.sidecar_bytes = car.len();
    (report.adapter_bytes, report.adapter_sha256) = (car.adapter_bytes, car.adapter_sha256.clone());
    report.seconds = start.elapsed().as_secs_f64();
    Ok(report)
}

/// One tensor to restore.
struct Job {
    record: usize,
    place: (usize, usize),
    module: usize,
    layout: Layout,
}

/// Checks a record against the fused model and the adapter.
fn job(
    model: &Model,
    car: &Sidecar,
    modules: &HashMap<&str, usize>,
    i: usize,
    record: &Record,
) -> Result<Job> {
    let wrong = |reason: String| Error::format(model.path.display(), reason);
    let broken = |reason: String| Error::format(car.display(), reason);
    let name = show(&record.tensor);
    let place =
        model.find(&record.tensor).ok_or_else(|| wrong(format!("no tensor {name}, which was fused")))?;
    let entry = model.entry(place);
    if entry.shape != record.shape || entry.dtype.to_string() != record.dtype {
        return Err(wrong(format!(
            "tensor {name}: {} {:?}, but {} {:?} was fused",
            entry.dtype, entry.shape, record.dtype, record.shape
        )));
    }
    let module = modules.get(record.module.as_str()).copied();
    let module = module.ok_or_else(|| broken(format!("tensor {name}: its adapter has no such module")))?;
    let layer = &car.adapter.modules[module].1;
    let layout = [Layout::OutIn, Layout::InOut].into_iter().find(|l| l.as_str() == record.layout);
    let layout =
        layout.ok_or_else(|| broken(format!("tensor {name}: unknown layout {}", show(&record.layout))))?;
    let fits = match layout {
        Layout::OutIn => record.shape == [layer.out_features(), layer.in_features()],
        Layout::InOut => record.shape == [layer.in_features(), layer.out_features()],
    };
    if !fits || record.block_rows == 0 || factor_dtype(entry.dtype).is_none() {
        return Err(broken(format!("tensor {name}: its record does not fit the adapter")));
    }
    Ok(Job { record: i, place, module, layout })
}

fn record(model: &Model, adapter: &Adapter, t: &Touched) -> Record {
    let entry = model.entry(t.place);
    Record {
        tensor: entry.name.clone(),
        module: adapter.modules[t.module].0.clone(),
        dtype: entry.dtype.to_string(),
        shape: entry.shape.clone(),
        layout: t.layout.as_str().to_owned(),
        block_rows: block_rows(entry.shape[1], entry.dtype.bitsize() / 8),
        lossy: 0,
        original_sha256: String::new(),
        fused_sha256: String::new(),
    }
}

fn described(r: &Record, layout_from: &str) -> FusedTensor {
    FusedTensor {
        tensor: r.tensor.clone(),
        module: r.module.clone(),
        dtype: r.dtype.clone(),
        shape: r.shape.clone(),
        layout: r.layout.clone(),
        layout_from: layout_from.to_owned(),
        residual_bytes: 0,
        lossy: r.lossy,
    }
}

fn dtype_of(entry: &Entry) -> Result<Dtype> {
    factor_dtype(entry.dtype).ok_or_else(|| Error::Dtype {
        arg: entry.name.clone(),
        got: entry.dtype.to_string(),
        want: "F32, F16 or BF16".into(),
    })
}

fn refuse(bad: Bad, entry: &Entry, first: usize, columns: usize, dtype: Dtype) -> Error {
    let at = |i: usize| format!("[{}, {}]", first + i / columns, i % columns);
    let (arg, detail) = match bad {
        Bad::Base(i) => (format!("base tensor {}", entry.name), format!(" at {}", at(i))),
        Bad::Sum(i) => {
            let detail = format!(" at {}: the sum is beyond the range of {dtype}", at(i));
            (format!("fused tensor {}", entry.name), detail)
        }
    };
    Error::NonFinite { arg, detail }
}

/// One pass over all files of a model.
struct Pass<'a, 'b> {
    tick: &'a mut Tick<'b>,
    output: Output,
    sink: Option<Sink>,
    work: Work,
    report: FuseReport,
    done: usize,
    total: usize,
    staged: Option<Staged>,
    heads: usize,
}

impl<'a, 'b> Pass<'a, 'b> {
    fn new(model: &Model, out: &Path, tick: &'a mut Tick<'b>) -> Result<Self> {
        let others = model.others.iter().map(|(_, p)| p.metadata().map_or(0, |m| m.len() as usize));
        let total = model.bytes() + others.sum::<usize>();
        tick(0, total)?;
        let report = FuseReport { model_bytes: model.bytes(), ..FuseReport::default() };
        let output = Output::new(out, model.is_dir)?;
        let heads = model.shards.iter().map(|s| s.head.len()).sum();
        let (sink, staged, work) = (None, None, Work::default());
        Ok(Pass { tick, output, sink, work, report, done: 0, total, staged, heads })
    }

    /// Goes through all tensors in the order of their bytes; those that `change` leaves alone are copied.
    fn run(
        &mut self,
        model: &Model,
        mut change: impl FnMut(&mut Self, &Shard, (usize, usize), &Entry) -> Result<bool>,
    ) -> Result<()> {
        for (s, shard) in model.shards.iter().enumerate() {
            self.sink = Some(self.output.start(&shard.name)?);
            self.write(&shard.head)?;
            for (e, entry) in shard.entries.iter().enumerate() {
                if !change(self, shard, (s, e), entry)? {
                    self.copy(shard, entry)?;
                }
            }
            self.end_file()?;
        }
        for (name, path) in &model.others {
            self.sink = Some(self.output.start(name)?);
            self.copy_file(path)?;
            self.end_file()?;
        }
        if !model.left_out.is_empty() {
            let names = crate::format::json::show_list(&model.left_out);
            self.report.notes.push(format!("not taken along (folders, weights in other files): {names}"));
        }
        Ok(())
    }

    fn end_file(&mut self) -> Result<()> {
        if let Some(sink) = self.sink.take() {
            self.staged = sink.finish()?.or(self.staged.take());
        }
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        if let Some(sink) = &mut self.sink {
            sink.write(bytes)?;
        }
        self.done += bytes.len();
        (self.tick)(self.done.min(self.total), self.total)
    }

    /// Writes the block that was made.
    fn write_out(&mut self) -> Result<()> {
        let out = std::mem::take(&mut self.work.out);
        let written = self.write(out.bytes());
        self.work.out = out;
        written
    }

    fn read_rows(&mut self, shard: &Shard, entry: &Entry, first: usize, rows: usize) -> Result<()> {
        let row = entry.span.len() / entry.shape[0];
        let n = rows.min(entry.shape[0] - first) * row;
        self.work.w.resize(n);
        shard.read(entry.span.start + first * row, self.work.w.bytes_mut())
    }

    fn copy(&mut self, shard: &Shard, entry: &Entry) -> Result<()> {
        for at in entry.span.clone().step_by(COPY) {
            self.work.out.resize(COPY.min(entry.span.end - at));
            shard.read(at, self.work.out.bytes_mut())?;
            self.write_out()?;
        }
        Ok(())
    }

    fn copy_file(&mut self, path: &Path) -> Result<()> {
        let at = |e| Error::io(path, e);
        let mut from = File::open(path).map_err(at)?;
        loop {
            self.work.out.resize(COPY);
            let n = from.read(self.work.out.bytes_mut()).map_err(at)?;
            if n == 0 {
                return Ok(());
            }
            self.work.out.resize(n);
            self.write_out()?;
        }
    }

    fn note_memory(&mut self, factors: usize) {
        let now = self.heads + factors + self.work.memory();
        self.report.peak_bytes = self.report.peak_bytes.max(now);
    }

    fn touched(&mut self, entry: &Entry, done: FusedTensor) {
        self.report.touched_bytes += entry.span.len();
        self.report.tensors.push(done);
    }

    /// A last look at the token, then only names are missing.
    fn finish(mut self) -> Result<(super::output::Ready, FuseReport)> {
        self.note_memory(0);
        (self.tick)(self.total, self.total)?;
        Ok((self.output.finish(self.staged)?, self.report))
    }
}
