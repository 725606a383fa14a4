//! Laws of the consolidation, on every instruction set: each formula against its float64 twin.

mod laws;
mod refusals;
mod support;
