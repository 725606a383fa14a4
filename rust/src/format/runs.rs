//! What of a file is run: nothing is left out that the caller did not give up by name.

use std::collections::{BTreeSet, HashSet};

use super::json::show;
use super::peft::variants::plain_config;
use super::{AdapterParts, Loaded, ModuleKind, QuantModuleParts, Variant};
use crate::error::{Error, Result};

/// Kinds without which nothing is left that could run: their factors are no pair of one linear layer.
const NOTHING_ELSE: [&str; 4] = ["qalora", "bdlora", "kasa", "arrow"];

/// Most kinds that one refusal names; only a made-up file has more.
const MAX_NAMED: usize = 64;

/// Tensors beside the factors that no format but their own has a place for.
pub(super) const EXTRA: &str = "extra";

/// Every kind that can be given up by name (`drop:<kind>`), sorted.
pub fn variant_kinds() -> BTreeSet<String> {
    let others = super::kohya::kinds().chain([EXTRA, super::gguf::ROW_ORDER]).map(str::to_owned);
    super::peft::variants::kinds().chain(others).collect()
}

/// Words that a file may have brought, fit for a message.
fn short(text: &str) -> String {
    const MAX: usize = 400;
    text.chars().filter(|c| !c.is_control()).take(MAX).collect()
}

fn is_allowed(kind: &str, allow: &[String]) -> bool {
    allow.iter().any(|a| a.strip_prefix("drop:") == Some(kind))
}

impl Loaded {
    /// Refuses variants, except those that the caller drops by name (`drop:<kind>`).
    ///
    /// # Errors
    /// The first variant that is not allowed, with all the names to allow.
    pub fn check_runs(&self, file: &str, allow: &[String]) -> Result<()> {
        let said = |v: &Variant, way: &str| {
            let reason = format!(
                "{} ({}): {}; AdapterFile.read keeps it as it is{way}",
                show(&v.at),
                short(&v.kind),
                short(&v.why)
            );
            Err(Error::unsupported(file, reason))
        };
        if let Some(v) = self.variants.iter().find(|v| NOTHING_ELSE.contains(&v.kind.as_str())) {
            return said(v, ", and nothing is left to run without it");
        }
        let mut left = self.variants.iter().filter(|v| !is_allowed(&v.kind, allow)).peekable();
        let Some(first) = left.peek().copied() else { return Ok(()) };
        let mut seen = HashSet::new();
        let kinds = left.map(|v| v.kind.as_str()).filter(|kind| seen.insert(*kind));
        let names: Vec<String> = kinds.take(MAX_NAMED).map(|k| show(&format!("drop:{k}"))).collect();
        said(first, &format!(", allow=[{}] leaves it out", names.join(", ")))
    }

    /// What runs: the linear modules, without the variants that the caller drops by name.
    ///
    /// # Errors
    /// A variant that is not allowed, or nothing left.
    pub fn runnable(mut self, file: &str, allow: &[String]) -> Result<Self> {
        self.check_runs(file, allow)?;
        if self.variants.is_empty() {
            return Ok(self);
        }
        self.parts.modules.retain(|m| m.kind == ModuleKind::Linear);
        if let Some(modules) = &mut self.quantized {
            modules.retain(|m| m.kind == ModuleKind::Linear);
        }
        let has_blocks = |m: &QuantModuleParts| m.a.is_blocks() || m.b.is_blocks();
        self.quantized = self.quantized.filter(|modules| modules.iter().any(has_blocks));
        if self.parts.modules.is_empty() && self.quantized.is_none() {
            let reason = format!("no linear module is left without {}", show(&self.variants[0].kind));
            return Err(Error::unsupported(file, reason));
        }
        // The other tensors and the settings speak of what is no longer there.
        self.parts.extra.clear();
        self.parts.peft_config = self.parts.peft_config.as_deref().and_then(plain_config);
        let mut seen = HashSet::new();
        let dropped = self.variants.drain(..).filter(|v| seen.insert(v.kind.clone()));
        self.notes.extend(dropped.map(|v| format!("left out: {} ({})", show(&v.at), short(&v.kind))));
        self.unused.clear();
        Ok(self)
    }

    /// What PEFT's layout has no place for, as kind and where: variants that a PEFT file of the same
    /// parts would not show, and experts without the names of their parameters.
    ///
    /// # Errors
    /// A PEFT configuration among the parts that is broken.
    pub fn lost_in_peft(&self) -> Result<Vec<&Variant>> {
        let held = super::peft_variants(&self.parts)?;
        let held: HashSet<&str> = held.iter().map(|v| v.kind.as_str()).collect();
        let lost = |v: &&Variant| v.kind == "experts" || !held.contains(v.kind.as_str());
        Ok(self.variants.iter().filter(lost).collect())
    }

    /// The parts for a PEFT directory, without what is lost there.
    ///
    /// # Errors
    /// Those of [`lost_in_peft`](Self::lost_in_peft).
    pub fn peft_parts(&self) -> Result<AdapterParts> {
        let mut parts = self.parts.clone();
        let lost = self.lost_in_peft()?;
        if !lost.is_empty() {
            parts.extra.clear();
            parts.modules.retain(|m| !lost.iter().any(|v| v.kind == m.kind.as_str()));
        }
        Ok(parts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_every_format_can_be_given_up() {
        let kinds = variant_kinds();
        for kind in
            ["dora", "experts", "extra", "init:pissa", "init:unknown", "loha", "lokr", "norm", "row_order"]
        {
            assert!(kinds.contains(kind), "{kind}");
        }
        assert!(
            NOTHING_ELSE.iter().chain(["conv", "embedding", "lora_bias"].iter()).all(|k| kinds.contains(*k))
        );
    }
}
