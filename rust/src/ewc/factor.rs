//! Kind "factor": the diagonal Fisher of the factors (Kirkpatrick 2017; online: Schwarz 2018).
//!
//! It charges harmless motion: `A B = (A Q)(Q^-1 B)` is the same adapter at another place.

use super::accumulator::Accumulator;
use super::quadratic::{Quadratic, Source};
use super::{KindRow, Statistic};
use crate::factor::Factor;
use crate::layer::Layer;

#[derive(Debug)]
struct Squares;

impl Source for Squares {
    fn task(&self, seen: &Accumulator, _layer: &Layer) -> Option<[Factor; 2]> {
        seen.fisher()
    }
}

pub(super) const ROW: KindRow = KindRow {
    name: "factor",
    lambda: 10.0,
    statistic: Statistic::Squares,
    proximal: true,
    path: false,
    make: |layer, _| Box::new(Quadratic::new(layer, Box::new(Squares))),
};
