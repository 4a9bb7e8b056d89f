//! Names that a job gives and that rows should have: which of them no row had.
//!
//! Enters: rows, on any thread. Leaves: a line for each name that was never met; a slip of the pen would else go unnoticed where
//! a column or a key need not be there.

use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Map, Value as Json};

use crate::job::{DatasetSpec, FieldNames};

/// Names of one dataset, and whether any row had them.
#[derive(Debug, Default)]
pub struct Met {
    names: Vec<Name>,
}

#[derive(Debug)]
struct Name {
    /// The field of the job that gives it.
    field: &'static str,
    /// Any of these will do.
    names: Vec<String>,
    place: Place,
    /// Whether it is an error that no row has it.
    is_needed: bool,
    is_met: AtomicBool,
}

/// Where a name is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Column,
    /// A key of a message.
    Key,
    /// The role of a message, as the data has it.
    OwnRole,
    /// The role of a message, as the template has it.
    Role,
}

const INPUT: &str = "field_input";
/// The field whose text says that rows have an input, and the one that says what those ask that have none.
const FORMAT: &str = "format";
const WITHOUT_INPUT: &str = "no_input_format";

impl Met {
    /// The names that the dataset gives itself.
    pub fn new(spec: &DatasetSpec) -> Self {
        let mut met = Self::default();
        let (usual, sharegpt) = (FieldNames::default(), FieldNames::sharegpt());
        let columns = |fields: &FieldNames| {
            [
                ("field_messages", fields.messages.clone()),
                ("field_prompt", fields.prompt.clone()),
                ("field_completion", fields.completion.clone()),
                ("field_text", fields.text.clone()),
                ("field_tools", fields.tools.clone()),
                ("field_instruction", fields.instruction.clone()),
                (INPUT, fields.input.clone()),
                ("field_output", fields.output.clone()),
                ("field_system", fields.system.clone()),
                ("field_history", fields.history.clone()),
            ]
        };
        let usual = columns(&usual).into_iter().zip(columns(&sharegpt));
        for ((field, own), ((_, usual), (_, sharegpt))) in
            columns(&spec.fields).into_iter().zip(usual)
        {
            if own != usual && own != sharegpt {
                met.watch(field, vec![own], Place::Column);
            }
        }
        if let Some(prompt) = spec.prompt.as_ref().filter(|prompt| prompt.is_of_the_job()) {
            met.names.iter_mut().for_each(|name| name.is_needed = true);
            let is_watched = met.names.iter().any(|name| name.field == INPUT);
            let instead = prompt.is_own_without_input();
            let field = if instead { WITHOUT_INPUT } else { FORMAT };
            if prompt.is_own_with_input() && !is_watched {
                met.watch(field, vec![spec.fields.input.clone()], Place::Column);
            }
        }
        let keys = [
            (
                "field_thinking",
                spec.fields.thinking.as_ref().map(|[own, _]| own),
            ),
            ("message_field_training", spec.mask.training.as_ref()),
            (
                "message_field_training_detail",
                spec.mask.training_detail.as_ref(),
            ),
        ];
        for (field, key) in keys {
            if let Some(key) = key {
                met.watch(field, vec![key.clone()], Place::Key);
            }
        }
        // Whoever lists names of roles lists those that there may be: one of them is enough.
        if !spec.roles.is_empty() {
            let names = spec.roles.iter().map(|(own, _)| own.clone());
            met.watch("roles", names.collect(), Place::OwnRole);
        }
        for role in spec.mask.roles.iter().flatten() {
            met.watch("roles_to_train", vec![role.clone()], Place::Role);
        }
        met
    }

    fn watch(&mut self, field: &'static str, names: Vec<String>, place: Place) {
        self.names.push(Name {
            field,
            names,
            place,
            is_needed: field == FORMAT,
            is_met: AtomicBool::new(false),
        });
    }

    /// Looks for the columns of a row.
    pub(super) fn look_at_row(&self, row: &Map<String, Json>) {
        self.look(Place::Column, |name| row.contains_key(name));
    }

    /// Looks for the keys of a message and its role, whose key is `role`.
    pub(super) fn look_at_message(&self, message: &Json, role: &str) {
        self.look(Place::Key, |name| message.get(name).is_some());
        self.look(Place::OwnRole, |name| message[role] == name);
    }

    /// Looks for the role of a message that was read.
    pub(super) fn look_at_role(&self, role: &str) {
        self.look(Place::Role, |name| name == role);
    }

    fn look(&self, place: Place, has: impl Fn(&str) -> bool) {
        let names = self.names.iter().filter(|name| name.place == place);
        for name in names.filter(|name| !name.is_met.load(Ordering::Relaxed)) {
            if name.names.iter().any(|name| has(name)) {
                name.is_met.store(true, Ordering::Relaxed);
            }
        }
    }

    /// A line for each name that no row had.
    pub fn lines(&self, spec: &DatasetSpec) -> Vec<String> {
        let told = self.unmet(false).into_iter();
        told.map(|line| format!("{}: {line}", spec.shown()))
            .collect()
    }

    /// Why the rows cannot be what the job says, where none has a column that its text of them shows.
    pub fn refusals(&self) -> Vec<String> {
        self.unmet(true)
    }

    fn unmet(&self, is_needed: bool) -> Vec<String> {
        let unmet = self
            .names
            .iter()
            .filter(|name| name.is_needed == is_needed && !name.is_met.load(Ordering::Relaxed));
        let line = |name: &Name| {
            let names = name.names.iter().map(|name| format!("`{name}`"));
            let names: Vec<String> = names.collect();
            let names = names.join(", ");
            let what = match name.place {
                Place::Column => format!("no row has the column {names}"),
                Place::Key => format!("no message has the key {names}"),
                Place::OwnRole => format!("no message has one of the roles {names}"),
                Place::Role => format!("no message is of the role {names}"),
            };
            match name.field {
                WITHOUT_INPUT => {
                    format!(
                        "{what}: each is in the text of no_input_format, and none in that of format"
                    )
                }
                FORMAT => format!(
                    "{what}, which `format` shows: name that column with field_input, or say with no_input_format what rows without one ask"
                ),
                field => format!("{what}, which {field} names"),
            }
        };
        unmet.map(line).collect()
    }
}
