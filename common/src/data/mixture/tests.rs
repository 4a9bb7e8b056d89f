use serde_json::Value as Json;

use super::*;

fn golden() -> Json {
    serde_json::from_str(include_str!("../../../tests/mixture/golden.json")).unwrap()
}

fn numbers<T: TryFrom<u64>>(json: &Json) -> Vec<T> {
    let numbers = json.as_array().unwrap().iter();
    numbers
        .map(|number| T::try_from(number.as_u64().unwrap()).ok().unwrap())
        .collect()
}

fn set(rows: u64) -> Set {
    Set {
        rows,
        fraction: None,
        repeat: 1,
    }
}

fn spec(strategy: MixStrategy) -> MixtureSpec {
    MixtureSpec {
        strategy,
        ..MixtureSpec::default()
    }
}

#[test]
fn sets_are_interleaved_as_by_the_library_datasets() {
    let golden = golden();
    let cases = golden["interleaved"].as_array().unwrap();
    assert_eq!(cases.len(), 39);
    for case in cases {
        let strategy: MixStrategy = serde_json::from_value(case["strategy"].clone()).unwrap();
        let lengths: Vec<u64> = numbers(&case["lengths"]);
        let expected: Vec<u64> = numbers(&case["rows"]);
        let mut rows = Vec::new();
        let mut put = |set: usize, index: u64| {
            let first: u64 = lengths[..set].iter().sum();
            rows.push(first + index % lengths[set]);
            Ok(())
        };
        match case.get("draws") {
            None => by_turns(&lengths, strategy, &mut put).unwrap(),
            Some(draws) => {
                let draws: Vec<usize> = numbers(draws);
                at_random(&lengths, strategy, draws.into_iter(), &mut put).unwrap();
            }
        }
        assert_eq!(rows, expected, "{case}");
    }
}

#[test]
fn fractions_keep_the_rows_that_trl_keeps() {
    for case in golden()["fractions"].as_array().unwrap() {
        let fractions = case["fractions"].as_array().unwrap();
        let lengths: Vec<u64> = numbers(&case["lengths"]);
        let sets = lengths.iter().zip(fractions).map(|(rows, fraction)| Set {
            fraction: fraction.as_f64(),
            ..set(*rows)
        });
        let sets: Vec<Set> = sets.collect();
        assert_eq!(taken(&sets), numbers::<u64>(&case["taken"]), "{case}");
    }
}

#[test]
fn sets_that_are_joined_as_they_are_have_no_order_of_their_own() {
    let joined = spec(MixStrategy::Concat);
    assert_eq!(order(&[set(3), set(2)], &joined, 1), Ok(None));
    // One set is not interleaved with anything.
    let turns = spec(MixStrategy::InterleaveUnder);
    assert_eq!(order(&[set(3)], &turns, 1), Ok(None));
}

#[test]
fn repeated_sets_come_whole_again_and_again() {
    let twice = Set {
        repeat: 2,
        ..set(2)
    };
    let joined = spec(MixStrategy::Concat);
    assert_eq!(
        order(&[twice, set(1)], &joined, 1),
        Ok(Some(vec![0, 1, 0, 1, 2]))
    );
    // Its four rows take turns with those of the other set.
    let turns = spec(MixStrategy::InterleaveUnder);
    let found = order(&[twice, set(3)], &turns, 1).unwrap().unwrap();
    assert_eq!(found, [0, 2, 1, 3, 0, 4]);
}

#[test]
fn the_draws_are_a_function_of_the_seed_and_keep_to_the_probabilities() {
    let mixed = MixtureSpec {
        probabilities: vec![0.75, 0.25],
        ..spec(MixStrategy::InterleaveOver)
    };
    let sets = [set(3000), set(3000)];
    let found = order(&sets, &mixed, 7).unwrap().unwrap();
    assert_eq!(order(&sets, &mixed, 7).unwrap().unwrap(), found);
    assert_ne!(order(&sets, &mixed, 8).unwrap().unwrap(), found);
    let first = found.iter().filter(|row| **row < 3000).count() as f64;
    let share = first / found.len() as f64;
    assert!((share - 0.75).abs() < 0.02, "{share}");
    let mut seen = found.clone();
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen.len(), 6000);
}

#[test]
fn rows_are_shuffled_within_their_set_only() {
    let shuffled = MixtureSpec {
        shuffle_sets: true,
        ..spec(MixStrategy::Concat)
    };
    let found = order(&[set(100), set(50)], &shuffled, 1).unwrap().unwrap();
    let (mut first, mut second) = (found[..100].to_vec(), found[100..].to_vec());
    assert_ne!(first, (0..100).collect::<Vec<u32>>());
    first.sort_unstable();
    second.sort_unstable();
    assert_eq!(first, (0..100).collect::<Vec<u32>>());
    assert_eq!(second, (100..150).collect::<Vec<u32>>());
}

#[test]
fn a_mixture_without_end_and_a_set_without_rows_are_refused() {
    let rare = MixtureSpec {
        probabilities: vec![1.0, 0.0],
        ..spec(MixStrategy::InterleaveUnder)
    };
    // Nothing is taken of the second.
    assert_eq!(order(&[set(2), set(0)], &rare, 1).unwrap().unwrap(), [0, 1]);
    let turns = spec(MixStrategy::InterleaveOver);
    let error = order(&[set(2), set(0)], &turns, 1).unwrap_err();
    assert!(
        error.starts_with("dataset 2 of the job has no rows"),
        "{error}"
    );
    let never = [0; 5].into_iter();
    let error = at_random(&[2, 2], MixStrategy::InterleaveOver, never, &mut |_, _| {
        Ok(())
    });
    assert!(error.unwrap_err().contains("a larger share"));
}
