//! Which tensor each module of the adapter belongs to, and how that tensor lies in its file.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::FuseOptions;
use crate::adapter::{Adapter, edit_distance};
use crate::error::{Error, Result};
use crate::format::json::{self, show, show_list};
use crate::format::peft::{is_only_for_training, placed};
use crate::format::shards::Model;
use crate::format::{atomic, container::Entry};

/// How a weight lies in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// `(out_features, in_features)`: a torch Linear.
    OutIn,
    /// `(in_features, out_features)`: GPT-2's Conv1D, embeddings.
    InOut,
}

impl Layout {
    pub fn as_str(self) -> &'static str {
        match self {
            Layout::OutIn => "out_in",
            Layout::InOut => "in_out",
        }
    }
}

/// One tensor that changes.
#[derive(Clone, Debug)]
pub(super) struct Touched {
    /// Shard and entry.
    pub place: (usize, usize),
    /// Number of the adapter's module.
    pub module: usize,
    pub layout: Layout,
    pub layout_from: &'static str,
}

/// What is to be done.
pub(super) struct Plan {
    /// In the order of the files.
    pub touched: Vec<Touched>,
    pub notes: Vec<String>,
}

/// Matches modules with tensors; every module must find exactly one tensor for each of its paths.
pub(super) fn plan(model: &Model, adapter: &Adapter, opts: &FuseOptions<'_>) -> Result<Plan> {
    check_adapter(adapter)?;
    let names: Vec<&str> = adapter.modules.iter().map(|(n, _)| n.as_str()).collect();
    let paths: Vec<(String, usize)> = placed(&names, opts.layer_paths)?
        .into_iter()
        .map(|(path, m)| (path.replace(".base_layer.", "."), m))
        .collect();
    let (places, mut notes) = find_all(model, &paths, opts.layer_paths.is_some())?;
    let mut touched = layouts(model, adapter, opts, &paths, &places, &mut notes)?;
    touched.sort_by_key(|t| t.place);
    if let Some(pair) = touched.windows(2).find(|p| p[0].place == p[1].place) {
        let got = format!("two modules for tensor {}", show(&model.entry(pair[0].place).name));
        return Err(Error::config("adapter", got, "one module for each tensor"));
    }
    if model.setting("tie_word_embeddings") == Some(Value::Bool(true)) {
        notes.extend(touched.iter().filter_map(|t| tied_note(&model.entry(t.place).name)));
    }
    Ok(Plan { touched, notes })
}

/// Refuses what plain `W + s B A` would not do justice to.
fn check_adapter(adapter: &Adapter) -> Result<()> {
    if adapter.modules.is_empty() {
        return Err(Error::config("adapter", "no modules", "at least one"));
    }
    let other: Vec<&str> =
        adapter.extra.iter().map(|t| t.name.as_str()).filter(|n| !is_only_for_training(n)).collect();
    if !other.is_empty() {
        let reason = format!(
            "holds tensors that are no LoRA factors ({}), so its weights alone are not what it computes; merge it \
             with PEFT, or save it without them",
            show_list(&other)
        );
        return Err(Error::unsupported("adapter", reason));
    }
    for (name, layer) in &adapter.modules {
        for (which, factor) in [("lora_a", &layer.a), ("lora_b", &layer.b)] {
            if !factor.is_finite() {
                return Err(Error::non_finite(format!("{which} of {name}")));
            }
        }
    }
    Ok(())
}

/// Shard and entry of a tensor.
type Place = (usize, usize);

/// A tensor for every path: under its own name, or all of them behind (or without) one common prefix.
fn find_all(model: &Model, paths: &[(String, usize)], given: bool) -> Result<(Vec<Place>, Vec<String>)> {
    let exact: Vec<Option<Place>> = paths.iter().map(|(p, _)| model.find(&weight(p))).collect();
    if let Some(all) = exact.iter().copied().collect::<Option<Vec<_>>>() {
        return Ok((all, Vec::new()));
    }
    let missing: Vec<&str> =
        paths.iter().zip(&exact).filter(|(_, e)| e.is_none()).map(|((p, _), _)| p.as_str()).collect();
    // A short name would fit wherever its layer happens to be alone.
    let long = paths.iter().any(|(p, _)| p.contains('.'));
    let found: Vec<(Shift, Vec<Place>)> = match long {
        true => shifts(model, &paths[0].0)
            .into_iter()
            .filter_map(|s| {
                let all = paths.iter().map(|(p, _)| s.apply(p).and_then(|p| model.find(&weight(&p))));
                Some((s.clone(), all.collect::<Option<Vec<_>>>()?))
            })
            .collect(),
        false => Vec::new(),
    };
    match found.as_slice() {
        [(shift, all)] => Ok((all.clone(), vec![shift.note()])),
        [] => Err(unmatched(model, &missing, given)),
        [(one, _), (two, _), ..] => {
            let got = format!("modules that fit the base in several ways ({}; {})", one.note(), two.note());
            Err(Error::config("adapter", got, "module paths that name one tensor each; pass layer_paths="))
        }
    }
}

fn weight(path: &str) -> String {
    format!("{path}.weight")
}

/// A prefix that all paths gain or lose.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Shift {
    Add(String),
    Drop(String),
}

impl Shift {
    fn apply(&self, path: &str) -> Option<String> {
        match self {
            Shift::Add(prefix) => Some(format!("{prefix}{path}")),
            Shift::Drop(prefix) => path.strip_prefix(prefix.as_str()).map(str::to_owned),
        }
    }

    fn note(&self) -> String {
        match self {
            Shift::Add(prefix) => format!("the base has every module behind the prefix {}", show(prefix)),
            Shift::Drop(prefix) => format!("the base has every module without the prefix {}", show(prefix)),
        }
    }
}

/// The shifts under which one path names a tensor.
fn shifts(model: &Model, path: &str) -> BTreeSet<Shift> {
    let tail = format!(".{}", weight(path));
    let longer = model.names().filter_map(|n| n.strip_suffix(&tail)).map(|p| Shift::Add(format!("{p}.")));
    let shorter = path.match_indices('.').filter(|(i, _)| model.find(&weight(&path[i + 1..])).is_some());
    longer.chain(shorter.map(|(i, _)| Shift::Drop(path[..=i].to_owned()))).collect()
}

fn unmatched(model: &Model, missing: &[&str], given: bool) -> Error {
    let want = weight(missing[0]);
    let mut near: Vec<&str> = model.names().filter(|n| n.ends_with(".weight")).collect();
    let last = |n: &str| n.rsplit('.').nth(1).map(str::to_owned);
    let mine = last(&want);
    near.sort_by_cached_key(|n| (last(n) != mine, edit_distance(&want, n), n.to_string()));
    near.truncate(3);
    let and = if missing.len() > 1 { format!(" (and {} more)", missing.len() - 1) } else { String::new() };
    let short = !given && missing.iter().all(|m| !m.contains('.'));
    let how = if short { "; short names need layer_paths={name: [path, ...]}" } else { "" };
    let near =
        if near.is_empty() { "it has none".to_owned() } else { format!("nearest: {}", show_list(&near)) };
    Error::config(
        "adapter",
        format!("module {}{and}, for which the base has no tensor {}", show(missing[0]), show(&want)),
        format!("modules that each match one weight of the base ({near}){how}"),
    )
}

/// Decides how each weight lies: by its shape, and where that is square by what is known of the model.
fn layouts(
    model: &Model,
    adapter: &Adapter,
    opts: &FuseOptions<'_>,
    paths: &[(String, usize)],
    places: &[Place],
    notes: &mut Vec<String>,
) -> Result<Vec<Touched>> {
    let mut found = Vec::with_capacity(places.len());
    let (mut square, mut linear, mut conv) = (None, None, None);
    for ((_, module), &place) in paths.iter().zip(places) {
        let entry = model.entry(place);
        let layer = &adapter.modules[*module].1;
        let (n_in, n_out) = (layer.in_features(), layer.out_features());
        let layout = match entry.shape[..] {
            [r, c] if (r, c) == (n_out, n_in) && n_in == n_out => None,
            [r, c] if (r, c) == (n_out, n_in) => Some(Layout::OutIn),
            [r, c] if (r, c) == (n_in, n_out) => Some(Layout::InOut),
            _ => {
                let want = format!(
                    "({n_out}, {n_in}) or ({n_in}, {n_out}) of module {}",
                    show(&adapter.modules[*module].0)
                );
                return Err(Error::shape(
                    format!("base tensor {}", entry.name),
                    format!("{:?}", entry.shape),
                    want,
                ));
            }
        };
        check_dtype(entry)?;
        match layout {
            None => square = square.or(Some(entry)),
            Some(Layout::OutIn) => linear = linear.or(Some(entry)),
            // Unlike an embedding, which also lies (in, out), a Conv1D has a bias.
            Some(Layout::InOut) if has_bias(model, entry) => conv = conv.or(Some(entry)),
            Some(Layout::InOut) => {}
        }
        found.push((place, *module, layout));
    }
    let (transposed, from) = square_rule(adapter, opts)?;
    if let Some(entry) = square {
        let against = if transposed { linear } else { conv };
        if let (Some(other), None) = (against, opts.fan_in_fan_out) {
            let said = if transposed { "(in, out)" } else { "(out, in)" };
            let got = format!(
                "{said} for the square tensor {}, while {} {:?} lies the other way",
                show(&entry.name),
                show(&other.name),
                other.shape
            );
            return Err(Error::config("fan_in_fan_out", got, "True or False, given with the call"));
        }
        let way = if transposed { "(in, out)" } else { "(out, in)" };
        notes.push(format!("square weights such as {} are taken as {way}, by {from}", show(&entry.name)));
    }
    let chosen = if transposed { Layout::InOut } else { Layout::OutIn };
    Ok(found
        .into_iter()
        .map(|(place, module, layout)| Touched {
            place,
            module,
            layout: layout.unwrap_or(chosen),
            layout_from: if layout.is_some() { "shape" } else { from },
        })
        .collect())
}

fn check_dtype(entry: &Entry) -> Result<()> {
    match crate::format::tensor::factor_dtype(entry.dtype) {
        Some(_) => Ok(()),
        None => Err(Error::Dtype {
            arg: format!("base tensor {}", entry.name),
            got: entry.dtype.to_string(),
            want: "F32, F16 or BF16; a quantised base must be expanded first".into(),
        }),
    }
}

fn has_bias(model: &Model, entry: &Entry) -> bool {
    let stem = entry.name.strip_suffix(".weight").unwrap_or(&entry.name);
    model.find(&format!("{stem}.bias")).is_some()
}

/// Whether square weights lie (in, out), and who says so.
fn square_rule(adapter: &Adapter, opts: &FuseOptions<'_>) -> Result<(bool, &'static str)> {
    if let Some(given) = opts.fan_in_fan_out {
        return Ok((given, "argument"));
    }
    let Some(text) = &adapter.peft_config else { return Ok((false, "default")) };
    let object = json::parse_object(text).map_err(|e| Error::format("peft_config", e))?;
    match object.get("fan_in_fan_out") {
        Some(Value::Bool(flag)) => Ok((*flag, "peft_config")),
        _ => Ok((false, "default")),
    }
}

fn tied_note(tensor: &str) -> Option<String> {
    let stem = tensor.strip_suffix(".weight")?;
    let last = stem.rsplit('.').next()?;
    matches!(last, "embed_tokens" | "wte" | "lm_head" | "word_embeddings" | "embed_in" | "embed_out").then(
        || {
            format!(
                "config.json ties input and output embeddings: whoever loads the result uses {} for both",
                show(tensor)
            )
        },
    )
}

/// Refuses places that would overwrite something that is still needed.
pub(super) fn check_places(model: &Model, arg: &str, out: &Path, sidecar: Option<&Path>) -> Result<()> {
    let shown = |p: &Path| show(&p.display().to_string());
    let (base, place) = (real(&model.path), real(out));
    if base == place {
        let want = format!("another place than {arg}, which is left as it is");
        return Err(Error::config("out", shown(out), want));
    }
    if model.is_dir {
        let empty = match std::fs::read_dir(out) {
            Ok(mut entries) => entries.next().is_none(),
            Err(_) => std::fs::symlink_metadata(out).is_err(),
        };
        if !empty {
            return Err(Error::config(
                "out",
                shown(out),
                "a folder that does not exist yet, or an empty one",
            ));
        }
    }
    let Some(sidecar) = sidecar else { return Ok(()) };
    if std::fs::symlink_metadata(sidecar).is_ok() {
        let want = "a new file: an older side-car is the only way back for its model, so it is not replaced";
        return Err(Error::config("sidecar", format!("{}, which exists", shown(sidecar)), want));
    }
    let mine = real(sidecar);
    if mine == place || model.is_dir && mine.starts_with(&place) {
        return Err(Error::config("sidecar", shown(sidecar), "a place outside of out"));
    }
    Ok(())
}

/// Whether two paths lead to one file or folder.
pub(super) fn same_place(a: &Path, b: &Path) -> bool {
    real(a) == real(b)
}

/// A path without links, also where its last part does not exist.
fn real(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| {
        let folder = atomic::parent(path);
        let folder = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
        folder.join(path.file_name().unwrap_or_default())
    })
}
