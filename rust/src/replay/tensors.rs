//! Tensors of a state: written by name, read once each, every size checked before it is used.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, Result};
use crate::format::{Tensor, TensorDtype};

/// Numbers as they lie in files.
pub(super) trait Number: Copy {
    const DTYPE: TensorDtype;
    fn append(self, to: &mut Vec<u8>);
    fn read(b: &[u8]) -> Self;
}

macro_rules! number {
    ($($ty:ty: $dtype:ident),*) => {$(
        impl Number for $ty {
            const DTYPE: TensorDtype = TensorDtype::$dtype;
            fn append(self, to: &mut Vec<u8>) {
                to.extend_from_slice(&self.to_le_bytes());
            }
            fn read(b: &[u8]) -> Self {
                <$ty>::from_le_bytes(b.try_into().expect("chunks of the size"))
            }
        }
    )*};
}
number!(f32: F32, f64: F64, u64: U64, u32: U32, i16: I16, half::f16: F16);

pub(super) fn tensor<T: Number>(
    name: String,
    shape: Vec<usize>,
    values: impl IntoIterator<Item = T>,
) -> Tensor {
    let mut data = Vec::new();
    values.into_iter().for_each(|v| v.append(&mut data));
    Tensor { name, dtype: T::DTYPE, shape, data: data.into() }
}

pub(super) fn document(name: String, value: &impl Serialize) -> Tensor {
    let json = serde_json::to_vec(value).expect("plain numbers and names");
    Tensor { name, dtype: TensorDtype::U8, shape: vec![json.len()], data: json.into() }
}

/// Finds the tensors of one state among others.
pub(super) struct Reader<'a> {
    pub what: &'static str,
    pub prefix: &'a str,
    pub tensors: &'a [Tensor],
}

impl Reader<'_> {
    pub fn wrong(&self, name: &str, reason: impl std::fmt::Display) -> Error {
        Error::format(self.what, format!("tensor {:?}: {reason}", format!("{}{name}", self.prefix)))
    }

    fn find(&self, name: &str, dtype: TensorDtype) -> Result<&Tensor> {
        let is_it = |t: &&Tensor| t.name.strip_prefix(self.prefix) == Some(name);
        let t = self.tensors.iter().find(is_it).ok_or_else(|| self.wrong(name, "missing"))?;
        if t.dtype != dtype {
            return Err(self.wrong(name, format!("got dtype {}, expected {dtype}", t.dtype)));
        }
        t.check_len().map_err(|e| self.wrong(name, e))?;
        Ok(t)
    }

    pub fn document<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        let t = self.find(name, TensorDtype::U8)?;
        serde_json::from_slice(&t.data).map_err(|e| self.wrong(name, e))
    }

    /// The numbers of a tensor of this shape; `None` is any length of that dimension.
    pub fn numbers<T: Number>(&self, name: &str, shape: &[Option<usize>]) -> Result<Vec<T>> {
        let t = self.find(name, T::DTYPE)?;
        let fits = t.shape.len() == shape.len()
            && t.shape.iter().zip(shape).all(|(got, want)| want.is_none_or(|w| w == *got));
        if !fits {
            let want: Vec<_> = shape.iter().map(|n| n.map_or("n".into(), |n| n.to_string())).collect();
            let reason = format!("got shape {:?}, expected ({})", t.shape, want.join(", "));
            return Err(self.wrong(name, reason));
        }
        Ok(t.data.chunks_exact(size_of::<T>()).map(T::read).collect())
    }

    /// The same, all finite.
    pub fn finite(&self, name: &str, shape: &[Option<usize>]) -> Result<Vec<f32>> {
        let v = self.numbers::<f32>(name, shape)?;
        if v.iter().all(|v| v.is_finite()) {
            Ok(v)
        } else {
            Err(self.wrong(name, "contains NaN or infinity"))
        }
    }
}
