//! Gradients of trainable tensors, whole and in parts, reach the accumulator.

use super::*;
use crate::engine::EngineError;
use crate::engine::accumulator::Accumulator;
use common::job::Reduction;

fn parameters(collect: Collect) -> Parameters {
    let layout = Layout::new([("b".into(), vec![2]), ("a".into(), vec![3, 1])]);
    Parameters::new(layout, vec![1.0, 2.0, 3.0, 4.0, 5.0], collect)
}

fn change(parameters: &Parameters, write: impl FnOnce(&mut [f32])) {
    parameters.update(|weights| match weights {
        FlatWeights::Float32(flat) => write(flat),
        FlatWeights::Bfloat16(_) => unreachable!("float32 weights"),
    });
}

fn fill(parameters: &Parameters, name: &str, value: f32) {
    let weight = parameters.weight(name).unwrap();
    weight.add_gradient(|_, gradient, accumulate| {
        for g in gradient {
            *g = if accumulate { *g + value } else { value };
        }
    });
}

fn accumulator() -> Accumulator {
    let mut accumulator = Accumulator::new(Reduction::Exact, 5);
    accumulator.begin(0, 1, 1);
    accumulator
}

#[test]
fn an_update_in_place_is_seen_by_every_view() {
    let parameters = parameters(Collect::Slot);
    let b = parameters.weight("b").unwrap();
    change(&parameters, |flat| flat.iter_mut().for_each(|w| *w *= 10.0));
    assert_eq!(*b.read_f32(), [40.0, 50.0]);
    assert!(parameters.weight("c").is_none());
}

#[test]
fn gradients_of_all_uses_reach_the_sum_either_way() {
    for collect in [Collect::Slot, Collect::Sums] {
        let (parameters, mut accumulator) = (parameters(collect), accumulator());
        for slot in 0..2 {
            parameters.gradients().begin(&mut accumulator, 2);
            fill(&parameters, "a", 1.0);
            let rows = parameters.weight("a").unwrap();
            rows.add_gradient_rows(&[2, 0], &[10.0, 20.0]);
            fill(&parameters, "b", 4.0);
            let finished = parameters.gradients().finish(slot, &mut accumulator);
            finished.unwrap();
            let rows = f32::from(slot as u8 + 1);
            let expected = [21.0, 1.0, 11.0, 4.0, 4.0].map(|g| g * rows);
            assert_eq!(accumulator.mean(), expected);
            assert!(accumulator.holds(slot));
        }
    }
}

#[test]
fn rows_alone_leave_the_others_zero() {
    let (parameters, mut accumulator) = (parameters(Collect::Slot), accumulator());
    fill(&parameters, "a", 7.0);
    parameters.gradients().begin(&mut accumulator, 1);
    let a = parameters.weight("a").unwrap();
    a.add_gradient_rows(&[1], &[3.0]);
    fill(&parameters, "b", 4.0);
    let finished = parameters.gradients().finish(0, &mut accumulator);
    finished.unwrap();
    assert_eq!(accumulator.mean(), [0.0, 3.0, 0.0, 4.0, 4.0]);
}

#[test]
fn a_tensor_has_its_gradient_once_all_of_its_parts_have() {
    for collect in [Collect::Slot, Collect::Sums] {
        let (parameters, mut accumulator) = (parameters(collect), accumulator());
        if collect == Collect::Slot {
            // What is left of an earlier slot.
            fill(&parameters, "a", 7.0);
        }
        let parts: Vec<Weight> = (0..3)
            .map(|part| parameters.part("a", part).unwrap())
            .collect();
        assert_eq!(*parts[1].read_f32(), [2.0]);
        assert!(parameters.part("c", 0).is_none());
        for given in [2, 3] {
            // A slot that fails may take the open step with it.
            accumulator.begin(0, 1, 1);
            parameters.gradients().begin(&mut accumulator, 2);
            fill(&parameters, "b", 4.0);
            for (part, weight) in parts.iter().enumerate().take(given) {
                match part {
                    1 => weight.add_gradient_rows(&[], &[]),
                    _ => weight.add_gradient(|_, gradient, accumulate| {
                        assert!(!accumulate);
                        gradient.fill(part as f32 + 1.0);
                    }),
                }
            }
            let finished = parameters.gradients().finish(0, &mut accumulator);
            assert_eq!(finished.is_ok(), given == 3);
        }
        assert_eq!(accumulator.mean(), [1.0, 0.0, 3.0, 4.0, 4.0]);
    }
}

#[test]
fn every_so_manieth_column_is_a_matrix_of_its_own() {
    for collect in [Collect::Slot, Collect::Sums] {
        let layout = Layout::new([("m".into(), vec![2, 4]), ("n".into(), vec![4, 1])]);
        let values: Vec<f32> = (0..12).map(|x| x as f32).collect();
        let parameters = Parameters::new(layout, values, collect);
        let columns = parameters.columns("m", 2).unwrap();
        let rows = parameters.rows("n", 2).unwrap();
        assert_eq!(columns[1].dims(), [2, 2]);
        assert_eq!(*columns[1].read_f32(), [1.0, 3.0, 5.0, 7.0]);
        assert_eq!(*rows[1].read_f32(), [10.0, 11.0]);
        change(&parameters, |flat| flat[3] = 30.0);
        assert_eq!(*columns[1].read_f32(), [1.0, 30.0, 5.0, 7.0]);
        let mut accumulator = Accumulator::new(Reduction::Exact, 12);
        for (slot, given) in [(0, 1), (1, 2), (2, 2)] {
            accumulator.begin(0, 1, 3);
            parameters.gradients().begin(&mut accumulator, 1);
            for (part, weight) in columns.iter().enumerate().take(given) {
                match part {
                    0 => weight.add_gradient(|rows, gradient, accumulate| {
                        assert!(!accumulate && rows == (0..2));
                        gradient.copy_from_slice(&[1.0, 2.0, 3.0, 4.0]);
                    }),
                    _ => weight.add_gradient_rows(&[], &[]),
                }
            }
            for weight in &rows {
                weight.add_gradient(|_, gradient, _| gradient.fill(5.0));
            }
            let finished = parameters.gradients().finish(slot, &mut accumulator);
            assert_eq!(finished.is_ok(), given == 2, "{collect:?}");
        }
        let expected = [1.0, 0.0, 2.0, 0.0, 3.0, 0.0, 4.0, 0.0, 5.0, 5.0, 5.0, 5.0];
        assert_eq!(accumulator.mean(), expected.map(|g| 2.0 * g));
    }
}

#[test]
fn a_trainable_tensor_without_a_gradient_is_an_error() {
    for (collect, left) in [(Collect::Slot, true), (Collect::Sums, false)] {
        let (parameters, mut accumulator) = (parameters(collect), accumulator());
        accumulator.hold(7);
        parameters.gradients().begin(&mut accumulator, 1);
        fill(&parameters, "a", 1.0);
        let error = parameters.gradients().finish(0, &mut accumulator);
        assert!(matches!(error, Err(EngineError::MissingGradient { name }) if name == "b"));
        assert_eq!(accumulator.mean(), [0.0; 5]);
        assert_eq!(accumulator.holds(7), left);
    }
}
