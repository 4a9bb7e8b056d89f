//! The filter `tojson` as Transformers defines it: `json.dumps(value, ensure_ascii=False, ..)`.

use super::failure::{Result, fail};
use super::meter::descend;
use super::operators::order;
use super::print::float;
use super::value::{Builder, Value};

pub struct JsonStyle {
    pub indent: Option<String>,
    pub item_separator: String,
    pub key_separator: String,
    pub ensure_ascii: bool,
    pub sort_keys: bool,
}

pub fn to_json(value: &Value, style: &JsonStyle) -> Result<String> {
    let mut writer = Writer {
        out: Builder::default(),
        style,
    };
    writer.write(value, 0)?;
    Ok(writer.out.finish())
}

struct Writer<'a> {
    out: Builder,
    style: &'a JsonStyle,
}

impl Writer<'_> {
    fn write(&mut self, value: &Value, depth: usize) -> Result<()> {
        descend()?;
        match value {
            Value::None => self.out.push("null"),
            Value::Bool(true) => self.out.push("true"),
            Value::Bool(false) => self.out.push("false"),
            Value::Int(value) => self.out.push(&value.to_string()),
            Value::Float(value) => self.out.push(&json_float(*value)),
            Value::Text(text) => self.text(text.as_str()),
            Value::List(items) | Value::Tuple(items) => {
                self.container("[", "]", items, depth, |writer, item| {
                    writer.write(item, depth + 1)
                })
            }
            Value::Dict(dict) => {
                let mut pairs = dict.pairs().to_vec();
                if self.style.sort_keys {
                    sort_pairs(&mut pairs)?;
                }
                self.container("{", "}", &pairs, depth, |writer, (key, item)| {
                    writer.text(&json_key(key)?)?;
                    writer.out.push(&writer.style.key_separator)?;
                    writer.write(item, depth + 1)
                })
            }
            other => Err(other.blamed(format!("{} cannot be written as JSON", other.described()))),
        }
    }

    fn container<T>(
        &mut self,
        open: &str,
        close: &str,
        items: &[T],
        depth: usize,
        mut write_item: impl FnMut(&mut Self, &T) -> Result<()>,
    ) -> Result<()> {
        self.out.push(open)?;
        for (index, item) in items.iter().enumerate() {
            if index > 0 {
                self.out.push(&self.style.item_separator)?;
            }
            self.new_line(depth + 1)?;
            write_item(self, item)?;
        }
        if !items.is_empty() {
            self.new_line(depth)?;
        }
        self.out.push(close)
    }

    fn new_line(&mut self, depth: usize) -> Result<()> {
        let Some(indent) = &self.style.indent else {
            return Ok(());
        };
        self.out.push("\n")?;
        self.out.repeat(indent, depth)
    }

    fn text(&mut self, text: &str) -> Result<()> {
        self.out.push("\"")?;
        for c in text.chars() {
            match c {
                '"' => self.out.push("\\\"")?,
                '\\' => self.out.push("\\\\")?,
                '\n' => self.out.push("\\n")?,
                '\r' => self.out.push("\\r")?,
                '\t' => self.out.push("\\t")?,
                '\u{8}' => self.out.push("\\b")?,
                '\u{c}' => self.out.push("\\f")?,
                c if c < ' ' || (self.style.ensure_ascii && !c.is_ascii()) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        self.out.push(&format!("\\u{unit:04x}"))?;
                    }
                }
                c => self.out.push_char(c)?,
            }
        }
        self.out.push("\"")
    }
}

fn json_float(value: f64) -> String {
    match value {
        value if value.is_nan() => "NaN".to_owned(),
        f64::INFINITY => "Infinity".to_owned(),
        f64::NEG_INFINITY => "-Infinity".to_owned(),
        value => float(value),
    }
}

/// Keys that are no strings become strings, as `json.dumps` does it.
fn json_key(key: &Value) -> Result<String> {
    match key {
        Value::Text(text) => Ok(text.as_str().to_owned()),
        Value::Bool(true) => Ok("true".to_owned()),
        Value::Bool(false) => Ok("false".to_owned()),
        Value::None => Ok("null".to_owned()),
        Value::Int(value) => Ok(value.to_string()),
        Value::Float(value) => Ok(json_float(*value)),
        other => fail(format!("{} cannot be a key in JSON", other.described())),
    }
}

fn sort_pairs(pairs: &mut [(Value, Value)]) -> Result<()> {
    let mut failed = None;
    pairs.sort_by(|(a, _), (b, _)| match order(a, b) {
        Ok(found) => found.unwrap_or(std::cmp::Ordering::Equal),
        Err(error) => {
            failed.get_or_insert(error);
            std::cmp::Ordering::Equal
        }
    });
    failed.map_or(Ok(()), Err)
}
