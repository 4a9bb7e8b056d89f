//! Foreign keys inside an entry of `datasets`.

use super::table::Rule::{Inert, Only};
use super::table::{Group, OFF};

const ONE_TEMPLATE: &str = "chat_template of the job names the template of all conversations";
const NO_FORMAT: &str = "prompts are taken as they stand in the rows; rewrite the data";
const ONLY_SFT: &str = "only supervised fine-tuning is supported";

pub(super) const GROUPS: &[Group] = &[
    Group {
        keys: &["trust_remote_code", "preprocess_shards"],
        rule: Inert,
    },
    Group {
        keys: &["chat_template_kwargs"],
        rule: Only(OFF, "give chat_template_kwargs of the job"),
    },
    Group {
        keys: &[
            "hf_hub_url",
            "ms_hub_url",
            "script_url",
            "file_name",
            "folder",
        ],
        rule: Only(OFF, "give it as the path of the dataset"),
    },
    Group {
        keys: &["input_format", "input_transform", "prompt_format"],
        rule: Only(OFF, NO_FORMAT),
    },
    Group {
        keys: &["conversation"],
        rule: Only(OFF, ONE_TEMPLATE),
    },
    Group {
        keys: &["split_thinking"],
        rule: Only(
            OFF,
            "reasoning is read from reasoning_content of a message; rewrite the data",
        ),
    },
    Group {
        keys: &["field_chosen", "field_rejected", "ranking"],
        rule: Only(OFF, ONLY_SFT),
    },
];
