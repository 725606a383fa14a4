//! Stand-in until the ewc room is merged.
use pyo3::prelude::*;

use super::error::ConfigError;
use crate::MicroLora;
use crate::learn::Regularizer;

pub(super) struct Anchor;

impl Anchor {
    pub fn of(ewc: Option<&Bound<'_, PyAny>>, _lora: &MicroLora) -> PyResult<Self> {
        match ewc {
            None => Ok(Anchor),
            Some(_) => Err(ConfigError::new_err("ewc: not there yet")),
        }
    }
    pub fn get(&mut self) -> Option<&mut dyn Regularizer> {
        None
    }
}
