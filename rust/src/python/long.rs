//! The protocol of long work: signals, a progress callback and a cancel token, between pieces of it.

use pyo3::prelude::*;

use crate::error::{Error, Result};

/// Runs `work` without the GIL. Its tick looks at signals, asks `cancel.raise_if_cancelled(what)` and calls
/// `progress(done, total, what)`; an exception of any of them ends the work and is raised.
pub(super) fn long_call<R: Send>(
    py: Python<'_>,
    what: &str,
    progress: Option<Py<PyAny>>,
    cancel: Option<Py<PyAny>>,
    work: impl FnOnce(&mut dyn FnMut(usize, usize) -> Result<()>) -> Result<R> + Send,
) -> PyResult<R> {
    let mut raised: Option<PyErr> = None;
    let result = py.detach(|| {
        let mut tick = |done: usize, total: usize| {
            Python::attach(|py| -> PyResult<()> {
                py.check_signals()?;
                if let Some(cancel) = &cancel {
                    cancel.call_method1(py, "raise_if_cancelled", (what,))?;
                }
                if let Some(progress) = &progress {
                    progress.call1(py, (done, total, what))?;
                }
                Ok(())
            })
            .map_err(|e| {
                raised = Some(e);
                Error::Cancelled(what.into())
            })
        };
        work(&mut tick)
    });
    match (result, raised) {
        (_, Some(e)) => Err(e),
        (result, None) => Ok(result?),
    }
}
