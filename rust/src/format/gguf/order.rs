//! The order of rows in q and k: Hugging Face's halves of a head, or llama.cpp's interleaved pairs.
//!
//! Models of the Llama family rotate pairs `(j, j + d/2)` of a head in `transformers` and `(2j, 2j + 1)` in
//! llama.cpp (RoPE, Su et al., arXiv 2104.09864). The rows of their q and k weights, and of `lora_b` with
//! them, are therefore stored in another order there; other families rotate halves in both.

use crate::error::{Error, Result};

/// Architectures by their name in GGUF, and whether llama.cpp stores their q and k interleaved. One that is
/// not here is taken for one that may.
const ARCHITECTURES: [(&str, bool); 27] = [
    ("arcee", true),
    ("granite", true),
    ("granitehybrid", true),
    ("granitemoe", true),
    ("llada", true),
    ("llama", true),
    ("minicpm", true),
    ("olmo", true),
    ("smollm3", true),
    ("apertus", false),
    ("cohere2", false),
    ("command-r", false),
    ("gemma", false),
    ("gemma2", false),
    ("gemma3", false),
    ("gemma3n", false),
    ("gpt-oss", false),
    ("llama4", false),
    ("nemotron", false),
    ("olmo2", false),
    ("phi3", false),
    ("qwen2", false),
    ("qwen2moe", false),
    ("qwen3", false),
    ("qwen3moe", false),
    ("seed_oss", false),
    ("starcoder2", false),
];

/// Whether llama.cpp interleaves the rows of q and k of an architecture; `None` where that is not known.
pub fn interleaves(architecture: &str) -> Option<bool> {
    ARCHITECTURES.iter().find_map(|&(name, yes)| (name == architecture).then_some(yes))
}

/// True for a base tensor whose rows such an architecture stores in another order.
pub(super) fn is_rotated(path: &str) -> bool {
    matches!(path.rsplit('.').next(), Some("attn_q" | "attn_k" | "attn_qkv"))
}

/// Which way to reorder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Towards {
    /// Halves to interleaved pairs: rows seen as (heads, 2, d/2), the last two swapped.
    Llama,
    /// Back.
    Model,
}

/// Reorders rows of any type (`row` bytes each) within each of `heads` heads; nothing but their order changes.
///
/// # Errors
/// Rows that are no whole number of heads with an even number of rows each.
pub fn reorder(data: &[u8], row: usize, heads: usize, towards: Towards, arg: &str) -> Result<Vec<u8>> {
    let rows = data.len().checked_div(row).unwrap_or(0);
    let per_head = rows.checked_div(heads).unwrap_or(0);
    if rows * row != data.len() || per_head * heads != rows || !per_head.is_multiple_of(2) || per_head == 0 {
        let want = format!("rows for {heads} heads of an even size (base_config)");
        return Err(Error::shape(arg, format!("{rows} rows"), want));
    }
    let half = per_head / 2;
    let mut out = vec![0; data.len()];
    for head in 0..heads {
        for j in 0..half {
            for part in 0..2 {
                let (split, paired) = (head * per_head + part * half + j, head * per_head + 2 * j + part);
                let (from, to) = match towards {
                    Towards::Llama => (split, paired),
                    Towards::Model => (paired, split),
                };
                out[to * row..][..row].copy_from_slice(&data[from * row..][..row]);
            }
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_become_pairs_and_back() {
        let rows: Vec<u8> = (0..12).flat_map(|i| [i, 100 + i]).collect();
        let there = reorder(&rows, 2, 2, Towards::Llama, "b").unwrap();
        let firsts: Vec<u8> = there.iter().step_by(2).copied().collect();
        assert_eq!(firsts, [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]);
        assert_eq!(reorder(&there, 2, 2, Towards::Model, "b").unwrap(), rows);
        assert_ne!(reorder(&there, 2, 2, Towards::Llama, "b").unwrap(), rows);
    }

    #[test]
    fn refuses_rows_that_are_no_heads() {
        for (len, row, heads) in [(12, 2, 4), (12, 1, 4), (13, 2, 2), (12, 2, 0), (0, 2, 2), (4, 0, 1)] {
            assert!(reorder(&vec![0; len], row, heads, Towards::Llama, "b").is_err(), "{len} {row} {heads}");
        }
    }

    #[test]
    fn each_architecture_is_listed_once() {
        for (i, (name, _)) in ARCHITECTURES.iter().enumerate() {
            assert!(ARCHITECTURES[..i].iter().all(|(n, _)| n != name), "{name}");
        }
        assert_eq!(interleaves("llama"), Some(true));
        assert_eq!(interleaves("phi3"), Some(false));
        assert_eq!(interleaves("brand-new"), None);
    }
}
