//! The storage type of the base weights, where the job leaves it to the model.
//!
//! Enters: a job whose model is a folder. Leaves: the job with that type, and a line for the user. Opens no weights.

use common::files::model::{ModelFolder, is_mxfp4};
use common::job::{BaseDtype, JobSpec};
use common::text::one_line;

/// Characters of a type's name that are shown.
const MAX_TYPE_CHARACTERS: usize = 40;

/// The job with the type of the model's weights, where it leaves that to `config.json`.
pub(super) fn with_dtype_of_model(mut job: JobSpec) -> JobSpec {
    if !std::mem::take(&mut job.reading.is_dtype_of_model) {
        return job;
    }
    // What is wrong with the folder is told when it is read.
    let Ok(model) = ModelFolder::open(&job.base_model, job.init_weights) else {
        return job;
    };
    let config = model.config_json();
    let named = ["dtype", "torch_dtype"];
    let named = named.into_iter().find_map(|key| config.get(key)?.as_str());
    let named = named.map(|name| name.trim_start_matches("torch."));
    let told = match named {
        Some("bfloat16") => {
            job.base_dtype = BaseDtype::Bfloat16;
            "bfloat16, as config.json of the model says".to_owned()
        }
        Some("float32") => "float32, as config.json of the model says".to_owned(),
        Some(other) => format!(
            "float32, because {}, which config.json of the model says, is no type of base weights here",
            one_line(other, MAX_TYPE_CHARACTERS)
        ),
        None if is_mxfp4(config) => {
            job.base_dtype = BaseDtype::Bfloat16;
            "bfloat16, which holds what the MXFP4 of its experts stands for".to_owned()
        }
        None => "float32, because config.json of the model names none".to_owned(),
    };
    job.reading.notices.push(format!(
        "base_dtype: auto: the base weights are held in {told}"
    ));
    job
}
