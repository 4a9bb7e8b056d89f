//! Chat templates by name write what the templates of that name write elsewhere (golden texts, and the scripts that make
//! them from the originals, are in `named_templates/`).
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::PathBuf;

use common::data::template::{
    ChatTemplate, RenderInput, Value, Variables, message_value, to_value,
};
use common::data::tokenize::SpecialTokens;
use common::job::TemplateChoice;
use serde_json::Value as Json;

fn golden(name: &str) -> Json {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/named_templates")
        .join(name);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn special_tokens(tokens: &Json) -> SpecialTokens {
    let pairs = tokens.as_object().unwrap().iter();
    SpecialTokens::from_pairs(pairs.map(|(name, text)| (name.as_str(), text.as_str().unwrap())))
}

/// The text of a conversation, or nothing where the template raises.
fn render(
    template: &ChatTemplate,
    conversation: &Json,
    variables: &Json,
    asks: bool,
) -> Option<String> {
    let messages = conversation["messages"].as_array().unwrap();
    let messages: Vec<Value> = messages.iter().map(message_value).collect();
    let tools = conversation
        .get("tools")
        .filter(|tools| !tools.is_null())
        .map(to_value);
    let variables = Variables::from_json(variables).unwrap();
    let input = RenderInput {
        messages: &messages,
        tools: tools.as_ref(),
        variables: &variables,
        add_generation_prompt: asks,
    };
    template.render_input(input).ok()
}

#[test]
fn named_templates_write_what_the_originals_write() {
    let golden = golden("golden.json");
    let made_with = &golden["made_with"];
    let moment = made_with["moment"].as_i64().unwrap();
    let by_name = |conversation: &'_ Json| conversation["name"].as_str().unwrap().to_owned();
    let conversations: BTreeMap<String, &Json> = golden["conversations"]
        .as_array()
        .unwrap()
        .iter()
        .map(|conversation| (by_name(conversation), conversation))
        .collect();
    let mut templates = BTreeMap::new();
    let mut names = std::collections::BTreeSet::new();
    for case in golden["cases"].as_array().unwrap() {
        let name = case["template"].as_str().unwrap();
        names.insert(name);
        let tokens = case.get("tokens").unwrap_or(&made_with["tokens"]);
        let template = templates
            .entry((name, tokens.to_string()))
            .or_insert_with(|| {
                let text = common::chat_templates::find(name).unwrap();
                ChatTemplate::from_source(text, &special_tokens(tokens), moment).unwrap()
            });
        let conversation = conversations[case["conversation"].as_str().unwrap()];
        let opening = case.get("opening").map_or("", |number| {
            golden["openings"][number.as_u64().unwrap() as usize]
                .as_str()
                .unwrap()
        });
        let whole = |text: &Json| text.as_str().map(|text| format!("{opening}{text}"));
        let parsed = case
            .get("text_with_parsed_arguments")
            .map(|text| text.as_str().map(str::to_owned));
        let expected = parsed.clone().unwrap_or_else(|| whole(&case["text"]));
        let variables = &case["variables"];
        let what = format!("{name} on {} with {variables}", case["conversation"]);
        assert_eq!(
            render(template, conversation, variables, false),
            expected,
            "{what}"
        );
        let asked = match case.get("prompt") {
            Some(prompt) => expected.map(|text| text + prompt.as_str().unwrap()),
            None if parsed.is_some() => continue,
            None => case["prompted"].as_str().map(str::to_owned),
        };
        assert_eq!(
            render(template, conversation, variables, true),
            asked,
            "{what}, asked"
        );
    }
    assert!(names.len() > 35, "{names:?}");
}

#[test]
fn names_of_llama_factory_write_what_it_writes() {
    let golden = golden("golden_llamafactory.json");
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() > 200);
    for case in cases {
        let theirs = case["template"].as_str().unwrap();
        let Some(ours) = common::chat_templates::of_llama_factory(theirs) else {
            continue;
        };
        let tokens =
            serde_json::json!({"bos_token": golden["bos_token"], "eos_token": case["eos_token"]});
        let text = common::chat_templates::find(ours).unwrap();
        let template = ChatTemplate::from_source(text, &special_tokens(&tokens), 0).unwrap();
        let found = render(&template, case, &case["variables"], false);
        assert_eq!(
            found.as_deref(),
            case["text"].as_str(),
            "{theirs}: {}",
            case["messages"]
        );
    }
}

#[test]
fn a_job_gets_the_template_that_it_names() {
    let dir = tempfile::tempdir().unwrap();
    let own = r#"{"chat_template": "own", "eos_token": "</s>"}"#;
    let chosen = |choice: TemplateChoice| ChatTemplate::chosen(dir.path(), &choice).unwrap();
    let named = |name: &str| TemplateChoice::Named(name.to_owned());
    let or_named = || TemplateChoice::ModelOrNamed("zephyr".to_owned());
    assert!(chosen(TemplateChoice::Model).is_none());
    assert!(chosen(or_named()).unwrap().brought().is_some());
    std::fs::write(dir.path().join("tokenizer_config.json"), own).unwrap();
    assert_eq!(chosen(TemplateChoice::Model).unwrap().brought(), None);
    assert_eq!(chosen(or_named()).unwrap().source(), "own");
    let zephyr = chosen(named("zephyr")).unwrap();
    let messages = [serde_json::json!({"role": "user", "content": "hi"})];
    // With the model's end token.
    assert!(
        zephyr
            .render(&messages, None, true)
            .unwrap()
            .contains("hi</s>")
    );
    assert_eq!(zephyr.brought(), Some(zephyr.source()));
}

#[test]
fn a_token_that_the_tokenizer_has_not_is_left_out_by_a_template_of_ours() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(
        dir.path().join("tokenizer_config.json"),
        r#"{"eos_token": "</s>"}"#,
    )
    .unwrap();
    let choice = TemplateChoice::Named("llama3".to_owned());
    let template = ChatTemplate::chosen(dir.path(), &choice).unwrap().unwrap();
    let messages = [serde_json::json!({"role": "user", "content": "hi"})];
    let text = template.render(&messages, None, false).unwrap();
    assert!(text.starts_with("<|start_header_id|>user"), "{text}");
    assert_eq!(template.missing_tokens(), ["bos_token"]);
    // What is brought along says so itself, for whatever renders it later.
    let choice = TemplateChoice::Text(template.brought().unwrap().to_owned());
    let brought = ChatTemplate::chosen(dir.path(), &choice).unwrap().unwrap();
    assert_eq!(brought.render(&messages, None, false).unwrap(), text);
}
