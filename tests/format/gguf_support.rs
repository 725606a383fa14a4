//! GGUF bytes by hand, so that every field can be wrong.

use microlora::Error;
use microlora::format::{LoadOptions, Loaded, gguf};

/// One value: its type and bytes.
#[derive(Clone)]
pub struct Value(pub u32, pub Vec<u8>);

pub fn text(s: impl AsRef<[u8]>) -> Value {
    Value(8, bytes(s))
}

pub fn f32(v: f32) -> Value {
    Value(6, v.to_le_bytes().to_vec())
}

pub fn u32(v: u32) -> Value {
    Value(4, v.to_le_bytes().to_vec())
}

pub fn array(item: u32, count: u64, items: &[u8]) -> Value {
    Value(9, [&item.to_le_bytes()[..], &count.to_le_bytes(), items].concat())
}

/// A length and the bytes.
pub fn bytes(s: impl AsRef<[u8]>) -> Vec<u8> {
    [&(s.as_ref().len() as u64).to_le_bytes()[..], s.as_ref()].concat()
}

#[derive(Clone)]
pub struct Row {
    pub name: Vec<u8>,
    /// Fastest first, as in the file.
    pub dims: Vec<u64>,
    pub kind: u32,
    pub offset: u64,
}

/// A file under construction; every field can be changed before it is put together.
#[derive(Clone)]
pub struct Draft {
    pub magic: [u8; 4],
    pub version: u32,
    pub keys: Vec<(Vec<u8>, Value)>,
    pub key_count: Option<u64>,
    pub tensors: Vec<Row>,
    pub tensor_count: Option<u64>,
    pub alignment: usize,
    pub data: Vec<u8>,
}

impl Draft {
    /// One module of rank 2, 6 inputs and 4 outputs, f32.
    pub fn good() -> Self {
        let keys = [
            ("general.architecture", text("qwen2")),
            ("general.type", text("adapter")),
            ("adapter.type", text("lora")),
            ("adapter.lora.alpha", f32(4.0)),
        ];
        let mut draft = Draft {
            magic: *b"GGUF",
            version: 3,
            keys: keys.into_iter().map(|(k, v)| (k.as_bytes().to_vec(), v)).collect(),
            key_count: None,
            tensors: Vec::new(),
            tensor_count: None,
            alignment: 32,
            data: Vec::new(),
        };
        draft.pair("blk.0.ffn_up.weight", 6, 4, 2);
        draft
    }

    /// Appends the two factors of one base tensor, numbers counted up.
    pub fn pair(&mut self, name: &str, inputs: u64, outputs: u64, rank: u64) {
        self.tensor(&format!("{name}.lora_a"), &[inputs, rank], 0, &numbers(inputs * rank));
        self.tensor(&format!("{name}.lora_b"), &[rank, outputs], 0, &numbers(outputs * rank));
    }

    pub fn tensor(&mut self, name: &str, dims: &[u64], kind: u32, data: &[u8]) {
        let offset = self.data.len() as u64;
        self.tensors.push(Row { name: name.into(), dims: dims.to_vec(), kind, offset });
        self.data.extend(data);
        self.data.resize(self.data.len().next_multiple_of(self.alignment), 0);
    }

    pub fn set(&mut self, key: &str, value: Value) {
        match self.keys.iter_mut().find(|(k, _)| k == key.as_bytes()) {
            Some((_, old)) => *old = value,
            None => self.keys.push((key.into(), value)),
        }
    }

    pub fn unset(&mut self, key: &str) {
        self.keys.retain(|(k, _)| k != key.as_bytes());
    }

    pub fn build(&self) -> Vec<u8> {
        let mut out = self.magic.to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.tensor_count.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.key_count.unwrap_or(self.keys.len() as u64).to_le_bytes());
        for (key, Value(kind, data)) in &self.keys {
            out.extend(bytes(key));
            out.extend(kind.to_le_bytes());
            out.extend(data);
        }
        for t in &self.tensors {
            out.extend(bytes(&t.name));
            out.extend((t.dims.len() as u32).to_le_bytes());
            out.extend(t.dims.iter().flat_map(|d| d.to_le_bytes()));
            out.extend(t.kind.to_le_bytes());
            out.extend(t.offset.to_le_bytes());
        }
        out.resize(out.len().next_multiple_of(self.alignment), 0);
        out.extend(&self.data);
        out
    }

    pub fn load(&self) -> Result<Loaded, Error> {
        gguf::from_memory(&self.build(), &LoadOptions::default())
    }
}

/// f32 bytes of 1, 2, 3 ...
pub fn numbers(count: u64) -> Vec<u8> {
    (1..=count).flat_map(|i| (i as f32).to_le_bytes()).collect()
}
