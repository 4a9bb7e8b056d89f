//! NF4 against bitsandbytes: codes, scales and dequantised numbers byte for byte. The golden file is made by `nf4/make.py`.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use common::dynamic_map;
use common::files::tensors::{Dtype, TensorFile};
use common::nf4::{NF4_LEVELS, Nested, Nf4, Scales};
use half::bf16;
use serde_json::Value;

struct Golden {
    file: TensorFile,
    cases: Vec<(String, usize, String)>,
}

fn golden() -> Golden {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/nf4/golden.safetensors");
    let file = TensorFile::open(&path).unwrap();
    let made: Value = serde_json::from_str(file.metadata("made").unwrap()).unwrap();
    let cases = made["cases"].as_object().unwrap().iter();
    let cases = cases.map(|(name, about)| {
        let block = about["blocksize"].as_u64().unwrap() as usize;
        (
            name.clone(),
            block,
            about["quant_type"].as_str().unwrap().to_owned(),
        )
    });
    Golden {
        cases: cases.collect(),
        file,
    }
}

impl Golden {
    fn floats(&self, name: &str) -> Option<Vec<f32>> {
        let view = self.file.get(name)?;
        let mut values = vec![0.0; view.scalars()];
        view.to_f32(&mut values).unwrap();
        Some(values)
    }

    fn bytes(&self, name: &str) -> Option<Vec<u8>> {
        let view = self.file.get(name)?;
        assert_eq!(view.dtype, Dtype::U8, "{name}");
        Some(view.bytes.to_vec())
    }

    /// Compares what a matrix is dequantised to with every form that the file has of it.
    fn check_dequantised(&self, case: &str, form: &str, matrix: &Nf4) {
        for (end, is_narrow) in [("", false), (".bf16", true)] {
            let Some(expected) = self.floats(&format!("{case}.dequantised{form}{end}")) else {
                continue;
            };
            let dequantised = |first: usize| {
                let mut found = vec![f32::NAN; expected.len() - first];
                matrix.dequantise(first, &mut found);
                if is_narrow {
                    found
                        .iter_mut()
                        .for_each(|x| *x = bf16::from_f32(*x).to_f32());
                }
                found
            };
            // By value: bitsandbytes' own kernels differ in the sign of zero.
            assert_eq!(dequantised(0), expected, "{case}{form}{end}");
            let part = expected.len() / 3;
            assert_eq!(
                dequantised(part),
                expected[part..],
                "{case}{form}{end}, a part"
            );
        }
    }
}

#[test]
fn the_levels_are_bitsandbytes_s() {
    let golden = golden();
    assert_eq!(golden.floats("map.nf4").unwrap(), NF4_LEVELS);
    assert_eq!(golden.floats("map.dynamic").unwrap(), dynamic_map::signed());
}

#[test]
fn what_is_quantised_has_bitsandbytes_s_bytes() {
    let golden = golden();
    let mut checked = 0;
    for (case, block, kind) in &golden.cases {
        if (*block, kind.as_str()) != (common::nf4::BLOCK, "nf4") {
            continue;
        }
        let weights = golden.floats(&format!("{case}.weights")).unwrap();
        let plain = Nf4::quantise(&weights, false).unwrap();
        assert_eq!(
            plain.codes(),
            golden.bytes(&format!("{case}.codes")).unwrap(),
            "{case}"
        );
        let absmax = golden.floats(&format!("{case}.absmax")).unwrap();
        assert_eq!(plain.scales(), &Scales::Plain(absmax), "{case}");
        golden.check_dequantised(case, "", &plain);
        if let Some(codes) = golden.bytes(&format!("{case}.double.absmax")) {
            let twice = Nf4::quantise(&weights, true).unwrap();
            let Scales::Nested(nested) = twice.scales() else {
                panic!("{case}: scales that are not nested");
            };
            let absmax = golden
                .floats(&format!("{case}.double.nested_absmax"))
                .unwrap();
            let offset = golden.floats(&format!("{case}.double.offset")).unwrap()[0];
            assert_eq!(nested.parts(), (&codes[..], &absmax[..], offset), "{case}");
            assert_eq!(twice.codes(), plain.codes(), "{case}");
            golden.check_dequantised(case, ".double", &twice);
        }
        checked += 1;
    }
    assert!(checked >= 12, "{checked} cases");
}

#[test]
fn what_others_quantised_is_read_by_its_own_levels_and_blocks() {
    let golden = golden();
    for (case, block, kind) in &golden.cases {
        let scalars = golden.floats(&format!("{case}.weights")).unwrap().len();
        let levels = golden
            .floats(&format!("map.{kind}"))
            .unwrap()
            .try_into()
            .unwrap();
        let codes = golden.bytes(&format!("{case}.codes")).unwrap();
        let matrix =
            |scales| Nf4::of_parts(codes.clone(), scalars, *block, levels, scales).unwrap();
        let absmax = golden.floats(&format!("{case}.absmax")).unwrap();
        golden.check_dequantised(case, "", &matrix(Scales::Plain(absmax)));
        if let Some(codes) = golden.bytes(&format!("{case}.double.absmax")) {
            let absmax = golden
                .floats(&format!("{case}.double.nested_absmax"))
                .unwrap();
            let offset = golden.floats(&format!("{case}.double.offset")).unwrap()[0];
            let nested =
                Nested::of_parts(codes, *dynamic_map::signed(), 256, absmax, offset).unwrap();
            golden.check_dequantised(case, ".double", &matrix(Scales::Nested(nested)));
        }
    }
}

#[test]
fn a_number_that_is_not_finite_is_refused_and_parts_that_do_not_fit_are_named() {
    let error = Nf4::quantise(&[1.0, f32::INFINITY], true).unwrap_err();
    assert_eq!(error.to_string(), "holds inf, which cannot be quantised");
    let of_parts = |codes, block, scales: usize| {
        let scales = Scales::Plain(vec![1.0; scales]);
        Nf4::of_parts(vec![0; codes], 130, block, NF4_LEVELS, scales).map_err(|e| e.to_string())
    };
    assert!(of_parts(65, 64, 3).is_ok());
    assert_eq!(
        of_parts(64, 64, 3).unwrap_err(),
        "has 64 bytes of codes where its shape makes it 65"
    );
    assert!(of_parts(65, 64, 2).unwrap_err().contains("scales"));
    assert!(of_parts(65, 48, 3).unwrap_err().contains("48"));
}

#[test]
fn the_bytes_of_a_matrix_are_counted_as_they_are() {
    for scalars in [1, 64, 130, 40_000] {
        let weights: Vec<f32> = (0..scalars).map(|i| (i as f32).sin()).collect();
        for nested in [false, true] {
            let matrix = Nf4::quantise(&weights, nested).unwrap();
            assert_eq!(matrix.bytes() as u64, common::nf4::bytes(scalars, nested));
        }
    }
}
