//! Kind "mas": `E |d |y|^2 / d th|`, which needs no labels (memory aware synapses, Aljundi 2018).
//!
//! A per-sample gradient is an outer product, so its absolute values are one as well.

use super::accumulator::Accumulator;
use super::quadratic::{Quadratic, Source};
use super::{KindRow, Statistic};
use crate::factor::Factor;
use crate::layer::Layer;

#[derive(Debug)]
struct Magnitudes;

impl Source for Magnitudes {
    fn task(&self, seen: &Accumulator, _layer: &Layer) -> Option<[Factor; 2]> {
        seen.fisher()
    }
}

pub(super) const ROW: KindRow = KindRow {
    name: "mas",
    lambda: 0.03,
    statistic: Statistic::Magnitudes,
    proximal: true,
    path: false,
    make: |layer, _| Box::new(Quadratic::new(layer, Box::new(Magnitudes))),
};
