//! Splits of listings and cards are those that `datasets` finds (splits.json, made by make_splits.py).

#![allow(clippy::unwrap_used)]

use common::data::card::configs_of;
use common::data::splits::split_files;
use serde_json::{Value as Json, json};

fn golden(key: &str) -> Vec<Json> {
    let text = include_str!("formats/splits.json");
    let json: Json = serde_json::from_str(text).unwrap();
    json[key].as_array().unwrap().clone()
}

fn paths(case: &Json) -> Vec<&str> {
    let paths = case["paths"].as_array().unwrap().iter();
    paths.map(|path| path.as_str().unwrap()).collect()
}

#[test]
fn listings_have_the_splits_that_datasets_finds() {
    let cases = golden("listings");
    assert!(cases.len() > 40);
    for case in cases {
        let found = split_files(&paths(&case)).map_or(Json::Null, |splits| json!(splits));
        assert_eq!(found, case["splits"], "{:?}", paths(&case));
    }
}

#[test]
fn cards_have_the_files_that_datasets_finds() {
    for case in golden("cards") {
        let found = configs_of(&json!({"configs": case["configs"]})).and_then(|configs| {
            let found = configs.iter().map(|config| {
                let splits = config.files(&paths(&case))?;
                Ok(json!([config.name, config.is_default, splits]))
            });
            found.collect::<Result<Vec<Json>, String>>()
        });
        let found = found.map_or(Json::Null, Json::Array);
        assert_eq!(found, case["found"], "{}", case["configs"]);
    }
}

#[test]
fn what_is_wrong_with_a_card_is_one_line() {
    let reason = |configs: Json| configs_of(&json!({"configs": configs})).unwrap_err();
    assert_eq!(
        reason(json!([{"data_files": "a"}])),
        "`configs[0]` has no `config_name`"
    );
    assert!(reason(json!("a")).contains("must be a list"));
    let name = json!([{"config_name": "a", "data_files": [{"split": "a-b", "path": "c"}]}]);
    assert!(reason(name).contains("names the split `a-b`"));
    assert_eq!(configs_of(&json!({})), Ok(Vec::new()));
}
