//! Core errors as the exceptions of `microlora.exceptions`.

use pyo3::exceptions::{PyMemoryError, PyOSError};
use pyo3::import_exception;
use pyo3::prelude::*;

use crate::error::Error;

import_exception!(microlora.exceptions, ShapeError);
import_exception!(microlora.exceptions, DTypeError);
import_exception!(microlora.exceptions, NonFiniteError);
import_exception!(microlora.exceptions, SampleError);
import_exception!(microlora.exceptions, ConfigError);
import_exception!(microlora.exceptions, LayoutError);
import_exception!(microlora.exceptions, UnknownModuleError);
import_exception!(microlora.exceptions, UnknownChoiceError);
import_exception!(microlora.exceptions, FeedbackError);
import_exception!(microlora.exceptions, FormatError);
import_exception!(microlora.exceptions, UnsupportedVariantError);
import_exception!(microlora.exceptions, DeviceError);
import_exception!(microlora.exceptions, SwapError);
import_exception!(microlora.exceptions, CancelledError);

impl From<Error> for PyErr {
    #[cold]
    fn from(e: Error) -> PyErr {
        let text = e.to_string();
        match e {
            Error::Shape { .. } => ShapeError::new_err(text),
            Error::Dtype { .. } => DTypeError::new_err(text),
            Error::NonFinite { .. } => NonFiniteError::new_err(text),
            Error::Sample { row, steps_done, .. } => SampleError::new_err((text, row, steps_done)),
            Error::Layout { .. } => LayoutError::new_err(text),
            Error::Config { .. } => ConfigError::new_err(text),
            Error::UnknownModule { .. } => UnknownModuleError::new_err(text),
            Error::UnknownChoice { .. } => UnknownChoiceError::new_err(text),
            Error::Feedback(_) => FeedbackError::new_err(text),
            Error::Format { .. } => FormatError::new_err(text),
            Error::Unsupported { .. } => UnsupportedVariantError::new_err(text),
            Error::Memory { .. } => PyMemoryError::new_err(text),
            Error::Cancelled(_) => CancelledError::new_err(text),
            Error::Swap { generation, .. } => SwapError::new_err((text, generation)),
            Error::Device(_) => DeviceError::new_err(text),
            // (errno, strerror, filename) lets Python choose FileNotFoundError and its like.
            Error::Io { path, source } => match source.raw_os_error() {
                Some(code) => PyOSError::new_err((code, source.to_string(), path)),
                None => PyErr::from(std::io::Error::new(source.kind(), format!("{path}: {source}"))),
            },
        }
    }
}
