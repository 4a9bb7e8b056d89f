//! Memory in words for people. In: bytes, and what a worker needs. Out: text whose parts add up to its total.

use super::{Bytes, Moment};

impl Bytes {
    /// The total in words, and what it is made of at the peak.
    pub fn told(&self) -> String {
        let [weights, training, operation, libraries] =
            [self.weights, self.training, self.operation, self.libraries].map(bytes);
        let at_the_peak = match self.moment {
            Moment::Slot => format!(
                "activations {}, the largest operation {operation}",
                bytes(self.activations)
            ),
            Moment::Exchange => {
                format!("the exchange between workers {operation} (more than a slot takes)")
            }
            Moment::Update => format!("the update {operation} (more than a slot takes)"),
        };
        let total = bytes(self.total());
        format!(
            "about {total} a worker: weights {weights}, training {training}, {at_the_peak}, libraries and program {libraries}"
        )
    }
}

/// A number of bytes in words: 1536 as `1.5 KiB`.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{count} B"),
        _ => format!("{value:.1} {}", UNITS[unit]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_those_of_the_peak() {
        let slot = Bytes {
            weights: 1 << 30,
            training: 512 << 20,
            activations: 384 << 20,
            operation: 128 << 20,
            libraries: 32 << 20,
            moment: Moment::Slot,
        };
        assert_eq!(
            slot.told(),
            "about 2.0 GiB a worker: weights 1.0 GiB, training 512.0 MiB, activations 384.0 MiB, the largest operation 128.0 MiB, \
             libraries and program 32.0 MiB"
        );
        let exchange = Bytes {
            activations: 0,
            moment: Moment::Exchange,
            ..slot
        };
        let told = exchange.told();
        assert!(told.contains("the exchange between workers 128.0 MiB"));
        assert!(!told.contains("activations"));
    }
}
