//! LoRA on raw parameters of mixtures of experts: all experts in one pair, and each by itself.

use std::collections::BTreeMap;

use super::super::json::show;
use super::super::tensor::Tensor;
use super::super::{AdapterParts, ModuleKind, ModuleParts};
use super::CONFIG_FILE;
use super::config::{self, PeftConfig};
use super::names::{Key, classify};
use crate::error::{Error, Result};

/// Takes packed experts apart: their pairs leave the tensors kept as they lie and become modules of
/// kind [`ModuleKind::Experts`]. In A the expert varies slowest, in B fastest (as in PEFT's
/// `ParamWrapper`). `experts` is their number, where ranks by pattern leave it open.
///
/// # Errors
/// No packed experts, or a number of them that the configuration does not give.
pub fn unpack_experts(parts: &AdapterParts, experts: Option<usize>) -> Result<AdapterParts> {
    let none = || Error::config("adapter", "no packed experts", "a PEFT file with target_parameters");
    let text = parts.peft_config.as_deref().ok_or_else(none)?;
    let config = config::parse(text, CONFIG_FILE)?;
    let mut out = AdapterParts { extra: Vec::new(), ..parts.clone() };
    let mut found: BTreeMap<String, [Option<&Tensor>; 2]> = BTreeMap::new();
    for t in &parts.extra {
        match classify(&t.name) {
            Key::Factor { path, factor, embedding: false, .. }
                if config.raw_kind(&path) == Some("target_parameters") =>
            {
                found.entry(path).or_default()[factor as usize] = Some(t);
            }
            _ => out.extra.push(t.clone()),
        }
    }
    if found.is_empty() {
        return Err(none());
    }
    for (path, pair) in found {
        let [Some(a), Some(b)] = pair else {
            return Err(Error::config("adapter", show(&path), "both factors of each module"));
        };
        out.modules.push(unpack(path, a, b, &config, experts)?);
    }
    Ok(out)
}

fn unpack(
    path: String,
    a: &Tensor,
    b: &Tensor,
    config: &PeftConfig,
    experts: Option<usize>,
) -> Result<ModuleParts> {
    let (&[rows, inputs], &[outputs, columns]) = (&a.shape[..], &b.shape[..]) else {
        return Err(Error::shape(&path, format!("{:?}, {:?}", a.shape, b.shape), "two matrices"));
    };
    if rows != columns {
        return Err(Error::shape(&path, format!("{:?}, {:?}", a.shape, b.shape), "as many rows as columns"));
    }
    let fits = |&(rank, _): &(usize, f64)| {
        rows.is_multiple_of(rank) && experts.is_none_or(|n| n.checked_mul(rank) == Some(rows))
    };
    let scalings: Vec<_> = config.parameter_scalings(&path).into_iter().filter(fits).collect();
    let &[(rank, alpha)] = &scalings[..] else {
        let got = experts.map_or("none".to_owned(), |n| n.to_string());
        let want = format!(
            "the number of experts of {}: {rows} rows and the ranks of the configuration give {}",
            show(&path),
            if scalings.is_empty() { "none such" } else { "several; their alphas must agree" }
        );
        return Err(Error::config("experts", got, want));
    };
    let experts = rows / rank;
    let size = b.dtype.bitsize() / 8;
    let mut data = Vec::with_capacity(b.data.len());
    for e in 0..experts {
        for o in 0..outputs {
            for r in 0..rank {
                let at = (o * columns + r * experts + e) * size;
                data.extend_from_slice(&b.data[at..at + size]);
            }
        }
    }
    let name = |which: &str| format!("{path}.{which}");
    let a = Tensor::new(name("lora_a"), a.dtype, vec![experts, rank, inputs], a.data.clone())?;
    let b = Tensor::new(name("lora_b"), b.dtype, vec![experts, outputs, rank], data)?;
    Ok(ModuleParts { path, kind: ModuleKind::Experts, alpha, rank, use_rslora: config.use_rslora, a, b })
}

/// The two tensors that PEFT holds for a module of kind [`ModuleKind::Experts`]: (experts * rank, in) and
/// (out, rank * experts).
pub(super) fn pack(m: &ModuleParts) -> Result<(Tensor, Tensor)> {
    let (&[experts, rank, inputs], &[_, outputs, _]) = (&m.a.shape[..], &m.b.shape[..]) else {
        let got = format!("{:?}, {:?}", m.a.shape, m.b.shape);
        return Err(Error::shape(&m.path, got, "(experts, rank, in) and (experts, out, rank)"));
    };
    let size = m.b.dtype.bitsize() / 8;
    let mut data = Vec::with_capacity(m.b.data.len());
    for o in 0..outputs {
        for r in 0..rank {
            for e in 0..experts {
                let at = ((e * outputs + o) * rank + r) * size;
                data.extend_from_slice(&m.b.data[at..at + size]);
            }
        }
    }
    let a = Tensor::new(&m.a.name, m.a.dtype, vec![experts * rank, inputs], m.a.data.clone())?;
    let b = Tensor::new(&m.b.name, m.b.dtype, vec![outputs, rank * experts], data)?;
    Ok((a, b))
}
