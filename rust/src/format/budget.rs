//! What a header or a JSON text may cost in memory, which is more than its own length: a tensor of no bytes
//! still has a name, a shape and a place in several tables.

/// Granted beyond the bytes of the file itself. With the file in memory, and what the parser needs at once,
/// reading stays below twice the file and 16 MB.
const SLACK: usize = 11 << 20;

/// What a tensor takes in all tables of a reader together, with the copies of its name.
pub(crate) fn tensor_cost(name: &str) -> usize {
    640 + 5 * name.len()
}

/// Bytes that may still be taken.
#[derive(Debug)]
pub(crate) struct Budget {
    whole: usize,
    left: usize,
}

impl Budget {
    /// For a file of that many bytes.
    pub fn of_file(len: usize) -> Self {
        let whole = len.saturating_add(SLACK);
        Budget { whole, left: whole }
    }

    /// Takes an estimate; the error is a reason without a file name.
    pub fn take(&mut self, bytes: usize) -> Result<(), String> {
        self.left = self.left.checked_sub(bytes).ok_or_else(|| {
            format!("would take more than the {} bytes of memory that a file of its size may", self.whole)
        })?;
        Ok(())
    }

    /// Gives back what is no longer held.
    pub fn give(&mut self, bytes: usize) {
        self.left = self.left.saturating_add(bytes).min(self.whole);
    }
}

/// Bytes of the longest string or number of a JSON text, without parsing it.
pub(crate) fn longest_token(json: &str) -> usize {
    let (mut longest, mut start, mut inside, mut escaped) = (0, 0, false, false);
    for (i, &b) in json.as_bytes().iter().enumerate() {
        let ends = match (inside, b) {
            (true, _) if escaped => {
                escaped = false;
                continue;
            }
            (true, b'\\') => {
                escaped = true;
                continue;
            }
            (true, b'"') => {
                inside = false;
                true
            }
            (true, _) => continue,
            (false, b'"') => {
                inside = true;
                true
            }
            (false, b',' | b':' | b'[' | b']' | b'{' | b'}' | b' ' | b'\t' | b'\n' | b'\r') => true,
            (false, _) => continue,
        };
        if ends {
            longest = longest.max(i - start);
            start = i + 1;
        }
    }
    longest.max(json.len().saturating_sub(start))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_token_is_found() {
        for (text, want) in [
            ("", 0),
            ("{}", 0),
            (r#"{"abc": 1}"#, 3),
            (r#"{"a\"b": [12345, "x"]}"#, 5),
            (r#"{"a": "no, comma: [ends] it"}"#, 20),
            (r#""open"#, 4),
            ("[1e99999, 2]", 7),
            (r#"{"a": "\\", "b": 1}"#, 2),
            ("        ", 0),
        ] {
            assert_eq!(longest_token(text), want, "{text}");
        }
    }

    #[test]
    fn a_budget_ends() {
        let mut budget = Budget::of_file(100);
        budget.take(SLACK).unwrap();
        budget.take(100).unwrap();
        assert!(budget.take(1).unwrap_err().contains("bytes of memory"));
        budget.give(5);
        budget.take(5).unwrap();
    }
}
