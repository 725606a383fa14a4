//! One LoRA per expert as llama.cpp wants them: in one tensor of three dimensions.

use std::collections::BTreeMap;

use super::super::json::show;
use super::super::tensor::Tensor;
use super::super::{FactorParts, Loaded, ModuleKind, ModuleParts, QuantModuleParts};
use crate::error::{Error, Result};

/// Puts the linear modules of each group, in the order given, into one of kind [`ModuleKind::Experts`] under the
/// group's path, at the place of its first.
///
/// # Errors
/// A module that is missing, or that differs from the first of its group in rank, alpha, sizes or types.
pub fn stack(mut loaded: Loaded, groups: &BTreeMap<String, Vec<String>>, file: &str) -> Result<Loaded> {
    let places: BTreeMap<String, usize> =
        loaded.parts.modules.iter().enumerate().map(|(i, m)| (m.path.clone(), i)).collect();
    let mut stacked: BTreeMap<usize, (ModuleParts, Option<QuantModuleParts>)> = BTreeMap::new();
    let mut gone = Vec::new();
    for (path, members) in groups {
        let of = members.iter().map(|name| {
            let lost = || Error::format(file, format!("module {}: not in the file", show(name)));
            places.get(name).copied().ok_or_else(lost)
        });
        let of = of.collect::<Result<Vec<usize>>>()?;
        let Some(&first) = of.first() else { continue };
        let modules: Vec<&ModuleParts> = of.iter().map(|&i| &loaded.parts.modules[i]).collect();
        let blocks: Option<Vec<&QuantModuleParts>> =
            loaded.quantized.as_ref().map(|q| of.iter().map(|&i| &q[i]).collect());
        stacked.insert(first, one(path, &modules, blocks.as_deref(), file)?);
        gone.extend(of.into_iter().filter(|i| *i != first));
    }
    for (at, (module, blocks)) in stacked {
        loaded.parts.modules[at] = module;
        if let (Some(all), Some(blocks)) = (&mut loaded.quantized, blocks) {
            all[at] = blocks;
        }
    }
    keep(&mut loaded.parts.modules, &gone);
    loaded.quantized.iter_mut().for_each(|all| keep(all, &gone));
    loaded.weights_sha256 = None; // it is of the modules in the file
    Ok(loaded)
}

fn keep<T>(all: &mut Vec<T>, gone: &[usize]) {
    let mut at = 0;
    all.retain(|_| {
        at += 1;
        !gone.contains(&(at - 1))
    });
}

fn one(
    path: &str,
    modules: &[&ModuleParts],
    blocks: Option<&[&QuantModuleParts]>,
    file: &str,
) -> Result<(ModuleParts, Option<QuantModuleParts>)> {
    let first = modules[0];
    for m in modules {
        let what = |m: &ModuleParts| {
            let (a, b) = ((m.a.dtype, &m.a.shape), (m.b.dtype, &m.b.shape));
            format!("{} of alpha {} (rslora: {}), A {a:?}, B {b:?}", m.kind.as_str(), m.alpha, m.use_rslora)
        };
        if m.kind != ModuleKind::Linear || what(m) != what(first) {
            let reason = format!(
                "module {}: {}, but {}: {}; llama.cpp has one tensor for all experts, so that rank, alpha and types \
                 must be the same",
                show(&m.path),
                what(m),
                show(&first.path),
                what(first)
            );
            return Err(Error::unsupported(file, reason));
        }
    }
    let tensor = |which: &str, of: fn(&ModuleParts) -> &Tensor| {
        let data: Vec<u8> = modules.iter().flat_map(|m| of(m).data.iter().copied()).collect();
        let shape = [&[modules.len()], &of(first).shape[..]].concat();
        Tensor::new(format!("{path}.{which}"), of(first).dtype, shape, data)
    };
    let (a, b) = (tensor("lora_a", |m| &m.a)?, tensor("lora_b", |m| &m.b)?);
    let kind = ModuleKind::Experts;
    let ModuleParts { alpha, rank, use_rslora, .. } = *first;
    let module = ModuleParts { path: path.into(), kind, alpha, rank, use_rslora, a, b };
    let Some(blocks) = blocks else { return Ok((module, None)) };
    let a = factor(&blocks.iter().map(|m| &m.a).collect::<Vec<_>>(), &module.a, file)?;
    let b = factor(&blocks.iter().map(|m| &m.b).collect::<Vec<_>>(), &module.b, file)?;
    let blocks = QuantModuleParts { path: path.into(), kind, alpha, rank, use_rslora, a, b };
    Ok((module, Some(blocks)))
}

/// Blocks of all experts, row after row; `numbers` where none are blocks.
fn factor(all: &[&FactorParts], numbers: &Tensor, file: &str) -> Result<FactorParts> {
    let (mut bytes, mut height, mut first) = (Vec::new(), 0, None);
    for factor in all {
        let found = match factor {
            FactorParts::Plain(_) => None,
            FactorParts::Blocks { kind, along, rows, cols, data } => {
                bytes.extend_from_slice(data);
                height += rows;
                Some((*kind, *along, *cols))
            }
        };
        if *first.get_or_insert(found) != found {
            let reason = format!("{}: blocks of different types; one tensor has one", show(&numbers.name));
            return Err(Error::unsupported(file, reason));
        }
    }
    Ok(match first.flatten() {
        None => FactorParts::Plain(numbers.clone()),
        Some((kind, along, cols)) => {
            FactorParts::Blocks { kind, along, rows: height, cols, data: bytes.into() }
        }
    })
}
