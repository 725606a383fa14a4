//! TIES: trim, elect sign, disjoint merge (arXiv 2306.01708), on the change.

use super::super::spec::Semantics;
use super::elect::Join;
use super::threshold::share_of;
use super::{Bands, Context, Method, Thinned};
use crate::error::Result;
use crate::learn::basis::Tick;

/// Each parent's `density` of largest entries; entries equal to the smallest of them stay too.
pub(super) fn trim(c: &Context<'_>, tick: &mut Tick<'_>) -> Result<Bands> {
    let all = c.deltas.entries();
    let keep = match c.spec.semantics {
        Semantics::Peft => (c.spec.density * all as f64) as usize,
        _ => share_of(c.spec.density, all),
    };
    Bands::between(c, 0, keep, tick)
}

pub(crate) fn prepare<'a>(c: &Context<'a>, tick: &mut Tick<'_>) -> Result<Box<dyn Method + 'a>> {
    Ok(Box::new(Thinned { thin: trim(c, tick)?, join: Join::elect(c.parents, c.spec) }))
}
