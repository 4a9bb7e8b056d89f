use prost::Message;
use serde_json::json;

use super::model::{ModelProto, NormalizerSpec, PieceProto, TrainerSpec};
use super::*;

/// The pieces `<unk>`, `<s>`, `</s>`, `a`, `b`, `ab`.
fn proto() -> ModelProto {
    let pieces = [
        ("<unk>", 0.0, 2),
        ("<s>", 0.0, 3),
        ("</s>", 0.0, 3),
        ("a", -1.0, 1),
        ("b", -2.0, 1),
        ("ab", -3.0, 1),
    ];
    ModelProto {
        pieces: pieces
            .map(|(text, score, kind)| piece(text, score, kind))
            .to_vec(),
        trainer_spec: Some(TrainerSpec {
            model_type: Some(2),
            ..TrainerSpec::default()
        }),
        normalizer_spec: Some(NormalizerSpec::default()),
    }
}

fn piece(text: &str, score: f32, kind: i32) -> PieceProto {
    PieceProto {
        piece: Some(text.to_owned()),
        score: Some(score),
        kind: Some(kind),
    }
}

fn refused(change: impl FnOnce(&mut ModelProto)) -> String {
    let mut proto = proto();
    change(&mut proto);
    SentencePiece::read(&proto.encode_to_vec(), Beside::default()).unwrap_err()
}

type Change = Box<dyn FnOnce(&mut ModelProto)>;

#[test]
fn a_model_that_cannot_be_right_is_refused_with_what_is_wrong() {
    fn trainer(proto: &mut ModelProto) -> &mut TrainerSpec {
        proto.trainer_spec.as_mut().unwrap()
    }
    let long = "x".repeat(2000);
    let cases: [(Change, &str); 13] = [
        (Box::new(|proto| proto.pieces.clear()), "no pieces"),
        (
            Box::new(|proto| proto.trainer_spec = None),
            "ends too early",
        ),
        (
            Box::new(|proto| proto.normalizer_spec = None),
            "ends too early",
        ),
        (
            Box::new(|proto| trainer(proto).model_type = Some(3)),
            "WORD",
        ),
        (
            Box::new(|proto| trainer(proto).model_type = Some(4)),
            "CHAR",
        ),
        (
            Box::new(|proto| trainer(proto).model_type = Some(9)),
            "model_type 9",
        ),
        (
            Box::new(|proto| trainer(proto).treat_whitespace_as_suffix = Some(true)),
            "whitespace",
        ),
        (
            Box::new(|proto| trainer(proto).unk_id = Some(6)),
            "6 as its unknown token",
        ),
        (
            Box::new(|proto| trainer(proto).unk_id = Some(-1)),
            "-1 as its unknown token",
        ),
        (
            Box::new(|proto| proto.pieces.push(piece("a", 0.0, 1))),
            "\"a\" twice",
        ),
        (
            Box::new(|proto| proto.pieces.push(piece("", 0.0, 1))),
            "piece 6 of 0 bytes",
        ),
        (
            Box::new(move |proto| proto.pieces.push(piece(&long, 0.0, 1))),
            "piece 6 of 2000 bytes",
        ),
        (
            Box::new(|proto| proto.pieces.push(piece("c", f32::NAN, 1))),
            "score NaN",
        ),
    ];
    for (change, words) in cases {
        let reason = refused(change);
        assert!(reason.contains(words), "{reason}");
    }
    let reason = refused(|proto| proto.pieces.push(piece("c", 0.0, 7)));
    assert!(reason.contains("type 7"), "{reason}");
}

#[test]
fn rules_that_lead_elsewhere_are_refused() {
    // One unit whose every byte leads beyond it; a trie that is longer than what follows; texts that are none.
    for (bytes, words) in [
        (&[4, 0, 0, 0, 0, 0, 0, 0][..], "out of its trie"),
        (&[8, 0, 0, 0, 0, 0, 0, 0], "shorter"),
        (&[0, 0, 0], "no length"),
        (&[0, 0, 0, 0], "units"),
        (&[4, 0, 0, 0, 0, 0, 0, 0, 0xff], "UTF-8"),
    ] {
        let reason = refused(|proto| {
            let spec = proto.normalizer_spec.as_mut().unwrap();
            spec.precompiled_charsmap = Some(bytes.to_vec());
        });
        assert!(reason.contains(words), "{reason}");
    }
}

#[test]
fn a_class_whose_bytes_the_model_lacks_is_made_as_the_model_says() {
    let beside = Beside {
        tokenizer_config: json!({"tokenizer_class": "LlamaTokenizer", "legacy": false}),
        ..Beside::default()
    };
    let tokenizer = SentencePiece::read(&proto().encode_to_vec(), beside).unwrap();
    assert!(tokenizer.description().contains("generic"));
    let files = tokenizer.files().unwrap();
    let json: Value = serde_json::from_str(&files.tokenizer).unwrap();
    // What is not in the vocabulary is unknown, and not left out.
    assert_eq!(json["model"]["unk_token"], "<unk>");
    assert_eq!(json["model"]["merges"], json!([["a", "b"]]));
    assert_eq!(files.config["tokenizer_class"], make::ANY_CLASS);
}
