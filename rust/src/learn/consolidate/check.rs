//! Refuses what a consolidation could not end well with, before any work.

use super::{Problem, Rows, Settings, Side};
use crate::dtype::Dtype;
use crate::error::{Error, Result};

pub(super) fn problem(p: &Problem) -> Result<()> {
    settings(&p.settings)?;
    let shape = (p.slow.b.rank(), p.slow.b.len());
    side("slow", &p.slow, shape)?;
    side("fast", &p.fast, shape)?;
    for (i, s) in p.snapshots.iter().enumerate() {
        side(&format!("snapshots[{i}]"), s, shape)?;
    }
    rows("window", &p.window, shape)?;
    rows("replay", &p.replay, shape)
}

fn settings(s: &Settings) -> Result<()> {
    let from_zero = [
        ("logit_weight", s.logit_weight),
        ("replay_ratio", s.replay_ratio),
        ("ewc_lambda", s.ewc_lambda),
        ("ridge", s.ridge),
    ];
    for (arg, v) in from_zero {
        if !(v.is_finite() && v >= 0.0) {
            return Err(Error::config(arg, v, "a finite number of 0 or more"));
        }
    }
    if !(s.best_share > 0.0 && s.best_share <= 1.0) {
        return Err(Error::config("best_share", s.best_share, "a share above 0 and at most 1"));
    }
    if !s.quality_threshold.is_finite() {
        return Err(Error::config("quality_threshold", s.quality_threshold, "a finite number"));
    }
    Ok(())
}

fn side(arg: &str, s: &Side, (rank, out): (usize, usize)) -> Result<()> {
    if (s.b.rank(), s.b.len()) != (rank, out) {
        let got = format!("({}, {})", s.b.rank(), s.b.len());
        return Err(Error::shape(format!("{arg}.b"), got, format!("({rank}, {out}) as slow")));
    }
    if s.b.dtype() != Dtype::F32 {
        return Err(Error::Dtype {
            arg: format!("{arg}.b"),
            got: s.b.dtype().to_string(),
            want: "f32".into(),
        });
    }
    if s.gram.len() != rank * rank {
        let got = format!("{} numbers", s.gram.len());
        return Err(Error::shape(format!("{arg}.gram"), got, format!("({rank}, {rank})")));
    }
    if !s.b.is_finite() {
        return Err(Error::non_finite(format!("{arg}.b")));
    }
    if !s.gram.iter().all(|v| v.is_finite()) || (0..rank).any(|i| s.gram[i * rank + i] < 0.0) {
        let detail = ", or a negative diagonal".into();
        return Err(Error::NonFinite { arg: format!("{arg}.gram"), detail });
    }
    if s.quality.is_some_and(|q| !q.is_finite()) {
        return Err(Error::non_finite(format!("{arg}.quality")));
    }
    Ok(())
}

/// Shapes of all, values of what is small; wide arrays show in their products.
pub(super) fn rows(arg: &str, s: &Rows, (rank, out): (usize, usize)) -> Result<()> {
    let n = s.len();
    if n == 0 {
        return Ok(());
    }
    if (s.rank, s.out) != (rank, out) {
        let got = format!("rank {}, out {}", s.rank, s.out);
        return Err(Error::shape(arg, got, format!("rank {rank}, out {out} as slow")));
    }
    let arrays = [
        ("u", s.u.len(), n * rank),
        ("base", s.base.len(), n * out),
        ("advantage", s.advantage.len(), n),
        ("weight", s.weight.len(), n),
        ("quality", s.quality.len(), n),
        ("event", s.event.len(), n),
        ("stored", s.stored.len(), if s.stored.is_empty() { 0 } else { n * out }),
    ];
    for (name, got, want) in arrays {
        if got != want {
            let want = format!("{want} for {n} samples");
            return Err(Error::shape(format!("{arg}.{name}"), format!("{got} numbers"), want));
        }
    }
    if let Some(i) = s.feedback.iter().position(|f| f.width() != out) {
        let got = format!("({},)", s.feedback[i].width());
        return Err(Error::shape(format!("{arg}.feedback[{i}]"), got, format!("({out},)")));
    }
    for (name, values) in [("u", &s.u), ("advantage", &s.advantage), ("weight", &s.weight)] {
        if !values.iter().all(|v| v.is_finite()) {
            return Err(Error::non_finite(format!("{arg}.{name}")));
        }
    }
    if s.quality.iter().any(|q| q.is_infinite()) {
        return Err(Error::non_finite(format!("{arg}.quality")));
    }
    if let Some(w) = s.weight.iter().find(|w| **w < 0.0) {
        return Err(Error::config(format!("{arg}.weight"), w, "0 or more"));
    }
    Ok(())
}

/// Names the wide array whose values made a sum overflow or turn into NaN.
pub(super) fn blame(p: &Problem) -> Error {
    for (arg, rows) in [("window", &p.window), ("replay", &p.replay)] {
        for (name, values) in [("base", &rows.base), ("stored", &rows.stored)] {
            if !values.iter().all(|v| v.is_finite()) {
                return Error::non_finite(format!("{arg}.{name}"));
            }
        }
    }
    Error::NonFinite { arg: "window".into(), detail: ": its gradient overflows float32".into() }
}
