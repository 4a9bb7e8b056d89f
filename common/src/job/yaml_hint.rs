//! Hints on what is probably meant where a job file is no valid YAML: the parser says what it found, this says what to write.
//!
//! In: the text and the line at which the parser gave up. Out: a hint, or nothing.

use super::quote::shorten;

/// The hint that follows the parser's own words, beginning with `; `, or nothing.
pub(super) fn hint(text: &str, line: usize) -> String {
    let hint = of_whole(text).map(str::to_owned).or_else(|| {
        // The parser often notices only in the line after the one at fault.
        let lines: Vec<&str> = text.lines().collect();
        let near = [Some(line), line.checked_add(1), line.checked_sub(1)];
        let near = near.into_iter().flatten().filter(|line| *line > 0);
        near.filter_map(|line| Some((line, *lines.get(line - 1)?)))
            .find_map(|(line, text)| of_line(text).map(|hint| format!("line {line}: {hint}")))
    });
    hint.map(|hint| format!("; {hint}")).unwrap_or_default()
}

/// A hint where the file as a whole is something else than YAML.
fn of_whole(text: &str) -> Option<&'static str> {
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let (first, second) = (lines.next()?, lines.next().unwrap_or_default());
    if first.starts_with('{') && first.ends_with('}') && second.starts_with('{') {
        return Some("these are rows of data, not a job: name the file with --dataset");
    }
    let is_section = first.starts_with('[') && first.ends_with(']') && second.contains('=');
    if is_section || is_assignment(first) {
        return Some("a job is YAML: write `field: value`, without sections and `=`");
    }
    None
}

fn of_line(line: &str) -> Option<String> {
    let indent = line.len() - line.trim_start().len();
    if line[..indent].contains('\t') {
        return Some("tabs cannot indent: use spaces".to_owned());
    }
    let content = line.trim_start_matches([' ', '-']);
    let name_len = content
        .find(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == '.'))
        .unwrap_or(content.len());
    let (name, rest) = content.split_at(name_len);
    if name.is_empty() || content.starts_with('#') {
        return None;
    }
    if let Some(value) = rest.strip_prefix(':') {
        if value.starts_with(|c: char| !c.is_whitespace() && c != '/' && c != '\\') {
            return Some(format!(
                "write a space after the colon of `{}:`",
                shorten(name)
            ));
        }
        return of_value(value.trim());
    }
    let value = rest.trim_start();
    (rest.starts_with([' ', '=']) && !value.contains(": "))
        .then(|| format!("write a colon after `{}`", shorten(name)))
}

fn of_value(value: &str) -> Option<String> {
    let opens = |open: char, close: char| {
        value.starts_with(open) && !value[open.len_utf8()..].contains(close)
    };
    let hint =
        if value.starts_with(['"', '\'']) && value.len() > 1 && !value[1..].contains(&value[..1]) {
            "close the quotes"
        } else if opens('[', ']') {
            "close the list with ]"
        } else if opens('{', '}') {
            "close the mapping with }"
        } else if value.starts_with(['@', '`', '%', '&', '*', '!']) {
            "put the value into quotes"
        } else if !value.starts_with(['"', '\'']) && value.contains(": ") {
            "put a value that holds `: ` into quotes"
        } else {
            return None;
        };
    Some(hint.to_owned())
}

fn is_assignment(line: &str) -> bool {
    line.split_once('=').is_some_and(|(name, _)| {
        let name = name.trim();
        !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
    })
}

#[cfg(test)]
mod tests {
    use super::hint;

    #[test]
    fn the_usual_slips_are_told_what_to_write() {
        for (text, line, expected) in [
            (
                "a: m\n\tb: d\n",
                1,
                "line 2: tabs cannot indent: use spaces",
            ),
            (
                "base_model:m\ndatasets: d\n",
                2,
                "line 1: write a space after the colon of `base_model:`",
            ),
            (
                "a: m\nlearning_rate 1e-4\n",
                2,
                "line 2: write a colon after `learning_rate`",
            ),
            (
                "a: m\nlearning_rate = 1e-4\n",
                2,
                "line 2: write a colon after `learning_rate`",
            ),
            ("a: \"m\nb: d\n", 2, "line 1: close the quotes"),
            ("a: [b, c\n", 1, "line 1: close the list with ]"),
            ("a: @x\n", 1, "line 1: put the value into quotes"),
            (
                "a: b: c\n",
                1,
                "line 1: put a value that holds `: ` into quotes",
            ),
            (
                "{\"a\": 1}\n{\"a\": 2}\n",
                2,
                "these are rows of data, not a job: name the file with --dataset",
            ),
            (
                "[job]\na = 1\n",
                2,
                "a job is YAML: write `field: value`, without sections and `=`",
            ),
        ] {
            assert_eq!(hint(text, line), format!("; {expected}"), "{text}");
        }
        for text in ["a: b\n", "", "a: http://x\n", "- é: \"ü\"\n", "# a b\n"] {
            assert_eq!(hint(text, 1), "", "{text}");
        }
    }
}
