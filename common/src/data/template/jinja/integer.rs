//! Integers of any size, as Python has them.
//!
//! Enters: digits or machine integers. Leaves: sums, quotients and digits, exactly. Never grows past [`MAX_DIGITS`].

use std::cmp::Ordering;
use std::sync::Arc;

use super::failure::{Result, fail};
use super::meter::spend;

/// Most decimal digits (CPython refuses to print more than 4300).
pub const MAX_DIGITS: usize = 4300;

/// Digits of a large integer hold nine decimal digits each.
const BASE: u64 = 1_000_000_000;
const BASE_DIGITS: usize = 9;

/// An integer; small wherever it fits, so that equal integers look alike.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Integer {
    Small(i64),
    Large(Arc<Large>),
}

/// What does not fit in 64 bits: a sign and digits in [`BASE`], the lowest first.
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct Large {
    negative: bool,
    digits: Vec<u32>,
}

impl From<i64> for Integer {
    fn from(value: i64) -> Self {
        Self::Small(value)
    }
}

impl From<i32> for Integer {
    fn from(value: i32) -> Self {
        Self::Small(i64::from(value))
    }
}

impl From<usize> for Integer {
    fn from(value: usize) -> Self {
        Self::from_i128(value as i128)
    }
}

impl Integer {
    pub fn from_i128(value: i128) -> Self {
        match i64::try_from(value) {
            Ok(small) => Self::Small(small),
            Err(_) => Self::from_digits(value < 0, digits_of(value.unsigned_abs())),
        }
    }

    /// Decimal digits after an optional sign.
    pub fn parse(text: &str) -> Option<Self> {
        let (negative, digits) = match text.strip_prefix('-') {
            Some(rest) => (true, rest),
            None => (false, text.strip_prefix('+').unwrap_or(text)),
        };
        let is_number = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
        if !is_number || digits.trim_start_matches('0').len() > MAX_DIGITS {
            return None;
        }
        let digits = digits.as_bytes().rchunks(BASE_DIGITS);
        let digits = digits.map(|chunk| {
            chunk
                .iter()
                .fold(0, |sum, byte| sum * 10 + u32::from(byte - b'0'))
        });
        Some(Self::from_digits(negative, digits.collect()))
    }

    /// The whole part of a finite float.
    pub fn from_f64(value: f64) -> Option<Self> {
        if !value.is_finite() {
            return None;
        }
        // Rust writes floats without an exponent, digit for digit.
        Self::parse(&format!("{:.0}", value.trunc()))
    }

    pub fn to_i64(&self) -> Option<i64> {
        match self {
            Self::Small(value) => Some(*value),
            Self::Large(_) => None,
        }
    }

    pub fn to_f64(&self) -> f64 {
        match self {
            Self::Small(value) => *value as f64,
            Self::Large(_) => self.to_string().parse().unwrap_or(f64::INFINITY),
        }
    }

    pub fn is_zero(&self) -> bool {
        *self == Self::Small(0)
    }

    pub fn is_negative(&self) -> bool {
        match self {
            Self::Small(value) => *value < 0,
            Self::Large(large) => large.negative,
        }
    }

    /// How many digits it is kept in.
    pub fn digit_count(&self) -> usize {
        match self {
            Self::Small(_) => 1,
            Self::Large(large) => large.digits.len(),
        }
    }

    pub fn negated(&self) -> Self {
        let (negative, digits) = self.parts();
        Self::from_digits(!negative, digits)
    }

    pub fn add(&self, other: &Self) -> Result<Self> {
        if let (Self::Small(a), Self::Small(b)) = (self, other) {
            return Ok(Self::from_i128(i128::from(*a) + i128::from(*b)));
        }
        let ((a_negative, a), (b_negative, b)) = (self.parts(), other.parts());
        if a_negative == b_negative {
            return Self::bounded(a_negative, add(&a, &b));
        }
        match compare(&a, &b) {
            Ordering::Less => Self::bounded(b_negative, subtract(&b, &a)),
            _ => Self::bounded(a_negative, subtract(&a, &b)),
        }
    }

    pub fn subtract(&self, other: &Self) -> Result<Self> {
        self.add(&other.negated())
    }

    pub fn multiply(&self, other: &Self) -> Result<Self> {
        if let (Self::Small(a), Self::Small(b)) = (self, other) {
            return Ok(Self::from_i128(i128::from(*a) * i128::from(*b)));
        }
        let ((a_negative, a), (b_negative, b)) = (self.parts(), other.parts());
        spend(a.len() * b.len() / 16)?;
        Self::bounded(a_negative != b_negative, multiply(&a, &b))
    }

    /// Quotient and remainder, rounded down as Python does it. None where the divisor is zero.
    pub fn divide(&self, divisor: &Self) -> Option<(Self, Self)> {
        if divisor.is_zero() {
            return None;
        }
        if let (Self::Small(a), Self::Small(b)) = (self, divisor) {
            let (a, b) = (i128::from(*a), i128::from(*b));
            let rest = a.rem_euclid(b);
            let rest = if b < 0 && rest != 0 { rest + b } else { rest };
            return Some((Self::from_i128((a - rest) / b), Self::from_i128(rest)));
        }
        let ((a_negative, a), (b_negative, b)) = (self.parts(), divisor.parts());
        let (mut quotient, mut rest) = divide(&a, &b);
        if a_negative != b_negative && rest.iter().any(|digit| *digit != 0) {
            quotient = add(&quotient, &[1]);
            rest = subtract(&b, &rest);
        }
        Some((
            Self::from_digits(a_negative != b_negative, quotient),
            Self::from_digits(b_negative, rest),
        ))
    }

    pub fn power(&self, exponent: u32) -> Result<Self> {
        let (mut result, mut square, mut left) = (Self::Small(1), self.clone(), exponent);
        while left > 0 {
            if left & 1 == 1 {
                result = result.multiply(&square)?;
            }
            left >>= 1;
            if left > 0 {
                square = square.multiply(&square)?;
            }
        }
        Ok(result)
    }

    /// Digits in a base from 2 to 16, without a sign.
    pub fn magnitude_in(&self, base: u32) -> String {
        let (_, digits) = self.parts();
        let mut left = Self::from_digits(false, digits);
        let base = Self::Small(i64::from(base));
        let mut out = Vec::new();
        while !left.is_zero() {
            let Some((quotient, rest)) = left.divide(&base) else {
                break;
            };
            let digit = rest.to_i64().and_then(|rest| u32::try_from(rest).ok());
            out.extend(digit.and_then(|digit| char::from_digit(digit, 16)));
            left = quotient;
        }
        if out.is_empty() {
            return "0".to_owned();
        }
        out.into_iter().rev().collect()
    }

    fn parts(&self) -> (bool, Vec<u32>) {
        match self {
            Self::Small(value) => (*value < 0, digits_of(u128::from(value.unsigned_abs()))),
            Self::Large(large) => (large.negative, large.digits.clone()),
        }
    }

    fn bounded(negative: bool, digits: Vec<u32>) -> Result<Self> {
        if digits.len() > MAX_DIGITS / BASE_DIGITS {
            return fail(format!("an integer has more than {MAX_DIGITS} digits"));
        }
        Ok(Self::from_digits(negative, digits))
    }

    fn from_digits(negative: bool, mut digits: Vec<u32>) -> Self {
        while digits.last() == Some(&0) {
            digits.pop();
        }
        if digits.len() <= 3 {
            let magnitude = digits.iter().rev().fold(0, |sum: i128, digit| {
                sum * i128::from(BASE) + i128::from(*digit)
            });
            let value = if negative { -magnitude } else { magnitude };
            if let Ok(small) = i64::try_from(value) {
                return Self::Small(small);
            }
        }
        Self::Large(Arc::new(Large { negative, digits }))
    }
}

impl std::fmt::Display for Integer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Small(value) => write!(f, "{value}"),
            Self::Large(large) => {
                let mut digits = large.digits.iter().rev();
                let first = digits.next().copied().unwrap_or(0);
                write!(f, "{}{first}", if large.negative { "-" } else { "" })?;
                digits.try_for_each(|digit| write!(f, "{digit:09}"))
            }
        }
    }
}

impl PartialOrd for Integer {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Integer {
    fn cmp(&self, other: &Self) -> Ordering {
        if let (Self::Small(a), Self::Small(b)) = (self, other) {
            return a.cmp(b);
        }
        let ((a_negative, a), (b_negative, b)) = (self.parts(), other.parts());
        match (a_negative, b_negative) {
            (true, false) => Ordering::Less,
            (false, true) => Ordering::Greater,
            (false, false) => compare(&a, &b),
            (true, true) => compare(&b, &a),
        }
    }
}

fn digits_of(mut value: u128) -> Vec<u32> {
    let mut digits = Vec::new();
    while value > 0 {
        digits.push((value % u128::from(BASE)) as u32);
        value /= u128::from(BASE);
    }
    digits
}

fn compare(a: &[u32], b: &[u32]) -> Ordering {
    let longer = a.len().cmp(&b.len());
    longer.then_with(|| a.iter().rev().cmp(b.iter().rev()))
}

fn add(a: &[u32], b: &[u32]) -> Vec<u32> {
    let mut carry = 0;
    let mut sum = Vec::with_capacity(a.len().max(b.len()) + 1);
    for index in 0..a.len().max(b.len()) {
        let digit = |of: &[u32]| u64::from(of.get(index).copied().unwrap_or(0));
        let value = digit(a) + digit(b) + carry;
        sum.push((value % BASE) as u32);
        carry = value / BASE;
    }
    sum.push(carry as u32);
    trimmed(sum)
}

/// `a - b` where `a` is not the smaller one.
fn subtract(a: &[u32], b: &[u32]) -> Vec<u32> {
    let mut borrow = 0;
    let mut difference = Vec::with_capacity(a.len());
    for (index, digit) in a.iter().enumerate() {
        let taken = u64::from(b.get(index).copied().unwrap_or(0)) + borrow;
        borrow = u64::from(u64::from(*digit) < taken);
        difference.push((u64::from(*digit) + borrow * BASE - taken) as u32);
    }
    trimmed(difference)
}

fn multiply(a: &[u32], b: &[u32]) -> Vec<u32> {
    let mut product = vec![0_u32; a.len() + b.len()];
    for (at, digit) in a.iter().enumerate() {
        let mut carry = 0;
        for (index, place) in product[at..].iter_mut().enumerate() {
            let other = u64::from(b.get(index).copied().unwrap_or(0));
            let value = u64::from(*digit) * other + u64::from(*place) + carry;
            *place = (value % BASE) as u32;
            carry = value / BASE;
        }
    }
    trimmed(product)
}

/// Long division; each digit of the quotient is found by halving.
fn divide(a: &[u32], b: &[u32]) -> (Vec<u32>, Vec<u32>) {
    let mut quotient = vec![0; a.len()];
    let mut rest: Vec<u32> = Vec::new();
    for (index, digit) in a.iter().enumerate().rev() {
        rest.insert(0, *digit);
        rest = trimmed(rest);
        let (mut low, mut high) = (0, BASE - 1);
        while low < high {
            let middle = (low + high).div_ceil(2);
            match compare(&multiply(b, &[middle as u32]), &rest) {
                Ordering::Greater => high = middle - 1,
                _ => low = middle,
            }
        }
        rest = subtract(&rest, &multiply(b, &[low as u32]));
        quotient[index] = low as u32;
    }
    (trimmed(quotient), rest)
}

fn trimmed(mut digits: Vec<u32>) -> Vec<u32> {
    while digits.last() == Some(&0) {
        digits.pop();
    }
    digits
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn large_integers_compute_as_in_python() {
        let of = |text: &str| Integer::parse(text).unwrap();
        let a = of("123456789012345678901234567890");
        let b = of("-98765432109876543210");
        assert_eq!(a.to_string(), "123456789012345678901234567890");
        assert_eq!(a.add(&b).unwrap(), of("123456788913580246791358024680"));
        assert_eq!(
            a.multiply(&b).unwrap(),
            of("-12193263113702179522496570642237463801111263526900")
        );
        let (quotient, rest) = a.divide(&b).unwrap();
        assert_eq!(quotient, of("-1249999989"));
        assert_eq!(rest, of("-38580246902623456800"));
        assert_eq!(of("-7").divide(&of("2")).unwrap(), (of("-4"), of("1")));
        assert_eq!(of("7").divide(&of("-2")).unwrap(), (of("-4"), of("-1")));
        assert_eq!(a.subtract(&a).unwrap(), of("0"));
        assert!(b < of("-9223372036854775808") && of("0") < a);
        assert_eq!(
            of("2").power(100).unwrap().to_string(),
            "1267650600228229401496703205376"
        );
        assert_eq!(
            of("18446744073709551615").magnitude_in(16),
            "ffffffffffffffff"
        );
        assert_eq!(
            Integer::from_f64(1e22).unwrap(),
            of("10000000000000000000000")
        );
        assert_eq!(
            Integer::from_i128(i128::from(i64::MIN)),
            of("-9223372036854775808")
        );
        assert!(of("10").power(5000).is_err());
    }
}
