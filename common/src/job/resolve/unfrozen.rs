//! Resolves which weights full training changes.

use crate::job::Unfrozen;
use crate::job::read::Reader;

pub(super) fn unfrozen(reader: &mut Reader<'_>) -> Unfrozen {
    let patterns = reader
        .texts("unfrozen_parameters", None)
        .unwrap_or_default();
    let unfrozen = Unfrozen::new(patterns);
    match (unfrozen.check(), reader.given("unfrozen_parameters")) {
        (Err(reason), Some(given)) => {
            reader.problem(given, reason);
            Unfrozen::default()
        }
        _ => unfrozen,
    }
}
