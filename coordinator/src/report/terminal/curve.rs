//! The losses of a run in one line: enough to see whether it learned, however many steps it had.

use super::progress::Mean;
use super::text::grouped;

/// Most means that are kept; above it, two neighbours become one.
const MAX_MEANS: usize = 256;
/// Width of the picture in characters; with both numbers it fits into 80 columns.
const COLUMNS: usize = 32;
/// Signs of the picture, from low to high.
const UNICODE: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
const ASCII: [char; 5] = ['_', '.', '-', '=', '#'];

/// The loss curve: means over equally many steps each, so that it takes the same memory for any number of steps.
#[derive(Debug)]
pub(super) struct Curve {
    means: Vec<Mean>,
    steps_each: u64,
    /// First and last step.
    steps: Option<(u64, u64)>,
}

impl Default for Curve {
    fn default() -> Self {
        Self {
            means: Vec::new(),
            steps_each: 1,
            steps: None,
        }
    }
}

impl Curve {
    /// Adds a step's loss; a step without one leaves no trace.
    pub fn add(&mut self, step: u64, loss: f64) {
        if !loss.is_finite() {
            return;
        }
        let (first, _) = self.steps.unwrap_or((step, step));
        self.steps = Some((first, step));
        match self.means.last_mut() {
            Some(last) if last.values() < self.steps_each => last.add(loss),
            _ => {
                let mut mean = Mean::default();
                mean.add(loss);
                self.means.push(mean);
            }
        }
        if self.means.len() >= MAX_MEANS {
            self.means = pairs(&self.means);
            self.steps_each *= 2;
        }
    }

    /// The curve as a line, `loss  5.0000 █▆▄▂▁ 1.0000  steps 1 to 5`, between the losses that are told as the first and the
    /// last. None where there is nothing to see.
    pub fn render(&self, unicode: bool, (first, last): (f64, f64)) -> Option<String> {
        let (first_step, last_step) = self.steps?;
        if self.means.len() < 3 {
            return None;
        }
        let columns = self.columns();
        let signs: &[char] = if unicode { &UNICODE } else { &ASCII };
        Some(format!(
            "loss  {first:.4} {} {last:.4}  steps {} to {}",
            draw(&columns, signs),
            grouped(first_step),
            grouped(last_step)
        ))
    }

    fn columns(&self) -> Vec<f64> {
        let means = &self.means;
        let count = means.len().min(COLUMNS);
        let column = |column: usize| {
            let part = &means[column * means.len() / count..(column + 1) * means.len() / count];
            let mut mean = Mean::default();
            part.iter().for_each(|part| mean.merge(*part));
            mean.take()
        };
        (0..count).map(column).collect()
    }
}

fn pairs(means: &[Mean]) -> Vec<Mean> {
    let merged = means.chunks(2).map(|pair| {
        let mut mean = Mean::default();
        pair.iter().for_each(|part| mean.merge(*part));
        mean
    });
    merged.collect()
}

/// The lowest value gets the lowest sign, the highest the highest.
fn draw(values: &[f64], signs: &[char]) -> String {
    let low = values.iter().copied().fold(f64::INFINITY, f64::min);
    let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let range = (high - low).max(f64::MIN_POSITIVE);
    let top = (signs.len() - 1) as f64;
    let sign = |value: &f64| signs[((value - low) / range * top).round() as usize];
    values.iter().map(sign).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn curve(losses: impl IntoIterator<Item = f64>) -> Curve {
        let mut curve = Curve::default();
        for (step, loss) in (1..).zip(losses) {
            curve.add(step, loss);
        }
        curve
    }

    #[test]
    fn a_falling_loss_is_seen_to_fall() {
        let falling = curve([5.0, 4.0, 3.0, f64::NAN, 2.0, 1.0]);
        assert_eq!(
            falling.render(true, (5.0, 1.0)).unwrap(),
            "loss  5.0000 █▆▅▃▁ 1.0000  steps 1 to 6"
        );
        assert_eq!(
            falling.render(false, (5.0, 1.0)).unwrap(),
            "loss  5.0000 #=-._ 1.0000  steps 1 to 6"
        );
        let flat = curve([2.0; 4]);
        assert_eq!(
            flat.render(false, (2.0, 2.0)).unwrap(),
            "loss  2.0000 ____ 2.0000  steps 1 to 4"
        );
    }

    #[test]
    fn two_steps_are_no_curve() {
        assert_eq!(curve([2.0, 1.0]).render(true, (2.0, 1.0)), None);
        assert_eq!(curve([]).render(true, (2.0, 1.0)), None);
    }

    #[test]
    fn any_number_of_steps_takes_one_line_and_the_same_memory() {
        let steps = 1_000_000;
        let long = curve((0..steps).map(|step| 9.0 - 8.0 * f64::from(step) / f64::from(steps)));
        assert!(long.means.len() < MAX_MEANS);
        let seen: u64 = long.means.iter().map(Mean::values).sum();
        assert_eq!(seen, u64::from(steps as u32));
        let text = long.render(true, (9.0, 1.0)).unwrap();
        assert!(text.chars().count() <= 80, "{text}");
        let picture: Vec<char> = text.chars().filter(|c| UNICODE.contains(c)).collect();
        assert_eq!(picture.len(), COLUMNS);
        assert!(picture.is_sorted_by(|a, b| a >= b), "{text}");
    }
}
