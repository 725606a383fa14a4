//! Accepted events go to the reservoir, with what the accepted weights answer to them.

use super::members::Members;
use super::window::Pending;
use super::{Accepted, Back, Sona};
use crate::replay::Sample;

impl Sona {
    /// Offers a window to the reservoir.
    pub(super) fn absorb(&self, back: &mut Back, members: &Members, taken: &[Pending], route: &[usize]) {
        let rehearses = self.settings.reservoir_capacity > 0;
        let width = self.lora.shape(0).0;
        let mut stored = Vec::new();
        for (p, &member) in taken.iter().zip(route) {
            let s = &p.sample;
            if !(p.held_out || rehearses) {
                continue;
            }
            let member = member.min(members.loras.len() - 1);
            self.answers(&back.slow[member], s.module, &s.x, &mut stored);
            let pattern = if s.x.len() == width { back.bank.assign(&s.x).map_or(0, |(i, _)| i) } else { 0 };
            // A sample that does not fit its storage is not kept; it has been learned from all the same.
            drop(back.reservoir.offer(s, &stored, pattern as u32));
        }
    }

    /// What accepted weights answer (`dY`), module after module.
    fn answers(&self, accepted: &Accepted, module: Option<u32>, x: &[f32], out: &mut Vec<f32>) {
        let modules = self.concerned(module.map(|m| m as usize));
        out.clear();
        out.resize(modules.clone().map(|m| self.lora.shape(m).1).sum(), 0.0);
        let mut first = 0;
        for m in modules {
            let layer = accepted.learners[m].master();
            let n = layer.out_features();
            // x was checked when it came.
            let ok = layer.forward(self.kernels, x, &mut out[first..first + n], false).is_ok();
            debug_assert!(ok);
            first += n;
        }
    }

    /// Samples of the reservoir: those that are trained on, or those held out.
    pub fn samples(&self, held_out: bool) -> Vec<Sample> {
        let _inside = self.gate.enter();
        self.back().reservoir.part(held_out).iter().map(|e| e.to_sample()).collect()
    }

    /// Renews what the reservoir holds as answers, after weights that share no A with the old ones.
    pub(super) fn answer_again(&self, back: &mut Back) {
        let slow = back.slow[0].clone();
        let mut answer = Vec::new();
        let renewed = back.reservoir.restore_output(|e, out| {
            self.answers(&slow, e.module, &e.x(), &mut answer);
            out.copy_from_slice(&answer);
            Ok(())
        });
        // Weights and inputs are finite within limits that their products are too.
        debug_assert!(renewed.is_ok());
    }
}
