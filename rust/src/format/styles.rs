//! Writing the formats that are one key style each: what each can hold, and how it is asked for.

use std::path::Path;

use super::json::{show, show_list};
use super::peft::is_only_for_training;
use super::peft::variants::plain_config;
use super::{
    AdapterParts, Loaded, ModuleKind, ModuleParts, Tensor, Variant, diffusers, flat, kohya, mlx, npz,
};
use crate::error::{Error, Result};

/// One format that is written here.
pub struct Style {
    /// Public name, as in [`super::FORMATS`].
    pub name: &'static str,
    /// Kinds of variant that it can hold, wherever they come from. What was read from the same format
    /// goes back as it was.
    pub holds: &'static [&'static str],
    save: fn(&Path, &Content) -> Result<Vec<String>>,
}

/// All of them.
pub static STYLES: [Style; 5] = [
    Style { name: "mlx", holds: &["dora", "embedding", "experts"], save: mlx::save },
    Style { name: "kohya", holds: &["conv"], save: kohya::save },
    Style { name: "diffusers", holds: &["conv", "dora"], save: diffusers::save },
    Style { name: "flat", holds: &[], save: flat::save },
    Style { name: "npz", holds: &[], save: npz::save },
];

/// What of a file goes into another.
pub(super) struct Content<'a> {
    pub loaded: &'a Loaded,
    pub modules: Vec<&'a ModuleParts>,
    /// Tensors beside the factors, under the names they had: those of the same format.
    pub extra: Vec<&'a Tensor>,
    /// Magnitudes of DoRA by module path.
    pub magnitudes: Vec<(String, &'a Tensor)>,
    pub allow: &'a [String],
}

impl Content<'_> {
    /// True when the caller accepts this by name.
    pub fn allows(&self, name: &str) -> bool {
        self.allow.iter().any(|a| a == name)
    }
}

fn style(name: &str) -> Result<&'static Style> {
    let unknown = || {
        let names: Vec<&str> = STYLES.iter().map(|s| s.name).collect();
        Error::config("format", show(name), format!("one of {}", show_list(&names)))
    };
    STYLES.iter().find(|s| s.name == name).ok_or_else(unknown)
}

fn keeps(style: &Style, loaded: &Loaded, kind: &str, allow: &[String]) -> bool {
    let dropped = allow.iter().any(|a| a.strip_prefix("drop:") == Some(kind));
    !dropped && (loaded.format == style.name || style.holds.contains(&kind))
}

/// [`keeps`], of one variant: magnitudes of DoRA that only their own format understands stay there.
fn keeps_this(style: &Style, loaded: &Loaded, v: &Variant, allow: &[String]) -> bool {
    let own = v.kind == "dora" && magnitude_path(&v.at).is_none();
    let foreign = own && loaded.format != style.name && loaded.parts.extra.iter().any(|t| t.name == v.at);
    keeps(style, loaded, &v.kind, allow) && !foreign
}

/// What would be lost, by kind, with the place of the first of each.
///
/// # Errors
/// No such format.
pub fn losses(loaded: &Loaded, name: &str, allow: &[String]) -> Result<Vec<(String, String)>> {
    let style = style(name)?;
    let mut lost: Vec<(String, String)> = Vec::new();
    for v in &loaded.variants {
        if !keeps_this(style, loaded, v, allow) && lost.iter().all(|(k, _)| *k != v.kind) {
            lost.push((v.kind.clone(), v.at.clone()));
        }
    }
    if loaded.format != style.name && loaded.variants.is_empty() {
        let other = loaded.parts.extra.iter().find(|t| !is_only_for_training(&t.name));
        lost.extend(other.map(|t| (super::runs::EXTRA.to_owned(), t.name.clone())));
    }
    Ok(lost)
}

/// Writes a file of that format, without what `allow` drops by name; gives back notes.
///
/// # Errors
/// No such format, something that it cannot hold and that is not dropped, the system's refusals.
pub fn save_style(path: &Path, loaded: &Loaded, name: &str, allow: &[String]) -> Result<Vec<String>> {
    let style = style(name)?;
    if loaded.parts.modules.is_empty() {
        loaded.check_plain(&path.display().to_string())?;
    }
    let lost = losses(loaded, name, allow)?;
    if let Some((kind, at)) = lost.iter().find(|(k, _)| !allow.iter().any(|a| *a == format!("drop:{k}"))) {
        let reason =
            format!("{name} cannot hold {kind} ({}); allow=[\"drop:{kind}\"] leaves it out", show(at));
        return Err(Error::unsupported(path.display(), reason));
    }
    loaded.parts.check()?;
    let same = loaded.format == style.name;
    let modules: Vec<&ModuleParts> = (loaded.parts.modules.iter())
        .filter(|m| m.kind == ModuleKind::Linear || keeps(style, loaded, m.kind.as_str(), allow))
        .collect();
    let dropped =
        |t: &&Tensor| !loaded.variants.iter().any(|v| v.at == t.name && !keeps_this(style, loaded, v, allow));
    let (dora, others): (Vec<&Tensor>, Vec<&Tensor>) =
        loaded.parts.extra.iter().filter(dropped).partition(|t| magnitude_path(&t.name).is_some());
    let extra = if same { others } else { Vec::new() };
    let magnitudes = match keeps(style, loaded, "dora", allow) {
        true => dora.into_iter().filter_map(|t| Some((magnitude_path(&t.name)?, t))).collect(),
        false => Vec::new(),
    };
    if modules.is_empty() && extra.is_empty() {
        return Err(Error::config("adapter", "no modules", "at least one that the format can hold"));
    }
    if lost.is_empty() {
        return (style.save)(path, &Content { loaded, modules, extra, magnitudes, allow });
    }
    // Settings must not speak of what is left out.
    let mut less = Loaded { format: loaded.format, ..Loaded::default() };
    less.parts = AdapterParts { modules: Vec::new(), extra: Vec::new(), ..loaded.parts.clone() };
    less.parts.peft_config = loaded.parts.peft_config.as_deref().and_then(plain_config);
    (style.save)(path, &Content { loaded: &less, modules, extra, magnitudes, allow })
}

/// PEFT's key of the magnitudes of DoRA, under which files of every format keep them.
pub(super) fn magnitude_key(path: &str) -> String {
    format!("{}{path}.lora_magnitude_vector", super::peft::PREFIX)
}

/// The module whose magnitudes of DoRA a tensor holds.
pub(super) fn magnitude_path(key: &str) -> Option<String> {
    let rest = key.strip_suffix(".weight").unwrap_or(key);
    let path = rest.strip_suffix(".lora_magnitude_vector")?;
    let mut path = path;
    while let Some(shorter) = path.strip_prefix(super::peft::PREFIX) {
        path = shorter;
    }
    Some(path.to_owned())
}
