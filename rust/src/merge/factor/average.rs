//! The plain mean (model soups, Wortsman et al., arXiv 2203.05482).

use super::Pieces;
use crate::error::Result;

/// `1 / m` each.
pub(crate) fn mix(p: &Pieces<'_>) -> Result<Vec<f64>> {
    Ok(vec![1.0 / p.len() as f64; p.len()])
}
