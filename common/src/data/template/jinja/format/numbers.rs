//! Numbers as fields write them.

use super::super::failure::Result;
use super::super::integer::Integer;
use super::super::value::Builder;
use super::fields::{Alignment, Spec, numbers_sign, write_padded};

/// Most digits after the point (a double has 1074).
const MAX_PRECISION: usize = 1100;

/// The sign with what names the base, and the digits.
pub fn integer_digits(value: &Integer, kind: char, spec: &Spec) -> (String, String) {
    let base = match kind {
        'x' | 'X' => 16,
        'o' => 8,
        'b' => 2,
        _ => 10,
    };
    let digits = if base == 10 {
        value.to_string().trim_start_matches('-').to_owned()
    } else {
        value.magnitude_in(base)
    };
    let digits = if kind == 'X' {
        digits.to_uppercase()
    } else {
        digits
    };
    let mut sign = numbers_sign(value.is_negative(), spec);
    if spec.alternate && base != 10 {
        sign.extend(['0', kind]);
    }
    (
        sign,
        grouped(&digits, spec.group, if base == 10 { 3 } else { 4 }),
    )
}

fn grouped(digits: &str, group: Option<char>, size: usize) -> String {
    let Some(separator) = group else {
        return digits.to_owned();
    };
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(size) {
            out.push(separator);
        }
        out.push(digit);
    }
    out
}

pub fn write_float(out: &mut Builder, spec: &Spec, value: f64, kind: char) -> Result<()> {
    let sign = numbers_sign(value.is_sign_negative() && !value.is_nan(), spec);
    let magnitude = value.abs();
    let upper = kind.is_ascii_uppercase();
    let mut spec = spec.clone();
    let text = if !magnitude.is_finite() {
        spec.zero = false;
        (if magnitude.is_nan() { "nan" } else { "inf" }).to_owned()
    } else {
        let precision = spec.precision.unwrap_or(6).min(MAX_PRECISION);
        match kind.to_ascii_lowercase() {
            'f' => point(magnitude, precision, spec.group),
            '%' => point(magnitude * 100.0, precision, spec.group) + "%",
            'e' => exponent(magnitude, precision),
            _ => general(magnitude, precision.max(1), spec.alternate),
        }
    };
    let text = if upper { text.to_uppercase() } else { text };
    write_padded(out, &spec, &sign, &text, Alignment::Right)
}

fn point(value: f64, precision: usize, group: Option<char>) -> String {
    let text = format!("{value:.precision$}");
    match text.split_once('.') {
        Some((whole, fraction)) => format!("{}.{fraction}", grouped(whole, group, 3)),
        None => grouped(&text, group, 3),
    }
}

fn exponent(value: f64, precision: usize) -> String {
    let text = format!("{value:.precision$e}");
    let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{mantissa}e{sign}{:02}", exponent.abs())
}

/// `%g`: as many digits as the precision says, without zeros at the end.
fn general(value: f64, precision: usize, alternate: bool) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    let scientific = exponent(value, precision - 1);
    let power: i32 = scientific
        .split_once('e')
        .and_then(|(_, exponent)| exponent.parse().ok())
        .unwrap_or(0);
    let trimmed = |text: &str| match text.contains('.') && !alternate {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text.to_owned(),
    };
    if power < -4 || power >= precision as i32 {
        return match scientific.split_once('e') {
            Some((mantissa, exponent)) => format!("{}e{exponent}", trimmed(mantissa)),
            None => scientific,
        };
    }
    let after = (precision as i32 - 1 - power).max(0) as usize;
    trimmed(&format!("{value:.after$}"))
}
