//! Model Breadcrumbs (arXiv 2312.06795): neither the outliers nor the smallest entries.

use super::elect::Join;
use super::threshold::share_of;
use super::{Bands, Context, Method, Thinned};
use crate::error::Result;
use crate::learn::basis::Tick;

/// Drops the `gamma` of largest entries (rounded down, perhaps none) and keeps the `density` that follow; entries
/// equal to the first or the last of those stay too.
fn band(c: &Context<'_>, tick: &mut Tick<'_>) -> Result<Bands> {
    let all = c.deltas.entries();
    Bands::between(c, share_of(c.spec.gamma, all), share_of(c.spec.density, all), tick)
}

pub(crate) fn prepare<'a>(c: &Context<'a>, tick: &mut Tick<'_>) -> Result<Box<dyn Method + 'a>> {
    Ok(Box::new(Thinned { thin: band(c, tick)?, join: Join::sum(c.parents, c.spec) }))
}

/// The same entries, with TIES' election and mean.
pub(crate) fn prepare_ties<'a>(c: &Context<'a>, tick: &mut Tick<'_>) -> Result<Box<dyn Method + 'a>> {
    Ok(Box::new(Thinned { thin: band(c, tick)?, join: Join::elect(c.parents, c.spec) }))
}
