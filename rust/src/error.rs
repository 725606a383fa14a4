//! One variant per way to be wrong; every message names the argument, what came and what was wanted.

use thiserror::Error as ThisError;

/// Shorthand for results of the core.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything the core can refuse.
#[derive(Debug, ThisError)]
pub enum Error {
    /// An array of the wrong shape.
    #[error("{arg}: got shape {got}, expected {want}")]
    Shape {
        /// Argument name.
        arg: String,
        /// Shape that came.
        got: String,
        /// Shape that was wanted.
        want: String,
    },
    /// An array of the wrong element type.
    #[error("{arg}: got dtype {got}, expected {want}")]
    Dtype {
        /// Argument name.
        arg: String,
        /// Dtype that came.
        got: String,
        /// Dtype that was wanted.
        want: String,
    },
    /// NaN or infinity where a number was wanted.
    #[error("{arg}: contains NaN or infinity{detail}")]
    NonFinite {
        /// Argument name.
        arg: String,
        /// Where, or what follows from it (may be empty).
        detail: String,
    },
    /// A row of a data set that cannot be learned from; the step that it belongs to changed nothing.
    #[error("{arg}: row {row} {reason}")]
    Sample {
        /// Argument name.
        arg: String,
        /// Row in the whole of the data.
        row: usize,
        /// What is wrong with it.
        reason: String,
        /// Steps done before, by the same call.
        steps_done: usize,
    },
    /// A buffer that cannot be used as it lies in memory.
    #[error("{arg}: {got}, expected {want}")]
    Layout {
        /// Argument name.
        arg: String,
        /// What the buffer is.
        got: String,
        /// What was wanted.
        want: String,
    },
    /// A setting out of its range or a combination that cannot work.
    #[error("{arg}: got {got}, expected {want}")]
    Config {
        /// Argument name.
        arg: String,
        /// Value that came.
        got: String,
        /// What was wanted.
        want: String,
    },
    /// A module name that the adapter does not have.
    #[error("module: got {got:?}, expected one of {have}")]
    UnknownModule {
        /// Name that came.
        got: String,
        /// Names the adapter has.
        have: String,
    },
    /// A reward for a choice that does not wait for one.
    #[error("choice: got {got}, expected one that waits for its reward ({why})")]
    UnknownChoice {
        /// Number that came.
        got: u64,
        /// Why it does not wait.
        why: String,
    },
    /// Feedback that gives no direction.
    #[error("feedback: {0}")]
    Feedback(String),
    /// A file or byte string that is not what it claims to be.
    #[error("{file}: {reason}")]
    Format {
        /// File (or "bytes").
        file: String,
        /// What is wrong, with the tensor's or key's name.
        reason: String,
    },
    /// A file that is sound but of a kind that must not be applied as plain LoRA.
    #[error("{file}: {reason}")]
    Unsupported {
        /// File (or "bytes").
        file: String,
        /// Which variant, and the way out.
        reason: String,
    },
    /// The operating system refused.
    #[error("{path}: {source}")]
    Io {
        /// File or directory.
        path: String,
        /// The system's own error.
        source: std::io::Error,
    },
    /// The caller's cancel token was set.
    #[error("cancelled: {0}")]
    Cancelled(String),
    /// More memory than the system gives.
    #[error("{arg}: {bytes} bytes are wanted, more than the system gives")]
    Memory {
        /// Argument that asks for them.
        arg: String,
        /// Bytes wanted.
        bytes: usize,
    },
    /// A swap that cannot happen; nothing changed.
    #[error("{reason}")]
    Swap {
        /// What is missing, or who was faster.
        reason: String,
        /// Number of the generation that is active.
        generation: u64,
    },
    /// A device that cannot be had.
    #[error("device: {0}")]
    Device(String),
}

impl Error {
    /// Refuses sizes that the system does not give, where the allocation itself would abort the process.
    pub fn check_memory(arg: &str, bytes: Option<usize>) -> Result<()> {
        let wanted = bytes.unwrap_or(usize::MAX);
        match Vec::<u8>::new().try_reserve_exact(wanted) {
            Ok(()) => Ok(()),
            Err(_) => Err(Error::Memory { arg: arg.into(), bytes: wanted }),
        }
    }

    /// A shape error from anything printable.
    pub fn shape(arg: impl Into<String>, got: impl ToString, want: impl ToString) -> Self {
        Error::Shape { arg: arg.into(), got: got.to_string(), want: want.to_string() }
    }

    /// A setting error from anything printable.
    pub fn config(arg: impl Into<String>, got: impl ToString, want: impl ToString) -> Self {
        Error::Config { arg: arg.into(), got: got.to_string(), want: want.to_string() }
    }

    /// A non-finite error without detail.
    pub fn non_finite(arg: impl Into<String>) -> Self {
        Error::NonFinite { arg: arg.into(), detail: String::new() }
    }

    /// A file error.
    pub fn format(file: impl ToString, reason: impl Into<String>) -> Self {
        Error::Format { file: file.to_string(), reason: reason.into() }
    }

    /// An unsupported-variant error.
    pub fn unsupported(file: impl ToString, reason: impl Into<String>) -> Self {
        Error::Unsupported { file: file.to_string(), reason: reason.into() }
    }

    /// An operating-system error with its path.
    pub fn io(path: impl AsRef<std::path::Path>, source: std::io::Error) -> Self {
        Error::Io { path: path.as_ref().display().to_string(), source }
    }
}
