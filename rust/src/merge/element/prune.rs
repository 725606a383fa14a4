//! Magnitude pruning: each parent's largest entries as they are, then a weighted sum.

use super::elect::Join;
use super::ties::trim;
use super::{Context, Method, Thinned};
use crate::error::Result;
use crate::learn::basis::Tick;

pub(crate) fn prepare<'a>(c: &Context<'a>, tick: &mut Tick<'_>) -> Result<Box<dyn Method + 'a>> {
    Ok(Box::new(Thinned { thin: trim(c, tick)?, join: Join::sum(c.parents, c.spec) }))
}
