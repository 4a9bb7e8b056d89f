//! Divides text into words as pre-tokenizers do.
//!
//! Enters: a pre-tokenizer's description, and text. Leaves: the bytes of each word. White space before a word, which patterns
//! part with a look ahead (`\s+(?!\S)|\s+`), is parted by hand; the rest of a pattern needs no looking ahead, and is matched by
//! an automaton in linear time.

use std::ops::Range;

use regex_automata::hybrid::dfa;
use regex_automata::meta::{self, Regex};
use regex_automata::{Anchored, Input};
use serde_json::Value as Json;
use tokenizers::PreTokenizerWrapper;

/// The end of patterns that leave the last white space of several to the word behind it.
const SPACE: &str = r"|\s+(?!\S)|\s+";

/// What `ByteLevel` divides by of its own accord.
const BYTE_LEVEL: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+";

/// What a linear automaton cannot do.
const UNKNOWN: [&str; 5] = ["(?!", "(?=", "(?<", "(?>", r"\G"];

/// What the automata of a splitter work with; a thread has its own.
pub(super) type Caches = Vec<Option<Cache>>;

/// What the automata of one pattern work with.
#[derive(Debug)]
pub(super) struct Cache {
    regex: meta::Cache,
    automaton: Option<dfa::Cache>,
}

/// Rules that divide text, one after the other.
#[derive(Debug)]
pub(super) struct Splitter {
    rules: Vec<Rule>,
}

#[derive(Debug)]
enum Rule {
    /// Matches are words; where `parts_space`, white space that nothing matches is, too, but for its last character.
    Pattern {
        regex: Regex,
        /// The automaton alone, which finds the end of a word sooner: where white space counts, and nothing in the pattern is
        /// beyond it.
        automaton: Option<Box<dfa::DFA>>,
        parts_space: bool,
    },
    /// Every digit is a word.
    Digits,
}

impl Splitter {
    /// None where the pre-tokenizer has a part that is not known here.
    pub fn of(pre_tokenizer: &PreTokenizerWrapper) -> Option<Self> {
        let description = serde_json::to_value(pre_tokenizer).ok()?;
        let parts = match description["type"].as_str()? {
            "Sequence" => description["pretokenizers"].as_array()?.clone(),
            _ => vec![description],
        };
        let (last, earlier) = parts.split_last()?;
        let mut rules = earlier.iter().map(Rule::of).collect::<Option<Vec<_>>>()?;
        // Bytes become characters last of all.
        if last["type"] != "ByteLevel" || last["add_prefix_space"] != false {
            return None;
        }
        if last["use_regex"] != false {
            rules.push(Rule::pattern(BYTE_LEVEL, true)?);
        }
        Some(Self { rules })
    }

    pub fn new_caches(&self) -> Caches {
        let caches = self.rules.iter().map(|rule| match rule {
            Rule::Pattern {
                regex, automaton, ..
            } => Some(Cache {
                regex: regex.create_cache(),
                automaton: automaton.as_ref().map(|automaton| automaton.create_cache()),
            }),
            Rule::Digits => None,
        });
        caches.collect()
    }

    /// Calls `take` with the bytes of each word of a part of the text, in order.
    pub fn split(
        &self,
        text: &str,
        part: Range<usize>,
        caches: &mut Caches,
        take: &mut dyn FnMut(Range<usize>),
    ) {
        split_by(&self.rules, text, part, caches, take);
    }
}

fn split_by(
    rules: &[Rule],
    text: &str,
    part: Range<usize>,
    caches: &mut [Option<Cache>],
    take: &mut dyn FnMut(Range<usize>),
) {
    match (rules.split_first(), caches.split_first_mut()) {
        (Some((rule, [])), Some((cache, _))) => rule.split(text, part, cache, take),
        (Some((rule, rest)), Some((cache, caches))) => {
            rule.split(text, part, cache, &mut |word| {
                split_by(rest, text, word, caches, take);
            });
        }
        _ if part.is_empty() => {}
        _ => take(part),
    }
}

impl Rule {
    fn of(part: &Json) -> Option<Self> {
        match part["type"].as_str()? {
            "Split" if part["behavior"] == "Isolated" && part["invert"] == false => {
                let pattern = part["pattern"]["Regex"].as_str()?;
                match pattern.strip_suffix(SPACE) {
                    Some(head) => Self::pattern(head, true),
                    None => Self::pattern(pattern, false),
                }
            }
            "Digits" if part["individual_digits"] == true => Some(Self::Digits),
            _ => None,
        }
    }

    fn pattern(pattern: &str, parts_space: bool) -> Option<Self> {
        let is_known =
            UNKNOWN.iter().all(|unknown| !pattern.contains(unknown)) && !is_possessive(pattern);
        let regex = is_known.then(|| Regex::new(pattern).ok())??;
        let automaton = parts_space.then(|| dfa::DFA::new(pattern).ok().map(Box::new));
        Some(Self::Pattern {
            regex,
            automaton: automaton.flatten(),
            parts_space,
        })
    }

    /// Calls `take` with the words of a part, and with what is between them.
    fn split(
        &self,
        text: &str,
        part: Range<usize>,
        cache: &mut Option<Cache>,
        take: &mut dyn FnMut(Range<usize>),
    ) {
        // What comes before and after the part is none of the pattern's business.
        let (text, base) = (&text[part.clone()], part.start);
        let mut take = |start: usize, end: usize| {
            if start < end {
                take(base + start..base + end);
            }
        };
        // What nothing matched since the last word.
        let mut between = 0;
        match (self, cache) {
            (
                Self::Pattern {
                    regex,
                    automaton,
                    parts_space,
                },
                Some(cache),
            ) => {
                let mut at = 0;
                while let Some(next) = text[at..].chars().next() {
                    // Where white space counts there is a word at nearly every place, else they are far between.
                    let anchored = match parts_space {
                        true => Anchored::Yes,
                        false => Anchored::No,
                    };
                    let input = Input::new(text).range(at..).anchored(anchored);
                    let end = match (automaton, &mut cache.automaton) {
                        (Some(automaton), Some(cache)) => automaton
                            .try_search_fwd(cache, &input)
                            .map(|end| end.map(|end| end.offset()))
                            .ok(),
                        _ => None,
                    };
                    let found = match end {
                        Some(end) => end.map(|end| at..end),
                        None => regex
                            .search_with(&mut cache.regex, &input)
                            .map(|found| found.range()),
                    };
                    let found = found.filter(|found| !found.is_empty());
                    let space = || {
                        let is_space = *parts_space && next.is_whitespace();
                        is_space.then(|| at..end_of_space(text, at))
                    };
                    match found.or_else(space) {
                        Some(word) => {
                            take(between, word.start);
                            take(word.start, word.end);
                            (at, between) = (word.end, word.end);
                        }
                        None if *parts_space => at += next.len_utf8(),
                        None => break,
                    }
                }
            }
            _ => {
                for (at, digit) in text.char_indices().filter(|(_, c)| c.is_numeric()) {
                    take(between, at);
                    between = at + digit.len_utf8();
                    take(at, between);
                }
            }
        }
        take(between, text.len());
    }
}

/// Whether a pattern has a quantifier that gives nothing back (`a++`), which the automaton would read as two quantifiers.
fn is_possessive(pattern: &str) -> bool {
    let mut characters = pattern.chars().peekable();
    let (mut classes, mut is_quantified) = (0_usize, false);
    while let Some(character) = characters.next() {
        let was_quantified = std::mem::take(&mut is_quantified);
        match character {
            '\\' => {
                characters.next();
                if characters.peek() == Some(&'{') {
                    characters.find(|c| *c == '}');
                }
            }
            '[' => classes += 1,
            ']' => classes = classes.saturating_sub(1),
            _ if classes > 0 => {}
            '+' if was_quantified => return true,
            '*' | '+' | '?' | '}' => is_quantified = true,
            _ => {}
        }
    }
    false
}

/// Where white space that begins here ends: before its last character where something follows, but not without any.
fn end_of_space(text: &str, start: usize) -> usize {
    let run = text[start..].find(|c: char| !c.is_whitespace());
    let Some(run) = run else {
        return text.len();
    };
    let mut characters = text[start..start + run].char_indices();
    match characters.next_back() {
        Some((last, _)) if last > 0 => start + last,
        _ => start + run,
    }
}

/// The character that stands for a byte in the vocabulary of a byte-level model (OpenAI's GPT-2): printable Latin-1
/// characters stand for themselves, the others are numbered from 256 on.
pub(super) fn character_of(byte: u8) -> char {
    let number = match byte {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => u32::from(byte),
        0..=b' ' => 256 + u32::from(byte),
        0x7f..=0xa0 => 256 + 33 + u32::from(byte) - 0x7f,
        0xad => 256 + 33 + 34,
    };
    char::from_u32(number).unwrap_or(char::REPLACEMENT_CHARACTER)
}
