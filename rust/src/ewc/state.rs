//! A consolidation as safetensors bytes, bit for bit: units, settings, means, anchors, open sums.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};

use super::{Anchors, Ewc, EwcSettings, Fisher, Normalize, Step};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::factor::Factor;
use crate::format::json::show;
use crate::format::tensor::Bytes;
use crate::format::{Tensor, TensorDtype, container};
use crate::kernels::Kernels;
use crate::rng::{Rng, RngState};

/// The header's `format`.
const FORMAT: &str = "microlora-ewc";
/// The header's `format_version`; a newer one is refused.
const VERSION: u32 = 1;
/// What the numbers are means of.
const UNIT: &str = "per_sample_mean";
/// Tensors that travel along and mean nothing to the core.
const EXTRA: &str = "extra.";
/// Tensors of a module: this, its name, a slash, what.
const MODULE: &str = "module.";
const FILE: &str = "ewc state";

/// Settings as the file has them.
#[derive(Serialize, Deserialize)]
struct SettingsJson {
    kind: String,
    #[serde(rename = "ewc_lambda")]
    lambda: f64,
    gamma: f64,
    fisher: Fisher,
    fisher_normalize: Normalize,
    fisher_decay: Option<f64>,
    step: Step,
    anchors: Anchors,
    fisher_samples: Option<u64>,
    seed: u64,
}

#[derive(Serialize, Deserialize)]
struct StateJson {
    task_count: u64,
    samples: u64,
    ignored: u64,
    rng: RngState,
    modules: Vec<ModuleJson>,
}

#[derive(Serialize, Deserialize, PartialEq, Debug)]
struct ModuleJson {
    name: String,
    rank: usize,
    in_features: usize,
    out_features: usize,
    scaling: f32,
}

/// Collects the tensors of one module.
pub(crate) struct Writer {
    prefix: String,
    tensors: Vec<Tensor>,
}

impl Writer {
    fn push(&mut self, what: &str, dtype: TensorDtype, shape: Vec<usize>, data: Vec<u8>) {
        let name = format!("{MODULE}{}/{what}", self.prefix);
        self.tensors.push(Tensor { name, dtype, shape, data: data.into() });
    }

    pub fn factor(&mut self, what: &str, f: &Factor) {
        self.push(what, TensorDtype::F32, vec![f.rank(), f.len()], f.to_bits(false));
    }

    pub fn f32s(&mut self, what: &str, v: &[f32]) {
        let data = v.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.push(what, TensorDtype::F32, vec![v.len()], data);
    }

    pub fn f64s(&mut self, what: &str, v: &[f64]) {
        let data = v.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.push(what, TensorDtype::F64, vec![v.len()], data);
    }
}

/// Hands out the tensors of one module, each once.
pub(crate) struct Reader<'a> {
    prefix: String,
    tensors: &'a mut HashMap<String, Tensor>,
}

impl Reader<'_> {
    pub fn wrong(&self, what: &str, reason: &str) -> Error {
        Error::format(FILE, format!("tensor {}: {reason}", show(&format!("{MODULE}{}/{what}", self.prefix))))
    }

    pub fn has(&self, what: &str) -> bool {
        self.tensors.contains_key(&format!("{MODULE}{}/{what}", self.prefix))
    }

    fn take(&mut self, what: &str, dtype: TensorDtype, shape: &[usize]) -> Result<Bytes> {
        let Some(t) = self.tensors.remove(&format!("{MODULE}{}/{what}", self.prefix)) else {
            return Err(self.wrong(what, "missing"));
        };
        if t.dtype != dtype || t.shape != shape {
            let reason = format!("{} {:?}, expected {dtype} {shape:?}", t.dtype, t.shape);
            return Err(self.wrong(what, &reason));
        }
        Ok(t.data)
    }

    /// Means and sums of squares: finite and nowhere negative.
    pub fn factor(&mut self, what: &str, rank: usize, len: usize) -> Result<Factor> {
        let f = self.signed(what, rank, len)?;
        if f.stream().iter().any(|v| *v < 0.0) { Err(self.wrong(what, "negative numbers")) } else { Ok(f) }
    }

    /// Weights and paths: finite.
    pub fn signed(&mut self, what: &str, rank: usize, len: usize) -> Result<Factor> {
        let data = self.take(what, TensorDtype::F32, &[rank, len])?;
        let f = Factor::from_bits(&data, rank, len, Dtype::F32, false)?;
        if f.is_finite() { Ok(f) } else { Err(self.wrong(what, "NaN or infinity")) }
    }

    pub fn f32s(&mut self, what: &str, n: usize) -> Result<Vec<f32>> {
        let data = self.take(what, TensorDtype::F32, &[n])?;
        let number = |b: &[u8]| f32::from_le_bytes(b.try_into().expect("four bytes"));
        let v: Vec<f32> = data.chunks_exact(4).map(number).collect();
        if v.iter().all(|v| *v >= 0.0 && v.is_finite()) {
            Ok(v)
        } else {
            Err(self.wrong(what, "negative, NaN or infinity"))
        }
    }

    pub fn f64s(&mut self, what: &str, n: usize) -> Result<Vec<f64>> {
        let data = self.take(what, TensorDtype::F64, &[n])?;
        let number = |b: &[u8]| f64::from_le_bytes(b.try_into().expect("eight bytes"));
        let v: Vec<f64> = data.chunks_exact(8).map(number).collect();
        if v.iter().all(|v| *v >= 0.0 && v.is_finite()) {
            Ok(v)
        } else {
            Err(self.wrong(what, "negative, NaN or infinity"))
        }
    }
}

impl EwcSettings {
    /// The settings that a state was made with.
    ///
    /// # Errors
    /// Bytes of anything else.
    pub fn of_state(bytes: &[u8]) -> Result<Self> {
        Ok(parse(bytes)?.settings)
    }

    /// The settings as JSON, by their public names.
    pub fn to_json(&self) -> String {
        serde_json::to_string(&self.document()).expect("plain numbers and names")
    }

    fn document(&self) -> SettingsJson {
        SettingsJson {
            kind: self.kind.row().name.into(),
            lambda: self.lambda,
            gamma: self.gamma,
            fisher: self.fisher,
            fisher_normalize: self.normalize,
            fisher_decay: self.decay,
            step: self.step,
            anchors: self.anchors,
            fisher_samples: self.samples,
            seed: self.seed,
        }
    }

    fn from_document(d: SettingsJson) -> Result<Self> {
        EwcSettings {
            lambda: d.lambda,
            kind: d.kind.parse()?,
            gamma: d.gamma,
            fisher: d.fisher,
            normalize: d.fisher_normalize,
            decay: d.fisher_decay,
            step: d.step,
            anchors: d.anchors,
            samples: d.fisher_samples,
            seed: d.seed,
        }
        .validate()
    }
}

/// A parsed state, not yet compared with anything.
struct Parsed {
    settings: EwcSettings,
    state: StateJson,
    tensors: HashMap<String, Tensor>,
    extra: Vec<Tensor>,
    note: Option<String>,
}

fn parse(bytes: &[u8]) -> Result<Parsed> {
    let wrong = |reason: String| Error::format(FILE, reason);
    let container::Container { mut metadata, tensors } =
        container::parse(&Bytes::from(bytes.to_vec()), FILE)?;
    if metadata.get("format").map(String::as_str) != Some(FORMAT) {
        return Err(wrong(format!("safetensors, but its format is not {FORMAT:?}")));
    }
    let version = metadata.get("format_version").and_then(|v| v.parse::<u32>().ok());
    match version {
        Some(VERSION) => {}
        Some(n) if n > VERSION => {
            let reason = format!("format version {n}, this build reads up to {VERSION}; upgrade microlora");
            return Err(Error::unsupported(FILE, reason));
        }
        _ => return Err(wrong("header: no usable `format_version`".into())),
    }
    if metadata.get("fisher").map(String::as_str) != Some(UNIT) {
        return Err(wrong(format!("header: fisher is not {UNIT:?}, and other units cannot be converted")));
    }
    let mut text = |key: &str| metadata.remove(key).ok_or_else(|| wrong(format!("header: no `{key}`")));
    let (settings, state) = (text("settings")?, text("state")?);
    let json = |key: &str, e: serde_json::Error| wrong(format!("header: {key}: {e}"));
    let settings = serde_json::from_str(&settings).map_err(|e| json("settings", e))?;
    let state = serde_json::from_str(&state).map_err(|e| json("state", e))?;
    let mut all = HashMap::new();
    let mut extra = Vec::new();
    for mut t in tensors {
        match t.name.strip_prefix(EXTRA) {
            Some(name) => {
                t.name = name.to_owned();
                extra.push(t);
            }
            None => drop(all.insert(t.name.clone(), t)),
        }
    }
    let settings =
        EwcSettings::from_document(settings).map_err(|e| wrong(format!("header: settings: {e}")))?;
    Ok(Parsed { settings, state, tensors: all, extra, note: metadata.remove("note") })
}

impl Ewc {
    fn module_documents(&self) -> Vec<ModuleJson> {
        let one = |m: &super::consolidation::Module| ModuleJson {
            name: m.name.clone(),
            rank: m.seen.dims.rank,
            in_features: m.seen.dims.n_in,
            out_features: m.seen.dims.n_out,
            scaling: m.scaling,
        };
        self.modules.iter().map(one).collect()
    }

    /// Everything as bytes; waiting events join the means first. `extra` and `note` travel along.
    ///
    /// # Errors
    /// Those of the container: names twice.
    pub fn export(&mut self, k: &Kernels, extra: &[Tensor], note: Option<&str>) -> Result<Vec<u8>> {
        self.flush(k);
        let mut tensors = Vec::new();
        for m in &self.modules {
            let mut out = Writer { prefix: m.name.clone(), tensors };
            m.seen.save(&mut out);
            m.memory.save(&mut out);
            tensors = out.tensors;
        }
        let state = StateJson {
            task_count: self.tasks,
            samples: self.samples,
            ignored: self.ignored,
            rng: self.rng.state(),
            modules: self.module_documents(),
        };
        let state = serde_json::to_string(&state).map_err(|e| Error::format(FILE, e.to_string()))?;
        let pairs = [
            ("format", FORMAT.to_owned()),
            ("format_version", VERSION.to_string()),
            ("fisher", UNIT.to_owned()),
            ("kind", self.settings.kind.row().name.to_owned()),
            ("task_count", self.tasks.to_string()),
            ("n_samples", self.samples.to_string()),
            ("settings", self.settings.to_json()),
            ("state", state),
        ];
        let mut metadata: BTreeMap<String, String> = pairs.map(|(k, v)| (k.to_owned(), v)).into();
        metadata.extend(note.map(|n| ("note".to_owned(), n.to_owned())));
        let named = tensors.iter().map(|t| (t.name.clone(), t));
        let extra = extra.iter().map(|t| (format!("{EXTRA}{}", t.name), t));
        let layout = container::lay_out(&metadata, named.chain(extra).collect(), FILE)?;
        let mut bytes = Vec::with_capacity(layout.len());
        layout.write_to(&mut bytes).map_err(|e| Error::io(FILE, e))?;
        Ok(bytes)
    }

    /// Takes what [`Ewc::export`] wrote; returns what travelled along.
    ///
    /// Strength, gamma, step, seed and the sample cap stay this one's own; what gives the numbers their
    /// meaning must be equal.
    ///
    /// # Errors
    /// Bytes of anything else; another kind, unit of importance, set of modules or shape. Nothing changes.
    pub fn import(&mut self, bytes: &[u8]) -> Result<(Vec<Tensor>, Option<String>)> {
        let Parsed { settings: theirs, state, mut tensors, extra, note } = parse(bytes)?;
        let ours = &self.settings;
        let same = |name: &str, got: String, want: String| match got == want {
            true => Ok(()),
            false => Err(Error::config(name, got, format!("{want}, as this consolidation"))),
        };
        same("kind", format!("{:?}", theirs.kind), format!("{:?}", ours.kind))?;
        same("fisher_decay", format!("{:?}", theirs.decay), format!("{:?}", ours.decay))?;
        let of = |s: &EwcSettings| (s.normalize.as_str().to_owned(), s.anchors.as_str().to_owned());
        same("fisher_normalize", of(&theirs).0, of(ours).0)?;
        same("anchors", of(&theirs).1, of(ours).1)?;
        let want = self.module_documents();
        for w in &want {
            let Some(got) = state.modules.iter().find(|m| m.name == w.name) else {
                let have: Vec<_> = state.modules.iter().map(|m| m.name.as_str()).collect();
                return Err(Error::config("modules", have.join(", "), format!("{} among them", w.name)));
            };
            if got != w {
                let text = |m: &ModuleJson| {
                    format!("{} -> {}, rank {}, scaling {}", m.in_features, m.out_features, m.rank, m.scaling)
                };
                return Err(Error::shape(&w.name, text(got), text(w)));
            }
        }
        if state.modules.len() != want.len() {
            let names = |m: &[ModuleJson]| m.iter().map(|m| m.name.clone()).collect::<Vec<_>>().join(", ");
            return Err(Error::config("modules", names(&state.modules), names(&want)));
        }
        let mut modules = self.fresh_modules();
        for m in &mut modules {
            let mut from = Reader { prefix: m.name.clone(), tensors: &mut tensors };
            m.seen.load(&mut from)?;
            m.memory.load(&mut from)?;
        }
        if let Some(name) = tensors.keys().next() {
            return Err(Error::format(FILE, format!("unused tensor {}", show(name))));
        }
        self.modules = modules;
        self.tasks = state.task_count;
        (self.samples, self.ignored) = (state.samples, state.ignored);
        self.rng = Rng::resume(state.rng);
        Ok((extra, note))
    }
}
