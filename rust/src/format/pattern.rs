//! `rank_pattern` and `alpha_pattern`: the first key that matches `(.*\.)?(KEY)$` from the start of a
//! module path gives the value. PEFT runs keys with Python's `re`; here every key takes linear time,
//! and what the two engines read differently is refused by name.

use std::collections::{HashMap, HashSet};

use regex::{Regex, RegexBuilder};

use super::json::show;

/// Most bytes of paths, counted once for each key that is not one whole path, that a file may ask for.
const MAX_WORK: usize = 1 << 32;
/// Most keys that need the engine: each is a compiled program.
const MAX_REGEX: usize = 512;
/// Longest key, and all keys of a table together, in bytes: they are kept twice.
const MAX_KEY: usize = 1 << 16;
const MAX_KEYS: usize = 4 << 20;
/// Longest expression that is compiled, in bytes: its syntax tree takes some hundred times as much.
const MAX_EXPRESSION: usize = 1 << 14;
/// Sizes of compiled keys that are tried, and how much all of a table may take together.
const SIZES: [usize; 4] = [1 << 14, 1 << 16, 1 << 18, 1 << 20];
const MAX_COMPILED: usize = 2 << 20;
/// Stands for any character in a suffix: it is no plain character, and an unescaped dot does not match it.
const ANY: char = '\n';

enum Matcher {
    /// `^` and literals: one path. Found by hash, in `Table::exact`.
    Exact,
    /// Literals and dots, the usual key: a suffix at a path boundary.
    Suffix(String),
    Regex(Regex),
}

/// Keys in file order, each with its value.
pub(crate) struct Table<T> {
    entries: Vec<(String, Matcher, T)>,
    exact: HashMap<String, usize>,
    others: usize,
    compiled: usize,
    /// Bytes that the compiled keys take at most.
    size: usize,
    /// Bytes of all keys.
    bytes: usize,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Table { entries: Vec::new(), exact: HashMap::new(), others: 0, compiled: 0, size: 0, bytes: 0 }
    }
}

impl<T> Table<T> {
    /// Number of keys.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Adds a key after all others; the error says what in the key is refused.
    pub fn push(&mut self, key: &str, value: T) -> Result<(), String> {
        let at = self.entries.len();
        if key.len() > MAX_KEY {
            return Err(format!("key {} of {} bytes, the limit is {MAX_KEY}", show(key), key.len()));
        }
        self.bytes += key.len();
        if self.bytes > MAX_KEYS {
            return Err(format!("keys of more than {MAX_KEYS} bytes"));
        }
        let matcher = match literal_path(key) {
            Some(path) => {
                self.exact.entry(path).or_insert(at);
                Matcher::Exact
            }
            None => {
                self.others += 1;
                match suffix(key) {
                    Some(s) => Matcher::Suffix(s),
                    None => {
                        self.compiled += 1;
                        if self.compiled > MAX_REGEX {
                            return Err(format!("more than {MAX_REGEX} keys that are not plain paths"));
                        }
                        let (regex, size) = compile(key, MAX_COMPILED - self.size)?;
                        self.size += size;
                        Matcher::Regex(regex)
                    }
                }
            }
        };
        self.entries.push((key.to_owned(), matcher, value));
        Ok(())
    }

    /// Refuses a table whose use on `paths` would take too long.
    pub fn check_work(&self, paths: &[&str]) -> Result<(), String> {
        let bytes: usize = paths.iter().map(|p| p.len() + 1).sum();
        match self.others.checked_mul(bytes) {
            Some(n) if n <= MAX_WORK => Ok(()),
            _ => Err(format!("{} pattern keys on {} modules take too long", self.others, paths.len())),
        }
    }

    /// Position and value of the first key that matches `path`.
    pub fn find(&self, path: &str) -> Option<(usize, &T)> {
        let exact = self.exact.get(path).copied();
        let until = exact.unwrap_or(self.entries.len());
        let first =
            (self.others > 0).then(|| self.entries[..until].iter().position(|(_, m, _)| m.matches(path)));
        let at = first.flatten().or(exact)?;
        Some((at, &self.entries[at].2))
    }

    /// Keys that match none of `paths`, alone and whatever the others match.
    pub fn unmatched(&self, paths: &[&str]) -> Vec<&str> {
        let known: HashSet<&str> = paths.iter().copied().collect();
        let matched = |key: &str, m: &Matcher| match m {
            Matcher::Exact => literal_path(key).is_some_and(|want| known.contains(want.as_str())),
            other => paths.iter().any(|p| other.matches(p)),
        };
        self.entries.iter().filter(|(key, m, _)| !matched(key, m)).map(|(key, ..)| key.as_str()).collect()
    }
}

impl Matcher {
    fn matches(&self, path: &str) -> bool {
        match self {
            Matcher::Exact => false,
            Matcher::Regex(r) => r.is_match(path),
            Matcher::Suffix(want) => {
                let mut chars = path.chars().rev();
                let same = |w: char, c: char| if w == ANY { c != '\n' } else { w == c };
                want.chars().rev().all(|w| chars.next().is_some_and(|c| same(w, c)))
                    && chars.next().is_none_or(|c| c == '.')
            }
        }
    }
}

/// The key that matches `path` and nothing else, in both engines.
pub(crate) fn anchored(path: &str) -> String {
    format!("^{}", regex::escape(path))
}

/// The path of a key that is `^` and (escaped) literals.
fn literal_path(key: &str) -> Option<String> {
    let mut out = String::with_capacity(key.len());
    let mut chars = key.strip_prefix('^')?.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => out.push(chars.next().filter(char::is_ascii_punctuation)?),
            c if is_plain(c) => out.push(c),
            _ => return None,
        }
    }
    Some(out)
}

/// A key of literals, escaped literals and bare dots, which become [`ANY`].
fn suffix(key: &str) -> Option<String> {
    let mut out = String::with_capacity(key.len());
    let mut chars = key.chars();
    while let Some(c) = chars.next() {
        out.push(match c {
            '.' => ANY,
            '\\' => chars.next().filter(char::is_ascii_punctuation)?,
            c if is_plain(c) => c,
            _ => return None,
        });
    }
    Some(out)
}

fn is_plain(c: char) -> bool {
    c.is_alphanumeric() || c == '_' || c == '-' || c == '/' || c == ':' || c == ' '
}

fn check_len(expression: &str) -> Result<(), String> {
    if expression.len() <= MAX_EXPRESSION {
        return Ok(());
    }
    let (shown, len) = (show(expression), expression.len());
    Err(format!("pattern {shown} of {len} bytes, the limit is {MAX_EXPRESSION} for a regular expression"))
}

/// A key's program, and the bytes that it takes at most of the `left` that are granted.
fn compile(key: &str, left: usize) -> Result<(Regex, usize), String> {
    check_len(key)?;
    refuse_python_only(key).map_err(|what| format!("pattern {} uses {what}; write it without", show(key)))?;
    let text = format!(r"\A(?:.*\.)?(?:{key})\z");
    let mut last = "too large together with the patterns before it".to_owned();
    for size in SIZES.into_iter().filter(|&size| size <= left) {
        // The cache of its lazy automaton counts as well.
        match RegexBuilder::new(&text).size_limit(size).dfa_size_limit(size).nest_limit(64).build() {
            Ok(regex) => return Ok((regex, size)),
            Err(e) => last = e.to_string().lines().last().unwrap_or("not a regular expression").to_owned(),
        }
    }
    Err(format!("pattern {}: {last}", show(key)))
}

/// A pattern that matches a whole path, as `target_modules` may be one.
pub(crate) fn whole(pattern: &str) -> Result<Regex, String> {
    check_len(pattern)?;
    let mut builder = RegexBuilder::new(&format!(r"\A(?:{pattern})\z"));
    let built = builder.size_limit(1 << 20).dfa_size_limit(1 << 20).nest_limit(64).build();
    built.map_err(|e| e.to_string().lines().last().unwrap_or("not a regular expression").to_owned())
}

/// Names the first construct that a linear-time engine cannot run or reads otherwise than Python.
fn refuse_python_only(key: &str) -> Result<(), &'static str> {
    let b = key.as_bytes();
    let (mut i, mut class) = (0, false);
    while i < b.len() {
        let rest = &key.as_bytes()[i..];
        let starts = |s: &str| rest.starts_with(s.as_bytes());
        if b[i] == b'\\' {
            match b.get(i + 1) {
                Some(b'1'..=b'9') if !class => return Err("a backreference"),
                Some(b'<' | b'>') if !class => return Err("\\< or \\>"),
                Some(b'b') if b.get(i + 2) == Some(&b'{') => return Err("\\b{...}"),
                Some(c) if c.is_ascii_alphabetic() && !b"dDwWsSbBntrfvaAux".contains(c) => {
                    return Err("an escape that regular expressions do not share");
                }
                _ => {}
            }
            i += 2;
            continue;
        }
        if class {
            if b[i] == b'[' || starts("&&") || starts("--") || starts("~~") {
                return Err("a set operation inside [...]");
            }
            class = b[i] != b']';
        } else if b[i] == b'[' {
            class = true;
            i += 1 + usize::from(b.get(i + 1) == Some(&b'^'));
            i += usize::from(b.get(i) == Some(&b']')); // a leading ] is a literal
            continue;
        } else if starts("(?=") || starts("(?!") || starts("(?<=") || starts("(?<!") {
            return Err("look-around");
        } else if starts("(?P=") || starts("(?(") {
            return Err("a backreference");
        } else if starts("(?") && !["(?:", "(?P<", "(?i:", "(?s:"].iter().any(|ok| starts(ok)) {
            return Err("an extension (?...)");
        } else if b"*+?}".contains(&b[i]) && b.get(i + 1) == Some(&b'+') {
            return Err("a possessive quantifier");
        }
        i += 1;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(keys: &[&str]) -> Table<usize> {
        let mut t = Table::default();
        keys.iter().enumerate().for_each(|(i, k)| t.push(k, i).unwrap());
        t
    }

    fn first(keys: &[&str], path: &str) -> Option<usize> {
        table(keys).find(path).map(|(at, &v)| {
            assert_eq!(at, v);
            v
        })
    }

    #[test]
    fn keys_match_as_pefts_do() {
        let q = "model.layers.10.self_attn.q_proj";
        assert_eq!(first(&["q_proj"], q), Some(0));
        assert_eq!(first(&["_proj"], q), None);
        assert_eq!(first(&["0.self_attn.q_proj"], q), None);
        assert_eq!(first(&["10.self_attn.q_proj"], q), Some(0));
        assert_eq!(first(&["10xself_attn.q_proj", "10.self.attn.q_proj"], q), Some(1));
        assert_eq!(first(&["^layers.10.self_attn.q_proj"], q), None);
        assert_eq!(first(&[r"^model\.layers\.10\.self_attn\.q_proj"], q), Some(0));
        assert_eq!(first(&[r"model\.layers\.1\d\.self_attn\.(q|v)_proj"], q), Some(0));
        assert_eq!(first(&["k_proj|q_proj"], q), Some(0));
        assert_eq!(first(&[".*proj"], q), Some(0));
        assert_eq!(first(&["q_proj$"], q), Some(0));
        assert_eq!(first(&["model"], q), None);
    }

    #[test]
    fn first_key_in_order_wins() {
        let q = "a.q";
        assert_eq!(first(&["q", r"^a\.q"], q), Some(0));
        assert_eq!(first(&[r"^a\.q", "q"], q), Some(0));
        assert_eq!(first(&["x", ".*", "q"], q), Some(1));
        assert_eq!(first(&[r"^a\.q", r"^a\.q"], q), Some(0));
    }

    #[test]
    fn anchored_keys_match_one_path() {
        for path in ["q", "model.layers.0.q_proj", "a+b.c(d)", "a-b.c#d&e~f", "é.ü", "x y"] {
            let key = anchored(path);
            assert_eq!(first(&[&key], path), Some(0), "{key}");
            assert_eq!(first(&[&key], &format!("m.{path}")), None, "{key}");
            assert!(compile(&key, MAX_COMPILED).unwrap().0.is_match(path), "{key}");
        }
        assert_eq!(first(&[&anchored("a.b")], "axb"), None);
    }

    #[test]
    fn what_engines_do_not_share_is_refused_by_name() {
        for (key, what) in [
            ("(?=q)q_proj", "look-around"),
            ("(?<!x)q", "look-around"),
            (r"(q)\1", "a backreference"),
            ("(?P<a>q)(?P=a)", "a backreference"),
            ("q++", "possessive"),
            ("(?>q)", "extension"),
            ("(?i)q", "extension"),
            ("[a&&b]", "set operation"),
            ("[[a]]", "set operation"),
            (r"q\Z", "escape"),
        ] {
            let err = Table::default().push(key, 0).unwrap_err();
            assert!(err.contains(what) && err.contains(&format!("{key:?}")), "{key}: {err}");
        }
        for key in ["q(", "[q", "*", "(a{1000}){1000}{1000}", &"(".repeat(1000)] {
            assert!(Table::default().push(key, 0).is_err(), "{key}");
        }
        for key in [r"[\d\]]q", "[]a]q", "[^]a]q", "(?:q|v)", "(?P<n>q)", r"\(q\)", "q{1,2}"] {
            Table::default().push(key, 0).unwrap_or_else(|e| panic!("{e}"));
        }
    }

    #[test]
    fn hostile_keys_take_linear_time() {
        let mut t = Table::default();
        t.push("(a*)*b", 0).unwrap();
        assert!(t.find(&"a".repeat(100_000)).is_none());
        assert!(t.check_work(&["x"; 1000]).is_ok());
        let long = "x".repeat(1 << 20);
        assert!(t.check_work(&[&long[..]; 5000]).is_err());
        let mut many = Table::default();
        let pushed = (0..1000).take_while(|i| many.push(&format!("(a{i})"), 0).is_ok()).count();
        assert!((64..=MAX_REGEX).contains(&pushed), "{pushed}");
    }

    #[test]
    fn plain_keys_are_bounded_alone_and_together() {
        let mut t = Table::default();
        for i in 0..MAX_KEYS / MAX_KEY {
            t.push(&format!("{i:05}{}", "x".repeat(MAX_KEY - 5)), i).unwrap();
        }
        assert!(t.push("y", 0).unwrap_err().contains("keys of more than"));
        let long = "x".repeat(MAX_KEY + 1);
        assert!(Table::default().push(&long, 0).unwrap_err().contains("65537 bytes"));
    }

    #[test]
    fn whole_patterns_are_bounded() {
        let matches = |p: &str, path: &str| whole(p).map(|r| r.is_match(path));
        assert_eq!(matches("a|b", "b"), Ok(true));
        assert_eq!(matches("a|b", "ab"), Ok(false));
        assert!(matches(&"x".repeat(MAX_EXPRESSION), "x").is_ok());
        assert!(matches(&"x".repeat(MAX_EXPRESSION + 1), "x").unwrap_err().contains("16385 bytes"));
        let long = format!("({})", "x".repeat(MAX_EXPRESSION));
        assert!(Table::default().push(&long, 0).unwrap_err().contains("16386 bytes"));
        // Plain names are no expressions.
        assert!(Table::default().push(&long[1..MAX_EXPRESSION], 0).is_ok());
        for bad in ["(", "((a{99}){99}){99}", &"(".repeat(100)] {
            assert!(matches(bad, "x").is_err(), "{bad}");
        }
    }

    #[test]
    fn unmatched_keys_are_told() {
        let t = table(&["q", "^z", "(x|y)", "^a\\.q"]);
        assert_eq!(t.unmatched(&["a.q", "a.v"]), ["^z", "(x|y)"]);
    }
}
