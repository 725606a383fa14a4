//! Hot swap: what each call promises, and under load, where every read is exactly one generation.

mod load;
mod rules;

use std::sync::Arc;

use microlora::factor::Factor;
use microlora::layer::Layer;
use microlora::rng::Rng;
use microlora::{Adapter, Dtype};

const N: usize = 96;
const READERS: usize = 8;
const MODULES: [&str; 2] = ["q_proj", "v_proj"];

fn numbers(seed: u64, n: usize) -> Vec<f32> {
    let mut rng = Rng::new(seed, 9);
    (0..n).map(|_| rng.symmetric(1.0)).collect()
}

fn layer(seed: u64, rank: usize, n_in: usize, n_out: usize) -> Arc<Layer> {
    let factor = |seed, n| Factor::from_rows(&numbers(seed, rank * n), rank, n, Dtype::F32);
    Arc::new(Layer::new(factor(2 * seed, n_in), factor(2 * seed + 1, n_out), 8.0, false).unwrap())
}

fn adapter_of(modules: &[(&str, Arc<Layer>)]) -> Arc<Adapter> {
    let modules = modules.iter().map(|(n, l)| ((*n).to_string(), Arc::clone(l))).collect();
    Arc::new(Adapter { modules, ..Adapter::default() })
}

/// Adapters of other ranks, and in another order of modules.
fn version(i: u64) -> Arc<Adapter> {
    let mut of: Vec<_> = MODULES
        .iter()
        .enumerate()
        .map(|(m, n)| (*n, layer(10 * i + m as u64, 2 + i as usize % 7, N, N)))
        .collect();
    if i % 2 == 1 {
        of.reverse();
    }
    adapter_of(&of)
}
