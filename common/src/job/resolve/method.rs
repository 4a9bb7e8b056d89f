//! Resolves what is trained: every weight, or an adapter and of which shape.

use std::path::{Path, PathBuf};

use super::adapter_init::{adapter_init, check_start};
use super::adapter_shape::adapter_shape;
use super::tokens::trained_tokens;
use crate::job::dialect::Dialect;
use crate::job::limits::MAX_RANK;
use crate::job::merge::Layer;
use crate::job::quote::shorten;
use crate::job::read::Reader;
use crate::job::starting_adapter::{self, StartingAdapter};
use crate::job::yaml::Value;
use crate::job::{
    AdapterInit, AdapterRequest, HubCommit, LoraSpec, Method, Optimizer, TargetModules,
    TrainedBiases, whole_path,
};

/// The linear layers of every supported decoder, without the output layer.
const DECODER_LINEARS: &[&str] = &[
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "qkv_proj",
    "gate_up_proj",
    "in_proj_qkv",
    "in_proj_z",
    "in_proj_b",
    "in_proj_a",
    "out_proj",
    "per_layer_input_gate",
    "per_layer_projection",
    "per_layer_model_projection",
];

/// `output_dir` and whether the run begins anew there tell which commit of a starting adapter is meant.
pub(super) fn method(reader: &mut Reader<'_>, output_dir: &Path, begins_anew: bool) -> Method {
    let adapters: &[(&[&str], bool)] = &[(&["lora", "qlora"], true), (&["full", "none"], false)];
    let chosen = reader.choice("adapter", adapters);
    let adapter = chosen.unwrap_or(of_llama_factory(reader));
    let use_peft = reader.switch("use_peft").unwrap_or(false);
    let decided_by = reader.one_of(&["adapter", "use_peft"], "the method");
    let is_lora = match decided_by {
        Some("use_peft") => use_peft,
        _ => adapter,
    };
    let method_layer = decided_by
        .and_then(|name| reader.layer(name))
        .unwrap_or(Layer::File);
    let lora = lora(reader, is_lora, output_dir, begins_anew);
    if is_lora {
        tell_of_processors(reader, &lora);
        return Method::Lora(lora);
    }
    // Nobody knows what an adapter of an unknown kind would have made of the other fields.
    if decided_by == Some("adapter") && chosen.is_none() {
        return Method::Full;
    }
    // Who writes `adapter:` with nothing behind it says that there is none, whatever else stands in the file.
    let says_none = decided_by.is_none() && reader.merged.get_or_null("adapter").is_some();
    let mut unused = Vec::new();
    for name in [
        "lora_r",
        "lora_alpha",
        "lora_dropout",
        "lora_target_modules",
        "lora_target_linear",
        "use_rslora",
        "use_dora",
        "bias",
        "lora_bias",
        "init_lora_weights",
        "pissa_init",
        "lora_model_dir",
        "loraplus_lr_ratio",
        "loraplus_lr_embedding",
        "trainable_token_indices",
        "lora_modules_to_save",
        "rank_pattern",
        "alpha_pattern",
        "exclude_modules",
        "layers_to_transform",
        "lora_target_parameters",
    ] {
        if let Some(given) = reader.given(name)
            && given.layer >= method_layer
            && !given.is_switched_off()
            && !says_the_default(&lora, name)
        {
            match says_none && given.layer == Layer::File {
                true => unused.push(given.written.as_str()),
                false => {
                    reader.problem(given, "has no effect without `adapter: lora`".to_owned());
                }
            }
        }
    }
    if !unused.is_empty() {
        let notice = format!(
            "not used, because `adapter` is empty: {}",
            unused.join(", ")
        );
        reader.notices.push(notice);
    }
    Method::Full
}

/// Whether the job says of this field no more than holds where nothing is said.
fn says_the_default(lora: &LoraSpec, field: &str) -> bool {
    match field {
        "bias" => lora.biases.is_none(),
        "lora_bias" => !lora.lora_bias,
        "init_lora_weights" | "pissa_init" => lora.init.is_default(),
        _ => false,
    }
}

/// Says what of the adapter only processors do.
fn tell_of_processors(reader: &mut Reader<'_>, lora: &LoraSpec) {
    let start = match reader.given("init_lora_weights") {
        Some(_) => "init_lora_weights",
        None => "pissa_init",
    };
    let [embedding, head] = lora.adapts_tokens();
    let fields = [
        (lora.use_dora, "use_dora"),
        (!lora.biases.is_none(), "bias"),
        (lora.lora_bias, "lora_bias"),
        (lora.init.is_from_base(), start),
        (embedding, "embed_tokens in lora_target_modules"),
        (head, "lm_head in lora_target_modules"),
    ];
    let fields = fields.into_iter().filter(|(is_there, _)| *is_there);
    let fields: Vec<&str> = fields.map(|(_, field)| field).collect();
    if !fields.is_empty() {
        let told = format!(
            "{}: done on processors; a worker on a GPU refuses the job",
            fields.join(", ")
        );
        reader.notices.push(told);
    }
}

/// LLaMA-Factory trains an adapter where nothing is said (`finetuning_args.py`, 0.9.5).
fn of_llama_factory(reader: &Reader<'_>) -> bool {
    reader.dialect == Dialect::LlamaFactory && reader.given("use_peft").is_none()
}

/// Reads the adapter that the job starts from, which is fetched before where it is no folder: its folder, its place on the hub,
/// and its shape.
fn start(
    reader: &mut Reader<'_>,
    is_lora: bool,
    output_dir: &Path,
    begins_anew: bool,
) -> (Option<PathBuf>, Option<HubCommit>, Option<StartingAdapter>) {
    let written = reader.input_path("lora_model_dir");
    let (Some(dir), Some(given), true) = (&written, reader.given("lora_model_dir"), is_lora) else {
        return (written, None, None);
    };
    let request = AdapterRequest {
        written: dir,
        output_dir,
        begins_anew,
    };
    let found = match dir.exists() || dir.is_symlink() {
        true => Ok(None),
        false => (reader.find_adapter)(&request),
    };
    let found = found.map_err(|reason| format!("{}: {reason}", dir.display()));
    let read = found.and_then(|found| {
        let dir = found.as_ref().map_or(dir, |found| &found.folder);
        starting_adapter::read(dir).map(|start| (found.clone(), start))
    });
    match read {
        Ok((None, start)) => (written, None, Some(start)),
        Ok((Some(found), start)) => {
            reader.notices.extend(found.notice);
            let source = HubCommit {
                id: found.id,
                commit: found.commit,
            };
            (Some(found.folder), Some(source), Some(start))
        }
        Err(reason) => {
            reader.problem(given, format!("cannot be started from: {reason}"));
            (written, None, None)
        }
    }
}

fn lora(reader: &mut Reader<'_>, is_lora: bool, output_dir: &Path, begins_anew: bool) -> LoraSpec {
    let (model_dir, model_source, start) = start(reader, is_lora, output_dir, begins_anew);
    let spec = LoraSpec {
        model_dir,
        model_source,
        ..as_written(reader, start.as_ref())
    };
    if is_lora {
        check_parameters(reader, &spec);
    }
    if let Some(start) = start {
        agrees_with(reader, &spec, &start);
        return spec;
    }
    check_start(reader, &spec);
    check_lora_bias(reader, &spec);
    if is_lora
        && reader.switch("lora_target_linear") == Some(false)
        && reader.given("lora_target_modules").is_none()
        && !has_parameters(reader)
        && let Some(given) = reader.given("lora_target_linear")
    {
        let message = "is false, so `lora_target_modules` has to name the layers";
        reader.problem(given, message.to_owned());
    }
    spec
}

/// The adapter that the job describes; what it does not say is as in the adapter that it starts from.
fn as_written(reader: &mut Reader<'_>, start: Option<&StartingAdapter>) -> LoraSpec {
    let r = reader.size("lora_r", 1..=MAX_RANK as u64);
    let r = r.or(start.map(|s| s.r));
    // What LLaMA-Factory takes where nothing is given (`finetuning_args.py`, 0.9.5).
    let (usual_r, usual_alpha) = match reader.dialect {
        Dialect::LlamaFactory => (8, 2.0 * r.unwrap_or(8) as f64),
        Dialect::Usual => (16, 32.0),
    };
    let alpha = reader.number("lora_alpha", "a number above 0, at most 10^6", |n| {
        n > 0.0 && n <= 1e6
    });
    let dropout = reader.below_one("lora_dropout");
    let target_modules = target_modules(reader).or(start.map(|s| s.target_modules.clone()));
    let tokens = Some(trained_tokens(reader)).filter(|tokens| !tokens.is_none());
    let shape = adapter_shape(reader);
    let init = adapter_init(reader);
    let shape = match start {
        Some(start) => shape.or(&start.shape),
        None => shape,
    };
    let use_rslora = reader.switch("use_rslora");
    let use_dora = reader.switch("use_dora");
    let biases = biases(reader).or(start.map(|s| s.biases));
    let lora_bias = lora_bias(reader).or(start.map(|s| s.lora_bias));
    LoraSpec {
        r: r.unwrap_or(usual_r),
        alpha: alpha.or(start.map(|s| s.alpha)).unwrap_or(usual_alpha),
        dropout: dropout.or(start.map(|s| s.dropout)).unwrap_or(0.0),
        target_modules: target_modules.unwrap_or(match shape.parameters.is_empty() {
            true => TargetModules::AllLinear,
            // Who names parameters alone wants no others.
            false => TargetModules::Named(Vec::new()),
        }),
        use_rslora: use_rslora.or(start.map(|s| s.use_rslora)).unwrap_or(false),
        use_dora: use_dora.or(start.map(|s| s.use_dora)).unwrap_or(false),
        biases: biases.unwrap_or_default(),
        lora_bias: lora_bias.unwrap_or(false),
        // An adapter that is there has its factors.
        init: match start {
            Some(_) => AdapterInit::default(),
            None => init,
        },
        shape: Box::new(shape),
        tokens: tokens
            .or(start.map(|s| s.tokens.clone()))
            .unwrap_or_default(),
        model_dir: None,
        model_source: None,
    }
}

/// Which biases of the base model are trained.
fn biases(reader: &mut Reader<'_>) -> Option<TrainedBiases> {
    let choices: &[(&[&str], TrainedBiases)] = &[
        (&["none", "false"], TrainedBiases::None),
        (&["lora_only"], TrainedBiases::LoraOnly),
        (&["all"], TrainedBiases::All),
    ];
    reader.choice("bias", choices)
}

/// Whether factors B have a bias, which PEFT takes with neither DoRA nor another start than its own.
fn lora_bias(reader: &mut Reader<'_>) -> Option<bool> {
    let choices: &[(&[&str], bool)] = &[
        (&["true", "yes", "on", "1"], true),
        (&["false", "none", "no", "off", "0"], false),
    ];
    reader.choice("lora_bias", choices)
}

/// Refuses beside parameters of experts what PEFT does on none.
fn check_parameters(reader: &mut Reader<'_>, spec: &LoraSpec) {
    let Some(field) = spec.conflict_of_parameters() else {
        return;
    };
    const PARAMETERS: &str = "lora_target_parameters";
    let others = match field {
        "init_lora_weights" => ["init_lora_weights", "pissa_init"],
        field => [field; 2],
    };
    let other = others.into_iter().find_map(|name| reader.given(name));
    let (given, absent) = match (other, reader.given(PARAMETERS)) {
        (Some(given), _) => (given, PARAMETERS),
        (None, Some(given)) => (given, field),
        // The adapter that training starts from has both.
        (None, None) => {
            if let Some(given) = reader.given("lora_model_dir") {
                let message =
                    format!("has `{field}` and target_parameters, which PEFT does not do together");
                reader.problem(given, message);
            }
            return;
        }
    };
    reader.problem(
        given,
        format!("goes with no `{absent}` in PEFT; remove one"),
    );
}

/// Refuses biases where PEFT does.
fn check_lora_bias(reader: &mut Reader<'_>, spec: &LoraSpec) {
    let Some(given) = reader.given("lora_bias").filter(|_| spec.lora_bias) else {
        return;
    };
    let other = match (spec.use_dora, spec.init == AdapterInit::default()) {
        (true, _) => "use_dora",
        (false, false) => "init_lora_weights",
        (false, true) => return,
    };
    reader.problem(given, format!("goes with no `{other}` in PEFT; remove one"));
}

/// Refuses an optimizer that would leave vectors of the adapter as they are, or move what an adapter takes off the weights.
pub(super) fn check_optimizer(reader: &mut Reader<'_>, method: &Method, optimizer: &Optimizer) {
    let (Method::Lora(lora), Optimizer::Muon { trains_vectors }) = (method, optimizer) else {
        return;
    };
    let name = match trains_vectors {
        true => "use_muon",
        false => "optimizer",
    };
    let Some(given) = reader.given(name) else {
        return;
    };
    let vectors = [
        (lora.use_dora, "use_dora"),
        (!lora.biases.is_none(), "bias"),
        (lora.lora_bias, "lora_bias"),
    ];
    let vectors = vectors.into_iter().find(|(is_there, _)| *is_there);
    if let (Some((_, field)), false) = (vectors, trains_vectors) {
        let message = format!(
            "trains matrices alone, and `{field}` has vectors to train; use adamw, sgd or lion, or `use_muon: true`"
        );
        reader.problem(given, message);
    }
    if lora.init.is_from_base() {
        let message = format!(
            "mixes all directions of a matrix, and those that {} takes off the weights stay as they are; use adamw, sgd or lion",
            lora.init
        );
        reader.problem(given, message);
    }
}

/// Checks that the job keeps the shape of the adapter that training goes on from. Alpha and dropout may change.
fn agrees_with(reader: &mut Reader<'_>, spec: &LoraSpec, start: &StartingAdapter) {
    if let Some(given) = reader.given("lora_r")
        && spec.r != start.r
    {
        let message = format!(
            "is {}, but the adapter of lora_model_dir has rank {}; remove it",
            spec.r, start.r
        );
        reader.problem(given, message);
    }
    if let (TargetModules::Named(wanted), TargetModules::Named(have)) =
        (&spec.target_modules, &start.target_modules)
        && wanted != have
        && let Some(given) = reader.given("lora_target_modules")
    {
        let message = format!(
            "differs from the adapter of lora_model_dir, which has {}; remove it",
            match have.is_empty() {
                true => "none".to_owned(),
                false => have.join(", "),
            }
        );
        reader.problem(given, message);
    }
    let (shape, others) = (&spec.shape, &start.shape);
    for (field, differs) in [
        ("use_dora", spec.use_dora != start.use_dora),
        ("bias", spec.biases != start.biases),
        ("lora_bias", spec.lora_bias != start.lora_bias),
        ("exclude_modules", shape.excluded != others.excluded),
        ("layers_to_transform", shape.layers != others.layers),
        (
            "lora_target_parameters",
            shape.parameters != others.parameters,
        ),
        ("rank_pattern", shape.ranks != others.ranks),
        ("trainable_token_indices", spec.tokens != start.tokens),
        ("lora_modules_to_save", spec.tokens != start.tokens),
    ] {
        if let Some(given) = reader.given(field)
            && differs
        {
            let message = "differs from the adapter of lora_model_dir; remove it";
            reader.problem(given, message.to_owned());
        }
    }
}

fn target_modules(reader: &mut Reader<'_>) -> Option<TargetModules> {
    let all_linear = reader.switch("lora_target_linear").unwrap_or(false);
    let named = named_modules(reader);
    if !all_linear {
        return named;
    }
    let (Some(modules), Some(linear)) = (
        reader.given("lora_target_modules"),
        reader.given("lora_target_linear"),
    ) else {
        return Some(TargetModules::AllLinear);
    };
    if modules.layer > linear.layer {
        return named;
    }
    // Axolotl's examples give both; the union is all-linear unless a layer beyond those is named.
    if let Some(TargetModules::Named(names)) = &named
        && modules.layer == linear.layer
        && let Some(beyond) = names
            .iter()
            .find(|name| !DECODER_LINEARS.contains(&name.as_str()))
    {
        let message = format!(
            "names `{}`, which `lora_target_linear: true` leaves out; give one of the two",
            shorten(beyond)
        );
        reader.problem(modules, message);
    }
    Some(TargetModules::AllLinear)
}

fn named_modules(reader: &mut Reader<'_>) -> Option<TargetModules> {
    match modules(reader, "lora_target_modules")? {
        TargetModules::Named(names) if names.is_empty() => {
            let given = reader.given("lora_target_modules")?;
            if !has_parameters(reader) {
                reader.problem(given, "is empty; leave it out for all-linear".to_owned());
            }
            None
        }
        TargetModules::Named(names)
            if names.len() == 1
                && matches!(names[0].as_str(), "all-linear" | "all_linear" | "all") =>
        {
            Some(TargetModules::AllLinear)
        }
        modules => Some(modules),
    }
}

/// Whether parameters are named, so that there may be no linears with an adapter.
fn has_parameters(reader: &Reader<'_>) -> bool {
    let given = reader.given("lora_target_parameters");
    given.is_some_and(|given| {
        let is_empty = matches!(&given.node.value, Value::Sequence(items) if items.is_empty());
        !is_empty && !given.is_switched_off() && !given.node.is_text("none")
    })
}

/// Names of modules, sorted, or a pattern for their whole paths.
pub(super) fn modules(reader: &mut Reader<'_>, field: &str) -> Option<TargetModules> {
    let mut names = reader.texts(field, Some(','))?;
    let given = reader.given(field)?;
    if let Value::Scalar { text, .. } = &given.node.value
        && text.contains(['*', '(', '[', '\\', '|', '+', '?', '^', '$'])
    {
        let pattern = text.trim();
        return match whole_path(pattern) {
            Ok(_) => Some(TargetModules::Matching(pattern.to_owned())),
            Err(reason) => {
                reader.problem(given, format!("is no regular expression: {reason}"));
                None
            }
        };
    }
    let is_module = |name: &String| {
        name.bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
    };
    if let Some(name) = names.iter().find(|name| !is_module(name)) {
        let message = format!(
            "holds `{}`, which is no module name (a regular expression stands alone, not in a list)",
            shorten(name)
        );
        reader.problem(given, message);
        return None;
    }
    names.sort();
    names.dedup();
    Some(TargetModules::Named(names))
}
