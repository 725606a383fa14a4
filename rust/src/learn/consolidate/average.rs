//! The mean of all sides in weight space; with a shared A that is the mean of their changes
//! (Model soups, arXiv 2203.05482). Trains nothing, so it is idempotent and does not see the order of its sides.

use super::Problem;
use super::strategy::{Mix, Plan};

pub(super) fn plan(p: &Problem) -> Plan {
    let others = 1 + p.snapshots.len();
    Plan { mix: vec![Mix::Share(1.0 / (others + 1) as f64); others], ..Plan::default() }
}
