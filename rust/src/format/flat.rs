//! Flat `lora_a` / `lora_b` tensors, bare or below a module's path, in safetensors; also what `.npz` shares.
//!
//! Programs differ in which way the factors lie: A (in, rank), B (rank, out) as candle's LoRA and MLX, or
//! A (rank, in), B (out, rank) as PEFT. The shapes say which, unless both readings give a rank that is no
//! larger than the layer. Files that were written here say it in their header, and their alpha too.

use std::collections::BTreeMap;
use std::path::Path;

use super::container::Container;
use super::json::show;
use super::pairs::{self, Carried, Found, Lie, Pairs, Side, plain_alpha, scalar_tensor, settled, transposed};
use super::source::{Content as Kind, Source};
use super::styles::Content;
use super::tensor::Tensor;
use super::{LoadOptions, Loaded, ModuleKind, Orientation, fingerprint};
use crate::error::{Error, Result};

/// Path of the module whose tensors have no path before them.
const BARE: &str = "lora";
/// Header entry: `rank_first` or `rank_last`.
const ORIENTATION: &str = "microlora.orientation";

/// One tensor's name, understood.
pub(super) enum Key<'a> {
    Factor(&'a str, Side),
    Alpha(&'a str),
    Other,
}

pub(super) fn classify(key: &str) -> Key<'_> {
    let (path, leaf) = key.rsplit_once('.').unwrap_or((BARE, key));
    match leaf {
        _ if path.is_empty() => Key::Other,
        "lora_a" => Key::Factor(path, Side::A),
        "lora_b" => Key::Factor(path, Side::B),
        "lora_A" if path == BARE => Key::Factor(path, Side::A),
        "lora_B" if path == BARE => Key::Factor(path, Side::B),
        "alpha" => Key::Alpha(path),
        _ => Key::Other,
    }
}

/// A key that only this style has.
pub(super) fn is_key(key: &str) -> bool {
    matches!(classify(key), Key::Factor(..)) && !key.contains(".lora_A") && !key.contains(".lora_B")
}

pub(super) fn knows(_: &Source) -> bool {
    false // by its keys alone
}

pub(super) fn name_of(orientation: Orientation) -> &'static str {
    match orientation {
        Orientation::RankFirst => "rank_first",
        Orientation::RankLast => "rank_last",
    }
}

pub(super) fn orientation_of(name: &str, file: &str) -> Result<Orientation> {
    match name {
        "rank_first" => Ok(Orientation::RankFirst),
        "rank_last" => Ok(Orientation::RankLast),
        other => Err(Error::format(
            file,
            format!("orientation: got {}, expected rank_first or rank_last", show(other)),
        )),
    }
}

pub(super) fn read(source: Source, opts: &LoadOptions) -> Result<Loaded> {
    let file = source.file.clone();
    let Kind::Safetensors(content) = source.content else { return Err(source.unknown()) };
    of_container(content, opts, &file)
}

fn of_container(mut content: Container, opts: &LoadOptions, file: &str) -> Result<Loaded> {
    let said = content.metadata.remove(ORIENTATION).map(|o| orientation_of(&o, file)).transpose()?;
    let carried = Carried::take(content.metadata, file)?;
    build(content.tensors, &BTreeMap::new(), carried, said, opts, file)
}

/// An adapter from flat tensors; `lies` has those by name that lie otherwise than in safetensors, `said` is what
/// the file says of their orientation.
pub(super) fn build(
    tensors: Vec<Tensor>,
    lies: &BTreeMap<String, Lie>,
    mut carried: Carried,
    said: Option<Orientation>,
    opts: &LoadOptions,
    file: &str,
) -> Result<Loaded> {
    let mut found = Found::default();
    let mut pairs = Pairs::new(file);
    let mut alphas = Vec::new();
    // Late, so that no tensor is copied twice.
    let settle = |t: Tensor, turn: bool| {
        let lie = lies.get(&t.name).copied().unwrap_or_default();
        settled(t, lie, turn)
    };
    for t in tensors {
        match classify(&t.name) {
            Key::Factor(path, side) => {
                let path = path.to_owned();
                pairs.put(&path, side, t)?;
            }
            Key::Alpha(path) => alphas.push((path.to_owned(), t)),
            Key::Other => found.leave(settle(t, false)),
        }
    }
    for (path, t) in alphas {
        let t = settle(t, false);
        match pairs.slots.contains_key(&path) {
            true => pairs.put_alpha(&path, &t)?,
            false => found.leave(t),
        }
    }
    let mut both = BTreeMap::new();
    for (path, mut slot) in pairs.slots {
        let alpha = slot.alpha.take().map(|(_, alpha)| alpha);
        both.insert(path.clone(), (slot.both(&path, file)?, alpha));
    }
    let shapes = both.iter().map(|(path, ([a, b], _))| (path.as_str(), &a.1, &b.1));
    if let (Some(given), Some(said)) = (opts.orientation.filter(|o| Some(*o) != said), said) {
        let [given, said] = [given, said].map(name_of);
        let reason =
            format!("orientation: got {}, expected none: this file says {}", show(given), show(said));
        return Err(Error::format(file, reason));
    }
    let orientation = decide(shapes, opts.orientation.or(said), file)?;
    for (path, (both, stored)) in both {
        let both = both.map(|(key, t)| (key, settle(t, orientation == Orientation::RankLast)));
        let rank = both[0].1.shape.first().copied().unwrap_or(0);
        let Some(alpha) = stored.or_else(|| carried.alpha_of(&path, rank)).or(opts.alpha) else {
            let reason = format!(
                "module {}: no alpha in this file, so the scaling is unknown; pass alpha= (alpha = rank is factor 1; \
                 of an MLX adapter pass its directory with adapter_config.json)",
                show(&path)
            );
            return Err(Error::format(file, reason));
        };
        let mut m = pairs::module(&path, ModuleKind::Linear, both, |_| alpha, opts, file)?;
        carried.restore(&path, &mut m, |own| own.to_bits() == alpha.to_bits());
        found.add(m);
    }
    found.carried = carried;
    found.finish(opts, file)
}

/// Which way the factors of a file lie: all the same way, and no rank above the layer's own.
fn decide<'a>(
    pairs: impl Iterator<Item = (&'a str, &'a Tensor, &'a Tensor)>,
    told: Option<Orientation>,
    file: &str,
) -> Result<Orientation> {
    let (mut first, mut last, mut some) = (true, true, None);
    for (path, a, b) in pairs {
        let (&[x, y], &[z, w]) = (&a.shape[..], &b.shape[..]) else {
            let t = if a.shape.len() == 2 { b } else { a };
            let reason = format!("tensor {}: shape {:?}, expected two dimensions", show(&t.name), t.shape);
            return Err(Error::format(file, reason));
        };
        // (rank, in) (out, rank), and (in, rank) (rank, out).
        let fits = [x == w, y == z];
        let wide = [x > y.min(z), y > x.min(w)];
        let describe =
            || format!("tensors {} {:?} and {} {:?}", show(&a.name), a.shape, show(&b.name), b.shape);
        if let Some(told) = told {
            if !fits[told as usize] {
                let want = ["(rank, in) and (out, rank)", "(in, rank) and (rank, out)"][told as usize];
                let reason = format!("{}: expected {want} with one rank ({})", describe(), name_of(told));
                return Err(Error::format(file, reason));
            }
            continue;
        }
        let (is_first, is_last) = match (fits[0] && !wide[0], fits[1] && !wide[1]) {
            (false, false) => (fits[0], fits[1]),
            sane => sane,
        };
        first &= is_first;
        last &= is_last;
        if !first && !last {
            let reason = format!(
                "{}: expected (rank, in) and (out, rank), or (in, rank) and (rank, out), the same way in all modules",
                describe()
            );
            return Err(Error::format(file, reason));
        }
        some.get_or_insert((path, describe()));
    }
    match (told, first, last, some) {
        (Some(told), ..) => Ok(told),
        (None, true, false, _) => Ok(Orientation::RankFirst),
        (None, false, true, _) => Ok(Orientation::RankLast),
        (None, _, _, Some((_, what))) => {
            let reason = format!(
                "{what}: the shapes do not say which way the factors lie; pass orientation=\"rank_first\" (A (rank, in)) \
                 or orientation=\"rank_last\" (A (in, rank))"
            );
            Err(Error::format(file, reason))
        }
        (None, _, _, None) => Err(Error::format(file, "no lora_a and lora_b")),
    }
}

/// Writes A (in, rank) and B (rank, out), a module of the path `lora` under bare names.
pub(super) fn save(path: &Path, content: &Content) -> Result<Vec<String>> {
    let bare = content.modules.len() == 1 && content.modules[0].path == BARE;
    let mut tensors: Vec<Tensor> = Vec::with_capacity(3 * content.modules.len());
    for m in &content.modules {
        let name = |leaf: &str| if bare { leaf.to_owned() } else { format!("{}.{leaf}", m.path) };
        tensors.push(Tensor { name: name("lora_a"), ..transposed(&m.a) });
        tensors.push(Tensor { name: name("lora_b"), ..transposed(&m.b) });
        if !bare {
            tensors.push(scalar_tensor(name("alpha"), plain_alpha(m))?);
        }
    }
    tensors.extend(content.extra.iter().map(|t| (*t).clone()));
    let carried = content.modules.iter().map(|m| (m.path.as_str(), *m));
    let mut header = Carried::give(&content.loaded.parts, carried, "pt")?;
    header.insert(ORIENTATION.into(), name_of(Orientation::RankLast).into());
    let file = path.display().to_string();
    fingerprint::stage(path, header, &tensors, |c| of_container(c, &fingerprint::as_it_is(), &file))?
        .commit()?;
    Ok(Vec::new())
}
