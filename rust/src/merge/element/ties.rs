//! TIES: trim, elect sign, disjoint merge (arXiv 2306.01708), on the change.

use super::elect::Join;
use super::threshold::share_of;
use super::{Bands, Context, Method, Thinned};
use crate::error::Result;
use crate::learn::basis::Tick;

/// Each parent's `density` of largest entries; entries equal to the smallest of them stay too.
pub(super) fn trim(c: &Context<'_>, tick: &mut Tick<'_>) -> Result<Bands> {
    Bands::between(c, 0, share_of(c.spec.density, c.deltas.entries()), tick)
}

pub(crate) fn prepare<'a>(c: &Context<'a>, tick: &mut Tick<'_>) -> Result<Box<dyn Method + 'a>> {
    Ok(Box::new(Thinned { thin: trim(c, tick)?, join: Join::elect(c.parents, c.spec) }))
}
