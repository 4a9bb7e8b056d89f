//! The weight files of a model folder, compared with the tensors that its configuration calls for before any memory is
//! taken for them.
//!
//! In: the folder, and names and shapes. Out: files that hold every tensor once, in its shape and in a type that is read,
//! and nothing beside them that would make it another model.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use super::mxfp4::{self, Mxfp4, is_mxfp4};
use super::stacked_experts::ExpertPart;
use super::{ModelFolder, extra, four_bits, is_four_bits, text_part};
use crate::files::FileError;
use crate::files::tensors::{TensorFile, TensorView};
use crate::nf4::Nf4;

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";
/// Most names of tensors in a message.
const MAX_NAMES: usize = 4;

/// Open weight files that hold what was asked for.
#[derive(Debug)]
pub struct WeightFiles {
    dir: PathBuf,
    files: Vec<TensorFile>,
    /// For each tensor, where it is.
    places: HashMap<String, Place>,
    /// Whether the embedding is stored as the output layer, which it is tied to.
    embedding_is_head: bool,
    are_four_bits: bool,
    are_mxfp4: bool,
    notices: Vec<String>,
}

/// Where a tensor is.
#[derive(Debug)]
struct Place {
    /// The index of its file.
    file: usize,
    /// What it is called there.
    stored: String,
    /// Which part of that it is, and its own shape, where it is an expert's and that is of all experts of a layer.
    part: Option<(ExpertPart, Vec<usize>)>,
}

impl WeightFiles {
    /// Opens the weight files of a folder and checks them against `expected`, all tensors of the model; a tied output layer is
    /// none of them.
    pub fn open(
        folder: &ModelFolder,
        expected: &[(String, Vec<usize>)],
    ) -> Result<Self, FileError> {
        let paths = folder.weight_files();
        let files: Vec<TensorFile> = paths
            .iter()
            .map(|path| TensorFile::open(path))
            .collect::<Result<_, _>>()?;
        let mut places = HashMap::new();
        for (index, file) in files.iter().enumerate() {
            for name in file.names() {
                let own = match folder.is_text_part {
                    true => text_part::own_name(name),
                    false => name.to_owned(),
                };
                let stored = name.to_owned();
                if let Some(other) = places.insert(
                    own,
                    Place {
                        file: index,
                        stored,
                        part: None,
                    },
                ) {
                    let other = files[other.file].path().display();
                    let reason = format!(
                        "tensor {name} is also in {other}; one of them is of another model"
                    );
                    return Err(FileError::malformed(file.path(), reason));
                }
            }
        }
        let is_tied = !expected.iter().any(|(name, _)| name == HEAD);
        let mut weights = Self {
            dir: folder.dir().to_owned(),
            embedding_is_head: is_tied
                && !places.contains_key(EMBEDDING)
                && places.contains_key(HEAD),
            are_four_bits: is_four_bits(folder.config_json()),
            are_mxfp4: is_mxfp4(folder.config_json()),
            files,
            places,
            notices: Vec::new(),
        };
        weights.find_stacked(expected)?;
        weights.check_expected(expected)?;
        if is_tied {
            weights.check_tied()?;
        }
        weights.notices = weights.check_extra(folder, expected)?;
        Ok(weights)
    }

    /// Lines for the user on what is in the files and is not used.
    pub fn notices(&self) -> &[String] {
        &self.notices
    }

    /// The tensor, which must have this shape.
    pub fn expect(&self, name: &str, shape: &[usize]) -> Result<TensorView<'_>, FileError> {
        let (file, place) = self.find(name)?;
        let view = self.view(name)?;
        match view.shape == shape {
            true => Ok(view),
            false => Err(FileError::Shape {
                path: file.path().to_owned(),
                tensor: place.stored.clone(),
                expected: shape.to_vec(),
                found: view.shape.to_vec(),
            }),
        }
    }

    /// The tensor, of whichever shape it is stored in.
    fn view(&self, name: &str) -> Result<TensorView<'_>, FileError> {
        let (file, place) = self.find(name)?;
        let whole = file.get(&place.stored);
        let whole = whole.ok_or_else(|| self.missing(&[name]))?;
        Ok(match &place.part {
            None => whole,
            Some((part, shape)) => part.view(whole, shape),
        })
    }

    /// Whether the files hold matrices of 4 bits.
    pub fn are_four_bits(&self) -> bool {
        self.are_four_bits
    }

    /// The matrix, which must have this shape, if the files hold it in 4 bits.
    pub fn four_bits(&self, name: &str, shape: &[usize]) -> Result<Option<Nf4>, FileError> {
        let (file, place) = self.find(name)?;
        match self.is_quantised(name) {
            true => four_bits::read(file, &place.stored, shape).map(Some),
            false => Ok(None),
        }
    }

    /// Whether the tensor is stored as what is widened when it is read, so that it has no bytes of its own.
    pub fn is_widened(&self, name: &str) -> bool {
        let [blocks, _] = mxfp4::parts_of(name);
        self.are_mxfp4 && !self.places.contains_key(name) && self.places.contains_key(&blocks)
    }

    /// The tensor, which must have this shape, if the files hold it in MXFP4.
    fn mxfp4(&self, name: &str, shape: &[usize]) -> Result<Option<Mxfp4<'_>>, FileError> {
        let names = mxfp4::parts_of(name);
        let is_stored = |name: &String| self.places.contains_key(name);
        if !self.are_mxfp4 || self.places.contains_key(name) || !names.iter().any(is_stored) {
            return Ok(None);
        }
        let part = |name: &str| {
            self.view(name).map_err(|_| {
                let reason = format!(
                    "no tensor {name}, a part of what is in MXFP4: the folder is not whole; download it again"
                );
                FileError::malformed(&self.dir, reason)
            })
        };
        let parts = [part(&names[0])?, part(&names[1])?];
        let found = Mxfp4::of_parts(parts, shape);
        found
            .map(Some)
            .map_err(|(part, reason)| self.malformed(&names[part], &reason))
    }

    /// Refuses finite numbers that bfloat16 would make infinite, in any of the tensors.
    pub fn check_bfloat16(&self, expected: &[(String, Vec<usize>)]) -> Result<(), FileError> {
        for (name, shape) in expected {
            // Whatever levels and scales make of it was checked when the files were opened, or is when it is read.
            if self.is_quantised(name) || self.is_widened(name) {
                continue;
            }
            let checked = self.expect(name, shape)?.check_bfloat16();
            checked.map_err(|reason| self.malformed(name, &reason.to_string()))?;
        }
        Ok(())
    }

    /// Writes the tensor's scalars as float32 to `out`, which has as many.
    pub fn read_f32(&self, name: &str, shape: &[usize], out: &mut [f32]) -> Result<(), FileError> {
        self.read_part(name, shape, 0, out)
    }

    /// Writes the tensor's scalars from `first` on as float32 to `out`, which has no more than there are.
    pub fn read_part(
        &self,
        name: &str,
        shape: &[usize],
        first: usize,
        out: &mut [f32],
    ) -> Result<(), FileError> {
        if let Some(stored) = self.mxfp4(name, shape)? {
            let widened = stored.widen(first, out);
            return widened.map_err(|reason| self.malformed(name, &reason));
        }
        if let Some(matrix) = self.four_bits(name, shape)? {
            matrix.dequantise(first, out);
            return Ok(());
        }
        let read = self.expect(name, shape)?.part_to_f32(first, out);
        read.map_err(|reason| self.malformed(name, &reason.to_string()))
    }

    /// The error of a tensor that cannot be used; `reason` follows its name.
    pub fn malformed(&self, name: &str, reason: &str) -> FileError {
        let [blocks, _] = mxfp4::parts_of(name);
        match self.find(name).or_else(|_| self.find(&blocks)) {
            Ok((file, place)) => {
                FileError::malformed(file.path(), format!("tensor {} {reason}", place.stored))
            }
            Err(missing) => missing,
        }
    }

    /// Whether the files hold this matrix in 4 bits.
    pub fn is_quantised(&self, name: &str) -> bool {
        self.are_four_bits
            && self
                .find(name)
                .is_ok_and(|(file, place)| four_bits::is_quantised(file, &place.stored))
    }

    /// The file that holds a tensor, and where it is there.
    fn find(&self, name: &str) -> Result<(&TensorFile, &Place), FileError> {
        let stored = match self.embedding_is_head && name == EMBEDDING {
            true => HEAD,
            false => name,
        };
        match self.places.get(stored) {
            Some(place) => Ok((&self.files[place.file], place)),
            None => Err(self.missing(&[name])),
        }
    }

    /// Finds the matrices of experts that are parts of tensors of all experts of a layer, which then count as no tensors themselves.
    /// Where some of them are stored by themselves, too, it is nobody's guess which are meant, and these stay what is too much.
    fn find_stacked(&mut self, expected: &[(String, Vec<usize>)]) -> Result<(), FileError> {
        let mut stacks = BTreeMap::<String, Vec<_>>::new();
        for (name, shape) in expected {
            if let Some((whole, part)) = ExpertPart::of(name)
                && self.places.contains_key(&whole)
            {
                stacks.entry(whole).or_default().push((name, shape, part));
            }
        }
        for (whole, matrices) in stacks {
            let mut names = matrices.iter().map(|(name, ..)| *name);
            let [(_, shape, part), ..] = &matrices[..] else {
                continue;
            };
            if names.any(|name| self.places.contains_key(name)) {
                continue;
            }
            let expected = part.whole_shape(matrices.len(), shape);
            self.check_shape(&whole, &expected)?;
            let Some(Place { file, stored, .. }) = self.places.remove(&whole) else {
                continue;
            };
            for (name, shape, part) in matrices {
                let place = Place {
                    file,
                    stored: stored.clone(),
                    part: Some((part, shape.clone())),
                };
                self.places.insert(name.clone(), place);
            }
        }
        Ok(())
    }

    /// Refuses a tensor in another shape than the configuration gives it.
    fn check_shape(&self, name: &str, shape: &[usize]) -> Result<(), FileError> {
        let found = self.view(name)?.shape;
        match found == shape {
            true => Ok(()),
            false => Err(self.malformed(
                name,
                &format!(
                    "has shape {found:?} where config.json makes it {shape:?}; one of the two files is of another model"
                ),
            )),
        }
    }

    /// Checks that every tensor is there, in a type that is read and in its shape.
    fn check_expected(&self, expected: &[(String, Vec<usize>)]) -> Result<(), FileError> {
        let mut missing = Vec::new();
        for (name, shape) in expected {
            if self.mxfp4(name, shape)?.is_some() {
                continue;
            }
            if self.find(name).is_err() {
                missing.push(name.as_str());
                continue;
            }
            if self.four_bits(name, shape)?.is_some() {
                continue;
            }
            let view = self.view(name)?;
            if !view.is_readable() {
                let reason = format!(
                    "is {:?}; F32, BF16, F16 and F64 are read: use the model before it was quantised or converted",
                    view.dtype
                );
                return Err(self.malformed(name, &reason));
            }
            let checked = view.check_range();
            checked.map_err(|reason| self.malformed(name, &reason.to_string()))?;
            self.check_shape(name, shape)?;
        }
        match missing.is_empty() {
            true => Ok(()),
            false => Err(self.missing(&missing)),
        }
    }

    fn missing(&self, names: &[&str]) -> FileError {
        let hint = match names {
            [HEAD] => {
                "; if the embedding is the output layer, config.json says tie_word_embeddings: true"
            }
            _ if self
                .places
                .keys()
                .any(|name| name.ends_with(".lora_A.weight")) =>
            {
                "; there are an adapter's tensors instead: merge it into its model first"
            }
            [name, ..] if self.places.contains_key(&mxfp4::parts_of(name)[0]) => {
                "; it is stored in MXFP4, but there is no quantization_config in config.json that says so"
            }
            _ if self.places.contains_key("embed_tokens.weight") => {
                "; its tensors are called without \"model.\": save it with AutoModelForCausalLM"
            }
            _ => "; a file of the model is missing, or config.json belongs to another model",
        };
        let reason = format!("no tensor {}{hint}", listed(names));
        FileError::malformed(&self.dir, reason)
    }

    /// Refuses an output layer that differs from the embedding which it is tied to.
    fn check_tied(&self) -> Result<(), FileError> {
        let get = |name: &str| {
            let place = self.places.get(name)?;
            let file = &self.files[place.file];
            Some((file, file.get(&place.stored)?))
        };
        let (Some((_, embedding)), Some((file, head))) = (get(EMBEDDING), get(HEAD)) else {
            return Ok(());
        };
        let is_same = head.dtype == embedding.dtype
            && head.shape == embedding.shape
            && head.bytes == embedding.bytes;
        match is_same {
            true => Ok(()),
            false => Err(FileError::malformed(
                file.path(),
                format!(
                    "tensor {HEAD} differs from {EMBEDDING}, and config.json says tie_word_embeddings: true; if the model has an output layer of its own, say false there"
                ),
            )),
        }
    }

    /// Refuses tensors without which the result would be another model; names those that matter to nobody.
    fn check_extra(
        &self,
        folder: &ModelFolder,
        expected: &[(String, Vec<usize>)],
    ) -> Result<Vec<String>, FileError> {
        let expected: std::collections::HashSet<&str> =
            expected.iter().map(|(name, _)| name.as_str()).collect();
        let mut names: Vec<&str> = self
            .places
            .keys()
            .map(String::as_str)
            .filter(|name| !expected.contains(name) && *name != HEAD)
            .filter(|name| !four_bits::weight_of(name).is_some_and(|w| self.is_quantised(w)))
            .filter(|name| {
                let whole = mxfp4::tensor_of(name);
                !whole.is_some_and(|whole| expected.contains(whole) && self.is_widened(whole))
            })
            .collect();
        names.sort_unstable();
        let (harmless, altering): (Vec<&str>, Vec<&str>) = names
            .into_iter()
            .partition(|name| extra::is_harmless(name, folder.config_json()));
        if let Some(first) = altering.first() {
            let reason = format!(
                "no place in this {} for {}: {}",
                folder.architecture().class(),
                listed(&altering),
                extra::reason(first, folder.config_json()),
            );
            return Err(FileError::malformed(
                self.files[self.places[*first].file].path(),
                reason,
            ));
        }
        Ok(match harmless.is_empty() {
            true => Vec::new(),
            false => vec![format!(
                "{}: not used, and not in the result: {}",
                self.dir.display(),
                listed(&harmless)
            )],
        })
    }
}

/// The first few names.
pub(in crate::files) fn listed(names: &[&str]) -> String {
    let shown = names[..names.len().min(MAX_NAMES)].join(", ");
    match names.len().saturating_sub(MAX_NAMES) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::Path;

    use serde_json::{Value, json};

    use super::*;
    use crate::files::json::write_json;
    use crate::files::names::CONFIG;
    use crate::files::tensors::{Dtype, write};
    use crate::job::InitWeights;

    type Tensor = (&'static str, Dtype, &'static [usize], f64);

    const NORM: Tensor = ("model.norm.weight", Dtype::F32, &[2], 1.0);
    const EMBED: Tensor = (EMBEDDING, Dtype::F32, &[3, 2], 0.5);
    const OUTPUT: Tensor = (HEAD, Dtype::F32, &[3, 2], 0.5);

    fn bytes((_, dtype, shape, value): Tensor) -> Vec<u8> {
        let scalars = shape.iter().product();
        match dtype {
            Dtype::F32 => (value as f32).to_le_bytes().repeat(scalars),
            Dtype::F64 => value.to_le_bytes().repeat(scalars),
            _ => vec![0; scalars * dtype.bitsize() / 8],
        }
    }

    fn put(dir: &Path, file: &str, tensors: &[Tensor]) {
        let bytes: Vec<Vec<u8>> = tensors.iter().map(|tensor| bytes(*tensor)).collect();
        let listed = tensors
            .iter()
            .zip(&bytes)
            .map(|((name, dtype, shape, _), bytes)| {
                (name.to_string(), *dtype, shape.to_vec(), &bytes[..])
            });
        write(dir, file, listed, &[]).unwrap();
    }

    fn folder(tensors: &[Tensor]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let config: Value = json!({"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2});
        write_json(&dir.path().join(CONFIG), &config).unwrap();
        put(dir.path(), "model.safetensors", tensors);
        dir
    }

    fn open_as(dir: &Path, expected: &[Tensor]) -> Result<WeightFiles, String> {
        let model = ModelFolder::open(dir, InitWeights::Pretrained).map_err(|e| e.to_string())?;
        let expected: Vec<(String, Vec<usize>)> = expected
            .iter()
            .map(|(name, _, shape, _)| (name.to_string(), shape.to_vec()))
            .collect();
        WeightFiles::open(&model, &expected).map_err(|error| error.to_string())
    }

    /// A tied model of two tensors, stored as these.
    fn open(tensors: &[Tensor]) -> Result<WeightFiles, String> {
        open_as(folder(tensors).path(), &[EMBED, NORM])
    }

    fn check(tensors: &[Tensor], words: &[&str]) {
        let message = open(tensors).unwrap_err();
        for word in words {
            assert!(message.contains(word), "{word:?} not in {message:?}");
        }
    }

    #[test]
    fn types_that_are_numbers_are_read_and_others_named() {
        let double = (NORM.0, Dtype::F64, NORM.2, 0.1);
        let weights = open(&[EMBED, double]).unwrap();
        let mut out = [0.0; 2];
        weights.read_f32(NORM.0, &[2], &mut out).unwrap();
        assert_eq!(out, [0.1; 2]);
        for dtype in [Dtype::F8_E4M3, Dtype::I8, Dtype::BOOL, Dtype::I64] {
            let named = format!("{dtype:?}");
            check(&[EMBED, (NORM.0, dtype, NORM.2, 0.0)], &[NORM.0, &named]);
        }
    }

    #[test]
    fn missing_tensors_and_other_shapes_are_named() {
        check(&[EMBED], &["no tensor model.norm.weight"]);
        check(
            &[EMBED, (NORM.0, Dtype::F32, &[3], 1.0)],
            &[NORM.0, "[3]", "[2]"],
        );
        let untied = open_as(folder(&[EMBED, NORM]).path(), &[EMBED, NORM, OUTPUT]);
        assert!(untied.unwrap_err().contains("tie_word_embeddings: true"));
    }

    #[test]
    fn a_tied_embedding_may_be_stored_as_the_output_layer() {
        let weights = open(&[(HEAD, Dtype::F32, &[3, 2], 0.25), NORM]).unwrap();
        let mut out = [0.0; 6];
        weights.read_f32(EMBEDDING, &[3, 2], &mut out).unwrap();
        assert_eq!(out, [0.25; 6]);
        assert_eq!(weights.expect(EMBEDDING, &[3, 2]).unwrap().bytes.len(), 24);
        assert!(weights.notices().is_empty());
        // An output layer of its own is no embedding.
        let untied = open_as(folder(&[OUTPUT, NORM]).path(), &[EMBED, OUTPUT, NORM]);
        assert!(
            untied
                .unwrap_err()
                .contains("no tensor model.embed_tokens.weight")
        );
    }

    #[test]
    fn a_tied_output_layer_must_be_the_embedding() {
        assert!(open(&[EMBED, OUTPUT, NORM]).unwrap().notices().is_empty());
        let other = (HEAD, Dtype::F32, OUTPUT.2, 0.75);
        check(
            &[EMBED, other, NORM],
            &[HEAD, "differs", "tie_word_embeddings"],
        );
    }

    #[test]
    fn tensors_that_the_model_has_no_place_for_are_refused_by_name() {
        for name in [
            "model.layers.0.self_attn.q_norm.weight",
            "model.layers.0.self_attn.k_proj.bias",
            "model.layers.1.mlp.up_proj.bias",
            "model.layers.2.mlp.up_proj.weight",
            "model.layers.0.post_feedforward_layernorm.weight",
            "model.norm.bias",
            "lm_head.bias",
            "model.embed_positions.weight",
            "layers.0.self_attn.q_proj.weight",
            "model.layers.0.self_attn.q_proj.lora_A.weight",
            "model.layers.0.self_attn.q_proj.weight_scale",
        ] {
            check(
                &[EMBED, NORM, (name, Dtype::F32, &[2], 0.0)],
                &[name, "LlamaForCausalLM"],
            );
        }
    }

    #[test]
    fn tensors_that_matter_to_nobody_are_told_in_one_line() {
        let names = [
            "model.layers.0.self_attn.rotary_emb.inv_freq",
            "model.layers.1.self_attn.rotary_emb.inv_freq",
            "vision_tower.blocks.0.norm1.weight",
            "v_head.summary.weight",
        ];
        let extra = names.map(|name| (name, Dtype::F32, &[2usize][..], 0.0));
        let weights = open(&[&[EMBED, NORM][..], &extra].concat()).unwrap();
        let [notice] = weights.notices() else {
            panic!("{:?}", weights.notices());
        };
        assert!(names.iter().all(|name| notice.contains(name)), "{notice}");
    }

    #[test]
    fn a_tensor_in_two_files_is_refused() {
        let dir = folder(&[]);
        std::fs::remove_file(dir.path().join("model.safetensors")).unwrap();
        put(dir.path(), "a.safetensors", &[EMBED, NORM]);
        put(dir.path(), "b.safetensors", &[NORM]);
        let index = json!({"weight_map": {EMBEDDING: "a.safetensors", NORM.0: "b.safetensors"}});
        write_json(&dir.path().join("model.safetensors.index.json"), &index).unwrap();
        let message = open_as(dir.path(), &[EMBED, NORM]).unwrap_err();
        assert!(
            message.contains(NORM.0) && message.contains("a.safetensors"),
            "{message}"
        );
    }
}
