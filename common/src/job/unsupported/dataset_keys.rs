//! Foreign keys inside an entry of `datasets`.

use super::table::Rule::{Inert, Only};
use super::table::{Group, OFF};

const ONE_TEMPLATE: &str = "chat_template of the job names the template of all conversations";
const SLICE: &str = "give a slice of the rows instead, as in split: 'train[:1000]'";
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
        keys: &["roles_to_train"],
        rule: Only(
            &["assistant"],
            "the assistant's turns are trained, but for messages with `train: false` or `weight: 0`; see train_on_inputs",
        ),
    },
    Group {
        keys: &["train_on_eos", "train_on_eot"],
        rule: Only(
            &["turn"],
            "the end token of every trained turn is learned, and no other one; write turn, or remove it",
        ),
    },
    Group {
        keys: &["shards", "shards_idx", "fraction", "skip"],
        rule: Only(OFF, SLICE),
    },
    Group {
        keys: &["message_field_training*"],
        rule: Only(
            OFF,
            "`train` and `weight` of a message say whether it is learned, by these names only: rename it in the data, and remove this",
        ),
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
