//! Chat templates by name, for models that have none or speak another one.
//!
//! Enters: a name, as Axolotl has it. Leaves: the template's text, in Jinja. Each text is our own and renders what the
//! template of that name renders elsewhere (`common/tests/named_templates`).

macro_rules! templates {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("chat_templates/", $name, ".jinja")))),*]
    };
}

const TEMPLATES: &[(&str, &str)] = templates!["alpaca", "chatml", "llama3",];

/// Other names of the same texts.
const ALIASES: &[(&str, &str)] = &[];

/// The text of the template with this name.
pub fn find(name: &str) -> Option<&'static str> {
    let alias = ALIASES.iter().find(|(alias, _)| *alias == name);
    let name = alias.map_or(name, |(_, name)| name);
    let found = TEMPLATES.iter().find(|(known, _)| *known == name);
    found.map(|(_, text)| *text)
}

/// The names of all templates, without aliases.
pub fn names() -> impl Iterator<Item = &'static str> {
    TEMPLATES.iter().map(|(name, _)| *name)
}
