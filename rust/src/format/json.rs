//! JSON as other programs write it, read strictly: a repeated key is an error at any depth.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::marker::PhantomData;

use serde::de::{
    self, Deserialize, DeserializeOwned, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor,
};
use serde_json::{Map, Number, Value};

use super::budget::Budget;

/// Longest JSON text that is parsed, in bytes.
pub(crate) const MAX_TEXT: usize = 16 << 20;
/// Most entries of a string map.
const MAX_STRINGS: usize = 1 << 16;

/// What a value takes in a growing array, what an entry of an object takes beside its key.
const VALUE_COST: usize = 2 * size_of::<Value>();
const ENTRY_COST: usize = 80;
/// What a key takes in the set of those seen.
const SEEN_COST: usize = 72;

/// A JSON value whose objects have no repeated key.
struct Unique<'a>(&'a mut Budget);

impl Unique<'_> {
    fn take<E: de::Error>(&mut self, bytes: usize) -> Result<(), E> {
        self.0.take(bytes).map_err(E::custom)
    }
}

impl<'de> DeserializeSeed<'de> for Unique<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(mut self, d: D) -> Result<Value, D::Error> {
        self.take::<D::Error>(VALUE_COST)?;
        d.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Unique<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_bool<E>(self, v: bool) -> Result<Value, E> {
        Ok(Value::Bool(v))
    }

    fn visit_i64<E>(self, v: i64) -> Result<Value, E> {
        Ok(Value::from(v))
    }

    fn visit_u64<E>(self, v: u64) -> Result<Value, E> {
        Ok(Value::from(v))
    }

    fn visit_f64<E: de::Error>(self, v: f64) -> Result<Value, E> {
        Number::from_f64(v).map(Value::Number).ok_or_else(|| E::custom("a number that is not finite"))
    }

    fn visit_str<E: de::Error>(mut self, v: &str) -> Result<Value, E> {
        self.take::<E>(v.len())?;
        Ok(Value::from(v))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut out = Vec::new();
        while let Some(v) = seq.next_element_seed(Unique(self.0))? {
            out.push(v);
        }
        Ok(Value::Array(out))
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Value, A::Error> {
        let mut out = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            if out.contains_key(&key) {
                return Err(twice(&key));
            }
            self.take::<A::Error>(ENTRY_COST + key.len())?;
            let value = map.next_value_seed(Unique(self.0))?;
            out.insert(key, value);
        }
        Ok(Value::Object(out))
    }
}

fn twice<E: de::Error>(key: &str) -> E {
    E::custom(format_args!("key {} appears twice", show(key)))
}

/// Like [`Unique`], and keeps nothing of it: the memory of its keys while their object is open.
struct Sound<'a>(&'a mut Budget);

impl<'de> DeserializeSeed<'de> for Sound<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<(), D::Error> {
        d.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Sound<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E: de::Error>(self, v: f64) -> Result<(), E> {
        if v.is_finite() { Ok(()) } else { Err(E::custom("a number that is not finite")) }
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while seq.next_element_seed(Sound(self.0))?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let (mut seen, mut held) = (HashSet::new(), 0);
        while let Some(key) = map.next_key::<String>()? {
            let cost = SEEN_COST + key.len();
            self.0.take(cost).map_err(<A::Error as de::Error>::custom)?;
            held += cost;
            if seen.contains(&key) {
                return Err(twice(&key));
            }
            seen.insert(key);
            map.next_value_seed(Sound(self.0))?;
        }
        self.0.give(held);
        Ok(())
    }
}

/// A JSON object of strings without repeated keys (the `__metadata__` of a safetensors header).
#[derive(Default)]
pub(crate) struct StringMap(pub BTreeMap<String, String>);

impl<'de> Deserialize<'de> for StringMap {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = StringMap;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object whose values are strings")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<StringMap, A::Error> {
                let mut out = BTreeMap::new();
                while let Some((key, value)) = map.next_entry::<String, String>()? {
                    if out.contains_key(&key) {
                        return Err(twice(&key));
                    }
                    if out.len() == MAX_STRINGS {
                        return Err(de::Error::custom(format_args!("more than {MAX_STRINGS} entries")));
                    }
                    out.insert(key, value);
                }
                Ok(StringMap(out))
            }
        }
        d.deserialize_map(V)
    }
}

/// A JSON list of at most so many items.
struct ListWithin<T>(usize, PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for ListWithin<T> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of at most {} items", self.0)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<T>, A::Error> {
        let mut out = Vec::new();
        while let Some(item) = seq.next_element()? {
            if out.len() == self.0 {
                return Err(de::Error::invalid_length(out.len() + 1, &self));
            }
            out.push(item);
        }
        Ok(out)
    }
}

/// Parses a list of at most `most` items, so that a short text cannot fill memory.
pub(crate) fn parse_list<T: DeserializeOwned>(text: &str, most: usize) -> serde_json::Result<Vec<T>> {
    let mut json = serde_json::Deserializer::from_str(text);
    let list = json.deserialize_seq(ListWithin(most, PhantomData))?;
    json.end().map(|()| list)
}

/// Parses one JSON object (key order kept); the error is a reason without a file name. Its values may take
/// what a file of its length may.
pub(crate) fn parse_object(text: &str) -> Result<Map<String, Value>, String> {
    parse_object_within(text, Budget::of_file(text.len()))
}

/// [`parse_object`] with a budget of the caller's.
pub(crate) fn parse_object_within(text: &str, mut budget: Budget) -> Result<Map<String, Value>, String> {
    check_len(text)?;
    let mut json = serde_json::Deserializer::from_str(text);
    match Unique(&mut budget).deserialize(&mut json).and_then(|v| json.end().map(|()| v)) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err("not a JSON object".into()),
        Err(e) => Err(format!("invalid JSON: {e}")),
    }
}

/// Whether [`parse_object`] would find an object, of any number of values.
pub(crate) fn check_object(text: &str) -> Result<(), String> {
    check_len(text)?;
    if !text.trim_start_matches([' ', '\t', '\n', '\r']).starts_with('{') {
        return parse_object(text).map(drop);
    }
    let mut budget = Budget::of_file(text.len());
    let mut json = serde_json::Deserializer::from_str(text);
    let sound = Sound(&mut budget).deserialize(&mut json).and_then(|()| json.end());
    sound.map_err(|e| format!("invalid JSON: {e}"))
}

fn check_len(text: &str) -> Result<(), String> {
    if text.len() > MAX_TEXT {
        return Err(format!("JSON of {} bytes, the limit is {MAX_TEXT}", text.len()));
    }
    Ok(())
}

/// Writes an object as PEFT does: keys sorted at every depth, two spaces of indent, ASCII only.
pub(crate) fn to_sorted_pretty(map: &Map<String, Value>) -> String {
    let mut value = Value::Object(map.clone());
    value.sort_all_objects();
    to_ascii(&format!("{value:#}"))
}

/// JSON text with every non-ASCII character escaped, so that its meaning does not hang on a locale.
fn to_ascii(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    for c in json.chars() {
        if c.is_ascii() {
            out.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                out.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    out
}

/// What Python's `bool()` says of a value.
pub(crate) fn truthy(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(b) => *b,
        Value::Number(n) => n.as_f64() != Some(0.0),
        Value::String(s) => !s.is_empty(),
        Value::Array(a) => !a.is_empty(),
        Value::Object(o) => !o.is_empty(),
    }
}

/// A name or value fit for an error message: quoted, escaped, shortened.
pub(crate) fn show(text: &str) -> String {
    const MAX: usize = 160;
    if text.chars().count() <= MAX {
        return format!("{text:?}");
    }
    let head: String = text.chars().take(MAX).collect();
    format!("{head:?}... ({} characters)", text.chars().count())
}

/// A JSON value fit for an error message: as JSON, shortened.
pub(crate) fn show_value(value: &Value) -> String {
    const MAX: usize = 160;
    let text = value.to_string();
    match text.char_indices().nth(MAX) {
        Some((at, _)) => format!("{}... ({} bytes)", &text[..at], text.len()),
        None => text,
    }
}

/// A list of names fit for an error message: the first ten and how many more.
pub(crate) fn show_list<S: AsRef<str>>(names: &[S]) -> String {
    let mut out = names.iter().take(10).map(|n| show(n.as_ref())).collect::<Vec<_>>().join(", ");
    if names.len() > 10 {
        out.push_str(&format!(" and {} more", names.len() - 10));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeated_keys_are_errors_at_any_depth() {
        assert!(parse_object(r#"{"r": 8, "r": 9}"#).unwrap_err().contains("\"r\" appears twice"));
        assert!(parse_object(r#"{"a": [{"b": 1, "b": 1}]}"#).unwrap_err().contains("\"b\""));
        assert!(parse_object("[1]").is_err());
        assert!(parse_object(r#"{"lora_alpha": NaN}"#).is_err());
        assert!(parse_object(&"[".repeat(100_000)).is_err());
        assert!(parse_object(&" ".repeat(MAX_TEXT + 1)).unwrap_err().contains("limit"));
    }

    #[test]
    fn a_check_refuses_what_parsing_refuses() {
        for text in [
            "{}",
            " {\"a\": [1, {\"b\": null}]} ",
            r#"{"r": 8, "r": 9}"#,
            r#"{"a": [{"b": 1, "b": 1}]}"#,
            r#"{"a": {"b": 1}, "b": 1}"#,
            "[1]",
            "1",
            "",
            "{} x",
            r#"{"a": NaN}"#,
            r#"{"a": 1e999}"#,
            r#"{"a": "\ud800"}"#,
        ] {
            assert_eq!(check_object(text), parse_object(text).map(drop), "{text}");
        }
    }

    #[test]
    fn values_may_not_take_more_than_their_text_allows() {
        let bomb = format!("{{\"a\": [{}0]}}", "0,".repeat(1 << 20));
        assert!(parse_object(&bomb).unwrap_err().contains("memory"));
        assert!(check_object(&bomb).is_ok());
        assert!(parse_object_within(&bomb, Budget::of_file(1 << 30)).is_ok());
        let keys: Vec<String> = (0..300_000).map(|i| format!("\"{i}\":0")).collect();
        let bomb = format!("{{{}}}", keys.join(","));
        assert!(parse_object(&bomb).unwrap_err().contains("memory"));
        assert!(check_object(&bomb).unwrap_err().contains("memory"));
    }

    #[test]
    fn output_is_sorted_ascii_and_exact() {
        let map =
            parse_object(r#"{"b": {"z": 0.1, "a": 16.0}, "a": "é😀", "n": 18446744073709551615}"#).unwrap();
        let text = to_sorted_pretty(&map);
        assert!(text.is_ascii());
        assert!(text.starts_with("{\n  \"a\": \"\\u00e9\\ud83d\\ude00\""), "{text}");
        assert!(text.find("\"a\": 16.0").unwrap() < text.find("\"z\": 0.1").unwrap());
        assert_eq!(parse_object(&text).unwrap(), map);
    }

    #[test]
    fn truthy_is_pythons() {
        for falsy in ["null", "false", "0", "0.0", "\"\"", "[]", "{}"] {
            assert!(!truthy(&serde_json::from_str(falsy).unwrap()), "{falsy}");
        }
        for yes in ["true", "1", "-0.5", "\"x\"", "[0]", "{\"a\":null}"] {
            assert!(truthy(&serde_json::from_str(yes).unwrap()), "{yes}");
        }
    }
}
