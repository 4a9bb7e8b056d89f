//! Examples and answers, as they are shown.

use common::data::TextSpan;

use super::*;

fn sample(spans: &[(&str, bool)]) -> Sample {
    Sample {
        text: spans.iter().map(|(text, _)| *text).collect(),
        input_ids: vec![1, 2, 3],
        labels: vec![-100, 2, 3],
        spans: spans
            .iter()
            .map(|(text, trained)| TextSpan {
                text: (*text).to_owned(),
                trained: *trained,
            })
            .collect(),
    }
}

#[test]
fn a_sample_marks_what_is_learned() {
    let sample = sample(&[
        ("<user>Hi\n<assistant>", false),
        ("Ahoy!\nYou!", true),
        ("\n", false),
    ]);
    assert_eq!(
        sample::render(&sample, PLAIN),
        "\nsample  3 tokens, 2 of them learned, marked ⟦like this⟧:\n  <user>Hi\n  <assistant>⟦Ahoy!\n  You!⟧\n\n"
    );
    let coloured = sample::render(&sample, COLOUR);
    assert!(
        coloured.contains("\x1b[1;32mAhoy!\x1b[0m\n  \x1b[1;32mYou!\x1b[0m"),
        "{coloured:?}"
    );
    assert!(!coloured.contains('⟦'));
}

#[test]
fn a_long_sample_is_cut_and_a_hostile_one_is_harmless() {
    let long = "x".repeat(5000);
    let text = sample::render(
        &sample(&[
            ("\x1b]0;owned\x07\u{202e}", false),
            (&long, true),
            ("end", true),
        ]),
        PLAIN,
    );
    assert!(text.contains("… and 3,514 more characters"), "{text}");
    assert!(
        text.chars().all(|c| c == '\n' || !c.is_control()),
        "{text:?}"
    );
    assert!(!text.contains('\u{202e}'));
}

#[test]
fn answers_stand_below_each_other() {
    let answers = [Answer {
        prompt: "Who?".into(),
        before: Some("I am\na model.\n".into()),
        after: " Pip!\x1b[2J".into(),
    }];
    assert_eq!(
        answers::render(&answers, PLAIN),
        "\n> Who?\n  before  I am\n          a model.\n  after   Pip!␛[2J\n"
    );
}
