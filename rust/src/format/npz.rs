//! NumPy archives: arrays `<module>.lora_a`, `<module>.lora_b` and `<module>.alpha`.
//!
//! Orientation and alpha as in [`super::flat`]. Written stored, A (rank, in) and B (out, rank), with an array
//! of bytes `microlora` that holds what arrays cannot say. Object arrays are pickles, and never opened.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::json;

use super::json::{StringMap, show};
use super::pairs::{Carried, Lie, plain_alpha, widened};
use super::source::{self, Content as Kind, Source};
use super::styles::Content;
use super::tensor::{Bytes, Tensor, TensorDtype, byte_len};
use super::{LoadOptions, Loaded, MAX_DIMS, Orientation, atomic, fingerprint, flat, zip};
use crate::error::{Error, Result};

const NPY: &[u8] = b"\x93NUMPY";
/// Longest header of an array, in bytes.
const MAX_NPY_HEADER: usize = 1 << 16;
/// Array of bytes with a JSON object of strings.
const OURS: &str = "microlora";
const ORIENTATION: &str = "orientation";

/// True when the first member of a zip is an array.
pub(super) fn is_npz(head: &[u8]) -> bool {
    let length = |at: usize| Some(usize::from(u16::from_le_bytes([*head.get(at)?, *head.get(at + 1)?])));
    let name = length(26).and_then(|n| head.get(30..30 + n));
    head.starts_with(zip::MAGIC) && name.is_some_and(|n| n.ends_with(b".npy"))
}

pub(super) fn knows(source: &Source) -> bool {
    matches!(&source.content, Kind::Other(bytes) if is_npz(bytes))
}

pub(super) fn read(source: Source, opts: &LoadOptions) -> Result<Loaded> {
    let file = source.file.clone();
    let Kind::Other(bytes) = source.content else { return Err(source.unknown()) };
    let (mut tensors, mut lies) = (Vec::new(), BTreeMap::new());
    let (mut header, mut said) = (BTreeMap::new(), None);
    for member in zip::members(&bytes, &opts.limits, &file)? {
        let Some(name) = member.name.strip_suffix(".npy") else {
            if member.name.ends_with(".pkl") || member.name.ends_with("/data.pkl") {
                return Err(source::refuse_pickle(&source.path));
            }
            return Err(Error::format(
                &file,
                format!("zip: member {}: expected arrays (.npy)", show(&member.name)),
            ));
        };
        let content = member.read(&bytes, &file)?;
        let array = parse(&content, name, &file)?;
        if name == OURS {
            (header, said) = ours(&array, &file)?;
        } else {
            let (tensor, lie) = array.tensor(name, &file, &source.path)?;
            lies.insert(tensor.name.clone(), lie);
            tensors.push(tensor);
        }
    }
    let carried = Carried::take(header, &file)?;
    flat::build(tensors, &lies, carried, said, opts, &file)
}

/// An array of a file: its type as NumPy writes it, and its content in the file's order.
struct Array {
    descr: String,
    fortran: bool,
    shape: Vec<usize>,
    data: Bytes,
}

fn parse(content: &Bytes, name: &str, file: &str) -> Result<Array> {
    let wrong = |what: &str| Error::format(file, format!("array {}: {what}", show(name)));
    let truncated = || wrong("truncated");
    if !content.starts_with(NPY) {
        return Err(wrong("no NumPy header"));
    }
    let &[major, _minor] = content.get(6..8).ok_or_else(truncated)? else { return Err(truncated()) };
    let (start, length) = match (major, &content[8..]) {
        (1, [a, b, ..]) => (10, usize::from(u16::from_le_bytes([*a, *b]))),
        (2 | 3, [a, b, c, d, ..]) => (12, u32::from_le_bytes([*a, *b, *c, *d]) as usize),
        (1..=3, _) => return Err(truncated()),
        _ => return Err(wrong(&format!("version {major} of the format, expected 1 to 3"))),
    };
    if length > MAX_NPY_HEADER {
        return Err(wrong(&format!("a header of {length} bytes, the limit is {MAX_NPY_HEADER}")));
    }
    let header = content.get(start..start + length).ok_or_else(truncated)?;
    let text = std::str::from_utf8(header).map_err(|_| wrong("a header that is not UTF-8"))?;
    let mut p = Parser { rest: text };
    let (descr, fortran, shape) = p.header().ok_or_else(|| {
        wrong(&format!("header {}: expected descr (a plain type), fortran_order and shape", show(text)))
    })?;
    let data = content.slice(start + length..content.len()).ok_or_else(truncated)?;
    Ok(Array { descr, fortran, shape, data })
}

/// The dictionary of a header, of which only this much is legal.
struct Parser<'a> {
    rest: &'a str,
}

impl<'a> Parser<'a> {
    fn eat(&mut self, token: &str) -> Option<()> {
        self.rest = self.rest.trim_start().strip_prefix(token)?;
        Some(())
    }

    fn string(&mut self) -> Option<&'a str> {
        let quote = self.rest.trim_start().chars().next().filter(|q| matches!(q, '\'' | '"'))?;
        self.eat(&quote.to_string())?;
        let (inside, rest) = self.rest.split_once(quote)?;
        self.rest = rest;
        (!inside.contains('\\')).then_some(inside)
    }

    fn number(&mut self) -> Option<usize> {
        self.rest = self.rest.trim_start();
        let digits = self.rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(self.rest.len());
        let (number, rest) = self.rest.split_at(digits);
        self.rest = rest;
        number.parse().ok()
    }

    fn tuple(&mut self) -> Option<Vec<usize>> {
        self.eat("(")?;
        let mut out = Vec::new();
        while self.eat(")").is_none() {
            if out.len() == MAX_DIMS {
                return None;
            }
            out.push(self.number()?);
            if self.eat(",").is_none() {
                self.eat(")")?;
                break;
            }
        }
        Some(out)
    }

    fn header(&mut self) -> Option<(String, bool, Vec<usize>)> {
        let (mut descr, mut fortran, mut shape) = (None, None, None);
        self.eat("{")?;
        while self.eat("}").is_none() {
            let key = self.string()?;
            self.eat(":")?;
            let once = match key {
                "descr" => descr.replace(self.string()?.to_owned()).is_none(),
                "fortran_order" if self.eat("True").is_some() => fortran.replace(true).is_none(),
                "fortran_order" => {
                    self.eat("False")?;
                    fortran.replace(false).is_none()
                }
                "shape" => shape.replace(self.tuple()?).is_none(),
                _ => false,
            };
            if !once {
                return None;
            }
            if self.eat(",").is_none() {
                self.eat("}")?;
                break;
            }
        }
        self.rest.trim().is_empty().then_some(())?;
        Some((descr?, fortran?, shape?))
    }
}

impl Array {
    /// As a tensor, and how it lies.
    fn tensor(self, name: &str, file: &str, path: &Path) -> Result<(Tensor, Lie)> {
        let wrong = |what: String| Error::format(file, format!("array {}: {what}", show(name)));
        let (order, kind) = self.descr.split_at_checked(1).unwrap_or(("", ""));
        if kind.starts_with('O') {
            return Err(source::refuse_pickle(path));
        }
        let dtype = match kind {
            "f8" => TensorDtype::F64,
            "f4" => TensorDtype::F32,
            "f2" => TensorDtype::F16,
            "i8" => TensorDtype::I64,
            "i4" => TensorDtype::I32,
            "i2" => TensorDtype::I16,
            "i1" => TensorDtype::I8,
            "u1" => TensorDtype::U8,
            "b1" => TensorDtype::BOOL,
            _ => {
                let reason = format!("array {}: dtype {}, expected numbers", show(name), show(&self.descr));
                return Err(Error::unsupported(file, reason));
            }
        };
        if !matches!(order, "<" | ">" | "|" | "=") {
            return Err(wrong(format!("dtype {}, expected a byte order", show(&self.descr))));
        }
        let want = byte_len(dtype, &self.shape);
        if want != Some(self.data.len()) {
            let got = self.data.len();
            return Err(wrong(format!("{got} bytes of data for {} {:?}", self.descr, self.shape)));
        }
        let Array { fortran, shape, data, .. } = self;
        if fortran && shape.len() > 2 {
            return Err(wrong(format!("shape {shape:?}, expected two dimensions")));
        }
        let lie = Lie { swapped: order == ">", columns: fortran && shape.len() == 2 };
        Ok((Tensor { name: name.to_owned(), dtype, shape, data }, lie))
    }
}

/// What we wrote beside the arrays.
fn ours(array: &Array, file: &str) -> Result<(BTreeMap<String, String>, Option<Orientation>)> {
    let wrong = |what: &str| Error::format(file, format!("array \"{OURS}\": {what}"));
    if !array.descr.starts_with("|S") {
        return Err(wrong("expected bytes"));
    }
    let text = std::str::from_utf8(&array.data).map_err(|_| wrong("not UTF-8"))?;
    let StringMap(mut header) =
        serde_json::from_str(text.trim_end_matches('\0')).map_err(|e| wrong(&e.to_string()))?;
    let said = header.remove(ORIENTATION).map(|o| flat::orientation_of(&o, file)).transpose()?;
    Ok((header, said))
}

/// A header of version 1, or 2 where it is long, padded so that the data is aligned to 64 bytes.
fn npy_head(descr: &str, shape: &[usize]) -> Vec<u8> {
    let comma = if shape.len() == 1 { "," } else { "" };
    let dims: Vec<String> = shape.iter().map(usize::to_string).collect();
    let mut text =
        format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({}{comma}), }}", dims.join(", "));
    while (10 + text.len() + 1) % 64 != 0 {
        text.push(' ');
    }
    text.push('\n');
    let mut out = [NPY, &[1, 0]].concat();
    out.extend_from_slice(&(text.len() as u16).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
    out
}

pub(super) fn save(path: &Path, content: &Content) -> Result<Vec<String>> {
    let (mut widths, mut tensors) = (Vec::new(), Vec::new());
    let mut wide = 0;
    for m in &content.modules {
        let leads = |s: &str| s == ".." || s == ".";
        if m.path.starts_with('/') || m.path.contains('\\') || m.path.split('/').any(leads) || m.path == OURS
        {
            let want = "a name that can stand in an archive";
            return Err(Error::config("module path", show(&m.path), want));
        }
        for (t, leaf) in [(&m.a, "lora_a"), (&m.b, "lora_b")] {
            let (descr, dtype, data) = match t.dtype {
                TensorDtype::F16 => ("<f2", t.dtype, t.data.clone()),
                TensorDtype::F32 => ("<f4", t.dtype, t.data.clone()),
                _ => {
                    wide += 1;
                    let wide: Vec<u8> = widened(t).iter().flat_map(|x| x.to_le_bytes()).collect();
                    ("<f4", TensorDtype::F32, Bytes::from(wide))
                }
            };
            let name = format!("{}.{leaf}", m.path);
            tensors.push(Tensor { name, dtype, shape: t.shape.clone(), data: data.clone() });
            widths.push((format!("{}.{leaf}.npy", m.path), npy_head(descr, &t.shape), data));
        }
        let alpha = Bytes::from(plain_alpha(m).to_le_bytes().to_vec());
        tensors.push(Tensor::new(format!("{}.alpha", m.path), TensorDtype::F64, vec![], alpha.clone())?);
        widths.push((format!("{}.alpha.npy", m.path), npy_head("<f8", &[]), alpha));
    }
    let carried = content.modules.iter().map(|m| (m.path.as_str(), *m));
    let mut header = Carried::give(&content.loaded.parts, carried, "npz")?;
    let (file, as_is, said) = (path.display().to_string(), fingerprint::as_it_is(), Orientation::RankFirst);
    let carried = Carried::take(header.clone(), &file)?;
    let read = flat::build(tensors, &BTreeMap::new(), carried, Some(said), &as_is, &file)?;
    header.insert(fingerprint::KEY.into(), read.fingerprint()?);
    header.insert(ORIENTATION.into(), flat::name_of(said).into());
    let text = json!(header).to_string();
    widths.push((
        format!("{OURS}.npy"),
        npy_head(&format!("|S{}", text.len()), &[]),
        text.into_bytes().into(),
    ));
    let members: Vec<(String, Vec<u8>, &[u8])> =
        widths.iter().map(|(name, head, data)| (name.clone(), head.clone(), &data[..])).collect();
    atomic::write(path, |out| zip::write(out, &members))?;
    Ok(match wide {
        0 => Vec::new(),
        n => vec![format!("{n} arrays of bfloat16 were widened to float32, exactly: NumPy has no bfloat16")],
    })
}
