//! Every format of adapter files, one row each: what it is known by, and who reads it.

use super::json::show;
use super::source::{Content, Source};
use super::{LoadOptions, Loaded, diffusers, flat, gguf, kohya, mlx, npz, peft, single};
use crate::error::{Error, Result};

/// One format.
pub struct Row {
    /// Public name.
    pub name: &'static str,
    /// What it is known by, in words.
    pub known_by: &'static str,
    /// Whether the content is of this format by its first bytes, its files or its header.
    knows: fn(&Source) -> bool,
    /// For styles that share the safetensors container: whether a tensor's name is of this style.
    is_key: Option<fn(&str) -> bool>,
    /// Whether the reader may have to be told which way the factors lie.
    oriented: bool,
    read: fn(Source, &LoadOptions) -> Result<Loaded>,
    /// Whether `read` takes tensors that were not read yet.
    lazy: bool,
}

/// All formats. A new one is one file and one row here.
pub static FORMATS: [Row; 8] = [
    Row {
        name: "safetensors",
        known_by: "safetensors with `format` = `microlora` in its header",
        knows: single::knows,
        is_key: None,
        oriented: false,
        read: single::read,
        lazy: true,
    },
    Row {
        name: "mlx",
        known_by: "adapter_config.json with `fine_tune_type` or `lora_parameters`, and adapters.safetensors",
        knows: mlx::knows,
        is_key: None,
        oriented: false,
        read: mlx::read,
        lazy: false,
    },
    Row {
        name: "peft",
        known_by: "a directory with adapter_config.json (`peft_type`) and adapter_model.safetensors, or the latter",
        knows: peft::knows,
        is_key: Some(peft::is_key),
        oriented: false,
        read: peft::read,
        lazy: true,
    },
    Row {
        name: "gguf",
        known_by: "`GGUF` as its first four bytes",
        knows: gguf::knows,
        is_key: None,
        oriented: false,
        read: gguf::read,
        lazy: false,
    },
    Row {
        name: "kohya",
        known_by: "safetensors with `.lora_down.weight`, `.lora_up.weight` (LoHa `.hada_*`, LoKr `.lokr_*`)",
        knows: kohya::knows,
        is_key: Some(kohya::is_key),
        oriented: false,
        read: kohya::read,
        lazy: false,
    },
    Row {
        name: "diffusers",
        known_by: "safetensors with `.lora_A.weight`, `.lora.down.weight` or `.lora_linear_layer.down.weight` \
                   without PEFT's prefix",
        knows: diffusers::knows,
        is_key: Some(diffusers::is_key),
        oriented: false,
        read: diffusers::read,
        lazy: false,
    },
    Row {
        name: "flat",
        known_by: "safetensors with `lora_a` and `lora_b`, bare or below a module's path",
        knows: flat::knows,
        is_key: Some(flat::is_key),
        oriented: true,
        read: flat::read,
        lazy: false,
    },
    Row {
        name: "npz",
        known_by: "a zip archive of .npy members `<module>.lora_a`, `<module>.lora_b`",
        knows: npz::knows,
        is_key: None,
        oriented: true,
        read: npz::read,
        lazy: false,
    },
];

/// Finds the one row that knows the source.
///
/// # Errors
/// None does, or keys of two styles are mixed.
pub(super) fn row_of(source: &Source) -> Result<&'static Row> {
    if let Some(row) = FORMATS.iter().find(|row| (row.knows)(source)) {
        return Ok(row);
    }
    let file = source.file.as_str();
    let Content::Safetensors(container) = &source.content else {
        return Err(source.unknown());
    };
    let first = |row: &Row| {
        container.tensors.iter().map(|t| t.name.as_str()).find(|k| row.is_key.is_some_and(|is| is(k)))
    };
    let found: Vec<(&Row, &str)> = FORMATS.iter().filter_map(|row| Some((row, first(row)?))).collect();
    match found[..] {
        [(row, _)] => Ok(row),
        [] => {
            let first = container.tensors.first().map(|t| format!(" (the first is {})", show(&t.name)));
            let reason = format!(
                "safetensors, but no tensor has a name of a style that is known here{}; of a PEFT adapter pass the \
                 directory with its adapter_config.json, which has the scaling",
                first.unwrap_or_default()
            );
            Err(Error::format(file, reason))
        }
        [(a, key_a), (b, key_b), ..] => Err(Error::format(
            file,
            format!(
                "ambiguous style: {} is of {}, {} of {}; split the file, or rename the keys of one style",
                show(key_a),
                a.name,
                show(key_b),
                b.name
            ),
        )),
    }
}

/// An orientation that is given to a format that says its own would be silently without effect.
fn check_given_orientation(row: &Row, opts: &LoadOptions, file: &str) -> Result<()> {
    let Some(given) = opts.orientation.filter(|_| !row.oriented) else { return Ok(()) };
    let given = show(flat::name_of(given));
    let reason = format!("orientation: got {given}, expected none: this file ({}) carries its own", row.name);
    Err(Error::format(file, reason))
}

/// An alpha that is given and that no module takes would be silently without effect.
fn check_given_alpha(loaded: &Loaded, opts: &LoadOptions, file: &str) -> Result<()> {
    let Some(given) = opts.alpha else { return Ok(()) };
    let taken = |alpha: f64| (alpha - given).abs() <= 1e-6 * given.abs();
    if loaded.parts.modules.iter().any(|m| taken(m.alpha)) {
        return Ok(());
    }
    let reason = format!("alpha: got {given}, expected none: this file ({}) carries its own", loaded.format);
    Err(Error::format(file, reason))
}

/// Reads with the row that knows the source.
pub(super) fn read(mut source: Source, opts: &LoadOptions) -> Result<Loaded> {
    let row = row_of(&source)?;
    if !row.lazy {
        source.settle()?;
    }
    let file = source.file.clone();
    check_given_orientation(row, opts, &file)?;
    let mut loaded = (row.read)(source, opts)?;
    loaded.format = row.name;
    check_given_alpha(&loaded, opts, &file)?;
    Ok(loaded)
}
