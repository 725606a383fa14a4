//! Kind "l2": every weight matters equally, F = 1. The baseline that a Fisher has to beat.

use super::accumulator::Accumulator;
use super::quadratic::{Quadratic, Source};
use super::{KindRow, Statistic};
use crate::dtype::Dtype;
use crate::factor::Factor;
use crate::layer::Layer;

#[derive(Debug)]
struct Ones;

impl Source for Ones {
    fn task(&self, _seen: &Accumulator, layer: &Layer) -> Option<[Factor; 2]> {
        let ones =
            |f: &Factor| Factor::from_rows(&vec![1.0; f.rank() * f.len()], f.rank(), f.len(), Dtype::F32);
        Some([ones(&layer.a), ones(&layer.b)])
    }

    fn sums(&self) -> bool {
        false
    }
}

pub(super) const ROW: KindRow = KindRow {
    name: "l2",
    lambda: 1.0,
    statistic: Statistic::None,
    proximal: true,
    path: false,
    make: |layer, _| Box::new(Quadratic::new(layer, Box::new(Ones))),
};
