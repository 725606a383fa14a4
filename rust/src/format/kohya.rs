//! Kohya's key style: `lora_unet_down_blocks_0_..._to_q` + `.lora_down.weight`, `.lora_up.weight`, `.alpha`.
//!
//! Down (rank, in) and up (out, rank), of a convolution (rank, in, kernel ...) and (out, rank, 1 ...);
//! scaling alpha / rank, and 1 without an alpha. The underscores cannot be told from dots without the names
//! of the base's modules: see [`resolve`].

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use super::container::Container;
use super::json::show;
use super::pairs::{self, Carried, Found, Pairs, Side, plain_alpha, scalar_tensor};
use super::source::{Content as Kind, Source};
use super::styles::Content;
use super::tensor::Tensor;
use super::{LoadOptions, Loaded, fingerprint};
use crate::error::{Error, Result};

/// What a key's end says.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mark {
    Down,
    Up,
    Alpha,
    /// Part of another parametrisation: the module has no plain pair. Kind, and why.
    Other(&'static str, &'static str),
    /// Beside a plain pair.
    Beside(&'static str, &'static str),
}

const LOHA: Mark =
    Mark::Other("loha", "LoHa, a Hadamard product of two low-rank products; bake it into the base");
const LOKR: Mark = Mark::Other("lokr", "LoKr, a Kronecker product; bake it into the base");
const MID: Mark = Mark::Other("locon_mid", "LoCon's middle tensor (Tucker); the delta is up x mid x down");

const MARKS: [(&str, Mark); 29] = [
    ("lora_down.weight", Mark::Down),
    ("lora_up.weight", Mark::Up),
    ("alpha", Mark::Alpha),
    ("lora_mid.weight", MID),
    ("hada_w1_a", LOHA),
    ("hada_w1_b", LOHA),
    ("hada_w2_a", LOHA),
    ("hada_w2_b", LOHA),
    ("hada_t1", LOHA),
    ("hada_t2", LOHA),
    ("lokr_w1", LOKR),
    ("lokr_w1_a", LOKR),
    ("lokr_w1_b", LOKR),
    ("lokr_w2", LOKR),
    ("lokr_w2_a", LOKR),
    ("lokr_w2_b", LOKR),
    ("lokr_t2", LOKR),
    ("dora_scale", Mark::Beside("dora", "DoRA needs the base weights at inference")),
    ("reshape_weight", Mark::Beside("reshape_weight", "the base weight is padded to another shape first")),
    ("lora_down.bias", Mark::Beside("lora_bias", "the adapter carries biases")),
    ("lora_up.bias", Mark::Beside("lora_bias", "the adapter carries biases")),
    ("diff", Mark::Beside("diff", "a full difference of the weight, not of low rank")),
    ("diff_b", Mark::Beside("diff_b", "a difference of the base's bias")),
    ("w_norm", Mark::Beside("norm", "a trained norm of the base")),
    ("b_norm", Mark::Beside("norm", "a trained norm of the base")),
    ("a1.weight", Mark::Other("glora", "GLoRA; bake it into the base")),
    ("a2.weight", Mark::Other("glora", "GLoRA; bake it into the base")),
    ("b1.weight", Mark::Other("glora", "GLoRA; bake it into the base")),
    ("b2.weight", Mark::Other("glora", "GLoRA; bake it into the base")),
];

/// Components of a diffusion pipeline: the start of a dotted name, and of Kohya's.
const COMPONENTS: [(&str, &str); 8] = [
    ("unet.", "lora_unet_"),
    ("transformer.", "lora_unet_"),
    ("diffusion_model.", "lora_unet_"),
    ("transformer.", "lora_transformer_"),
    ("text_encoder.", "lora_te_"),
    ("text_encoder.", "lora_te1_"),
    ("text_encoder_2.", "lora_te2_"),
    ("text_encoder_3.", "lora_te3_"),
];

/// Every kind that a file of this style can show.
pub(super) fn kinds() -> impl Iterator<Item = &'static str> {
    MARKS.iter().filter_map(|(_, mark)| match mark {
        Mark::Other(kind, _) | Mark::Beside(kind, _) => Some(*kind),
        Mark::Down | Mark::Up | Mark::Alpha => None,
    })
}

fn split(key: &str) -> Option<(&str, Mark)> {
    let end = |(suffix, mark): &(&str, Mark)| {
        let base = key.strip_suffix(suffix)?.strip_suffix('.')?;
        (!base.is_empty()).then_some((base, *mark))
    };
    MARKS.iter().find_map(end)
}

/// A key that only this style has.
pub(super) fn is_key(key: &str) -> bool {
    match split(key) {
        Some((_, Mark::Down | Mark::Up)) => true,
        Some((base, Mark::Other(..))) => {
            base.starts_with("lora_") || !key.ends_with(".weight") || key.contains("lora_mid")
        }
        Some((base, Mark::Beside(..))) => base.starts_with("lora_") || base.starts_with("lycoris_"),
        _ => false,
    }
}

pub(super) fn knows(_: &Source) -> bool {
    false // by its keys alone
}

pub(super) fn read(source: Source, opts: &LoadOptions) -> Result<Loaded> {
    let file = source.file.clone();
    let Kind::Safetensors(content) = source.content else { return Err(source.unknown()) };
    build(content, opts, &file)
}

fn build(content: Container, opts: &LoadOptions, file: &str) -> Result<Loaded> {
    let mut carried = Carried::take(content.metadata, file)?;
    let mut found = Found::default();
    let mut groups: BTreeMap<String, Vec<(Mark, Tensor)>> = BTreeMap::new();
    for t in content.tensors {
        match split(&t.name) {
            Some((base, mark)) => groups.entry(base.to_owned()).or_default().push((mark, t)),
            None => found.leave(t),
        }
    }
    let (mut without_alpha, mut comfy) = (0, 0);
    for (base, tensors) in groups {
        comfy += usize::from(base.starts_with("diffusion_model.") || base.starts_with("text_encoders."));
        if let Some((kind, why)) = tensors.iter().find_map(|(m, _)| match m {
            Mark::Other(kind, why) => Some((*kind, *why)),
            _ => None,
        }) {
            for (mark, t) in tensors {
                match mark {
                    Mark::Beside(kind, why) => found.vary(kind, why, t),
                    _ => found.vary(kind, why, t),
                }
            }
            continue;
        }
        let mut pairs = Pairs::new(file);
        for (mark, t) in tensors {
            match mark {
                Mark::Down => pairs.put(&base, Side::A, t)?,
                Mark::Up => pairs.put(&base, Side::B, t)?,
                Mark::Alpha => pairs.put_alpha(&base, &t)?,
                Mark::Beside(kind, why) | Mark::Other(kind, why) => found.vary(kind, why, t),
            }
        }
        let Some(mut slot) = pairs.slots.remove(&base) else { continue };
        if slot.is_bare() {
            found.unused.push(format!("{base}.alpha"));
            continue;
        }
        let stored = slot.alpha.take().map(|(_, alpha)| alpha);
        without_alpha += usize::from(stored.or(opts.alpha).is_none());
        let alpha = |rank| stored.or(opts.alpha).unwrap_or(rank as f64);
        let mut m = pairs::by_dims(&base, slot.both(&base, file)?, alpha, opts, file)?;
        let alpha = m.alpha;
        carried.restore(&base, &mut m, |own| own.to_bits() == alpha.to_bits());
        found.add(m);
    }
    if without_alpha > 0 {
        found.notes.push(format!("{without_alpha} modules have no alpha: their factor is 1 (alpha = rank)"));
    }
    if comfy > 0 {
        found.notes.push(format!("{comfy} keys are of ComfyUI (diffusion_model., text_encoders.)"));
    }
    found.carried = carried;
    found.finish(opts, file)
}

/// Gives modules that are known by Kohya's underscore names the dotted names of the base, and checks that
/// the others are names of the base which stay apart under underscores.
///
/// # Errors
/// A name that no module of the base has, or several have; two modules that get one name.
pub fn resolve(loaded: &mut Loaded, names: &[String], file: &str) -> Result<()> {
    let mut table: HashMap<String, Vec<&str>> = HashMap::new();
    for name in names {
        for key in keys_of(name) {
            let row = table.entry(key).or_default();
            if !row.contains(&name.as_str()) {
                row.push(name);
            }
        }
    }
    let mut taken: HashMap<String, String> = HashMap::new();
    for m in &mut loaded.parts.modules {
        let old = m.path.clone();
        let key = if is_underscored(&old) { old.clone() } else { key_of(&old, false) };
        let new = match table.get(&key).map(Vec::as_slice) {
            Some([one]) if is_underscored(&old) || *one == old || old.ends_with(&format!(".{one}")) => {
                if is_underscored(&old) {
                    (*one).to_owned()
                } else {
                    old.clone()
                }
            }
            Some([a, b, ..]) => {
                let reason = format!("module {} may be {} or {} of the base", show(&old), show(a), show(b));
                return Err(Error::format(file, reason));
            }
            _ => {
                let reason = format!("module {}: no module of the base has that name", show(&old));
                return Err(Error::format(file, reason));
            }
        };
        if let Some(first) = taken.insert(new.clone(), old.clone()) {
            let reason = format!("modules {} and {} are both {}", show(&first), show(&old), show(&new));
            return Err(Error::format(file, reason));
        }
        for v in loaded.variants.iter_mut().filter(|v| v.at == old) {
            v.at.clone_from(&new);
        }
        m.a.name = format!("{new}.lora_a");
        m.b.name = format!("{new}.lora_b");
        m.path = new;
    }
    Ok(())
}

fn is_underscored(path: &str) -> bool {
    !path.contains('.') && (path.starts_with("lora_") || path.starts_with("lycoris_"))
}

/// All of Kohya's names that a module of the base may go under.
fn keys_of(name: &str) -> Vec<String> {
    let under = |s: &str| s.replace('.', "_");
    let mut keys: Vec<String> = COMPONENTS
        .iter()
        .filter_map(|(dotted, prefix)| Some(format!("{prefix}{}", under(name.strip_prefix(dotted)?))))
        .collect();
    // The names of one component alone may stand behind any prefix.
    let all = COMPONENTS.iter().map(|(_, p)| *p).chain(["lora_prior_", "lycoris_", "lora_"]);
    keys.extend(all.map(|prefix| format!("{prefix}{}", under(name))));
    keys
}

/// The name that a module is written under.
fn key_of(path: &str, two_encoders: bool) -> String {
    if is_underscored(path) {
        return path.to_owned();
    }
    let under = |s: &str| s.replace('.', "_");
    let component =
        COMPONENTS.iter().find_map(|(dotted, prefix)| Some((path.strip_prefix(dotted)?, *prefix)));
    match component {
        Some((rest, "lora_te_")) if two_encoders => format!("lora_te1_{}", under(rest)),
        Some((rest, prefix)) => format!("{prefix}{}", under(rest)),
        None => format!("lora_unet_{}", under(path)),
    }
}

pub(super) fn save(path: &Path, content: &Content) -> Result<Vec<String>> {
    let two = content.modules.iter().any(|m| m.path.starts_with("text_encoder_2."));
    let mut names: HashMap<String, &str> = HashMap::new();
    let mut rows = Vec::with_capacity(content.modules.len());
    let mut plain = 0;
    for m in &content.modules {
        let key = key_of(&m.path, two);
        plain += usize::from(key.strip_prefix("lora_unet_") == Some(&m.path.replace('.', "_")));
        if let Some(first) = names.insert(key.clone(), &m.path) {
            let got = format!("{} and {}, which are both {}", show(first), show(&m.path), show(&key));
            return Err(Error::config("module path", got, "names that underscores keep apart"));
        }
        rows.push((key, *m));
    }
    let mut tensors: Vec<Tensor> = Vec::with_capacity(3 * rows.len());
    for (key, m) in &rows {
        tensors.push(Tensor { name: format!("{key}.lora_down.weight"), ..m.a.clone() });
        tensors.push(Tensor { name: format!("{key}.lora_up.weight"), ..m.b.clone() });
        tensors.push(scalar_tensor(format!("{key}.alpha"), plain_alpha(m))?);
    }
    tensors.extend(content.extra.iter().map(|t| (*t).clone()));
    let carried = rows.iter().map(|(key, m)| (key.as_str(), *m));
    let header = Carried::give(&content.loaded.parts, carried, "pt")?;
    let file = path.display().to_string();
    fingerprint::stage(path, header, &tensors, |c| build(c, &fingerprint::as_it_is(), &file))?.commit()?;
    Ok(match plain {
        0 => Vec::new(),
        n => vec![format!("{n} modules name no component of a pipeline; they are written under lora_unet_")],
    })
}
