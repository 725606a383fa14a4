//! Laws of every strategy, the float64 twin of the objective, and the gate.

mod fixtures;
mod gate;
mod laws;
mod newton;
mod speed;
mod twin;
