//! Axolotl's types of rows that become a fixed text: what each of them writes, and from which columns.
//!
//! Source of the names, columns and texts: Axolotl, `prompters.py` and `prompt_strategies/` (0.18).

use super::super::prompt_format::{PromptFormat, SystemFormat, TASK};
use super::super::spec::FieldNames;

/// The styles that follow the type behind a colon, with what each writes around system message, instruction and input.
const STYLES: [Style; 4] = [
    Style {
        name: "instruct",
        system: "{system}\n\n",
        with_input: "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
        without_input: "### Instruction:\n{instruction}\n\n### Response:\n",
    },
    Style {
        name: "chat",
        system: "SYSTEM: {system}\n",
        with_input: "USER: {instruction}\n{input}\nASSISTANT:",
        without_input: "USER: {instruction}\nASSISTANT:",
    },
    Style {
        name: "chatml",
        system: "<|im_start|>system\n{system}<|im_end|>\n",
        with_input: "<|im_start|>user\n{instruction}\n{input}<|im_end|>\n<|im_start|>assistant\n",
        without_input: "<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n",
    },
    Style {
        name: "phi",
        system: "<|system|>\n{system}<|end|>\n",
        with_input: "<|user|>\n{instruction}<|end|>{input}<|assistant|>",
        without_input: "<|user|>\n{instruction}<|end|>\n<|assistant|>\n",
    },
];

const TASK_OF_USER: [&str; 2] = [
    "Below is an instruction from a USER that describes a task, paired with an input that provides further context. The ASSISTANT writes a response that concisely and appropriately completes the request.\n\n",
    "Below is an instruction from a USER that describes a task. The ASSISTANT writes a response that appropriately and concisely completes the request.\n\n",
];
const CREATIVE: &str = "Answer the following question in a comprehensive, in-depth, and creative way. Additionally your response should be relevant, accurate, and free of any ambiguity.";
const CONTEXT: &str =
    "Use the following contextual information to concisely answer the question.\n";
const UNANSWERABLE: &str = "The context provided does not contain any information about your inquiry. Therefore, I'm unable to answer your question based on the given context.";

/// What a style writes.
struct Style {
    name: &'static str,
    system: &'static str,
    with_input: &'static str,
    without_input: &'static str,
}

impl Style {
    /// The texts of this style after a fixed system message: one with an input, one without.
    fn after(&self, system: [&str; 2]) -> PromptFormat {
        let [with_input, without_input] = system.map(|text| match text {
            "" => String::new(),
            text => self.system.replace("{system}", text),
        });
        PromptFormat::new(
            with_input + self.with_input,
            without_input + self.without_input,
        )
    }

    /// The texts of this style after the system message that a row has, written with `system`.
    fn after_own(&self, system: &str) -> PromptFormat {
        PromptFormat {
            system: Some(SystemFormat {
                text: system.to_owned(),
                default: None,
            }),
            ..self.after(["", ""])
        }
    }
}

/// What a type writes, and the names of its columns.
#[derive(Debug, PartialEq)]
pub(super) struct PromptType {
    pub format: PromptFormat,
    pub fields: FieldNames,
}

/// Types that Axolotl has and that are not read here, and why.
const REFUSED: &[(&[&str], &str)] = &[
    (
        &[
            "chat_template.default",
            "chat_template.argilla",
            "chat_template.argilla_chat",
            "chatml",
            "llama3",
            "zephyr",
            "passthrough",
            "user_defined.default",
        ],
        "is of rows of preferences (as for DPO), which are not learned from; to learn the chosen answers alone, say `type: chat_template` with `field_messages: chosen`",
    ),
    (
        &["bradley_terry", "stepwise_supervised"],
        "is of a reward model, which is not trained here",
    ),
    (
        &[
            "ebft_opencode",
            "ebft_pretrain",
            "ebft_reasoning",
            "ebft_strided_chat",
            "ebft_strided_structured",
            "ebft_chat_multiturn",
            "rwd",
        ],
        "is of a kind of reinforcement learning that is not supported",
    ),
    (
        &[
            "reflection",
            "explainchoice",
            "concisechoice",
            "creative_acr.load_critique",
            "creative_acr.load_revise",
            "pygmalion",
            "llama2_chat",
        ],
        "is an old type of Axolotl that is not read: write the rows as messages, or give the text with `type: user_defined`",
    ),
];

/// Why a type that Axolotl has is refused, if it is one.
pub(super) fn refusal(name: &str) -> Option<&'static str> {
    let is_named = |known: &&str| {
        let rest = name.strip_prefix(known);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', ':']))
    };
    let mut groups = REFUSED.iter();
    let group = groups.find(|(names, _)| names.iter().any(&is_named));
    group.map(|(_, reason)| *reason)
}

/// The type of a fixed text that has this name, beside `alpaca` itself.
pub(super) fn find(name: &str) -> Option<PromptType> {
    let (base, style) = match name.split_once(':') {
        Some((base, style)) => (base, STYLES.iter().find(|known| known.name == style)?),
        None => (name, &STYLES[0]),
    };
    if base != name {
        return styled(base, style);
    }
    let [instruct, chat, chatml, _] = &STYLES;
    let usual = FieldNames::default();
    let orca = || FieldNames {
        system: "system_prompt".to_owned(),
        ..columns("question", "input", "response")
    };
    let (format, fields) = match name {
        "alpaca_instruct" | "alpaca_instruct.load" => (instruct.after(TASK), usual),
        "alpaca_instruct.load_no_prompt" => (instruct.after(["", ""]), usual),
        "alpaca_chat" | "alpaca_chat.load" => (chat.after(TASK), usual),
        "alpaca_chat.load_concise" => (chat.after(TASK_OF_USER), usual),
        "alpaca_chat.load_no_prompt" => (chat.after(["", ""]), usual),
        "alpaca_chat.load_qa" => (
            without_input(chat.after(TASK_OF_USER)),
            columns("question", "input", "answer"),
        ),
        "alpaca_chat.load_camel_ai" => (
            without_input(chat.after(TASK_OF_USER)),
            columns("message_1", "input", "message_2"),
        ),
        "alpaca_w_system" | "alpaca_w_system.load" | "alpaca_w_system.load_chat" => {
            (chat.after_own(chat.system), usual)
        }
        "alpaca_w_system.load_instruct" => (instruct.after_own(instruct.system), usual),
        "alpaca_w_system.load_open_orca" => {
            let text = "### Human:\n{instruction}\n### Assistant:\n";
            let format = PromptFormat {
                system: instruct.after_own("### System:\n{system}\n").system,
                ..PromptFormat::new(text, text)
            };
            (format, orca())
        }
        "alpaca_w_system.load_open_orca_chatml" => {
            (without_input(chatml.after_own(chatml.system)), orca())
        }
        "orcamini" | "orcamini.load" => {
            let text = "### System:\n{system}\n\n### User:\n{instruction}\n\n### Response:\n";
            (PromptFormat::new(text, text), orca())
        }
        _ => return of_questions(name, chat).or_else(|| styled(name, instruct)),
    };
    Some(PromptType { format, fields })
}

/// Types of questions about a text, and others with columns of their own.
fn of_questions(name: &str, chat: &Style) -> Option<PromptType> {
    let in_context = |text: &str| {
        let text =
            format!("SYSTEM: {CONTEXT}\n{}", chat.without_input).replace("{instruction}", text);
        PromptFormat::new(text.clone(), text)
    };
    let (format, fields) = match name {
        "context_qa" | "context_qa.load" => (
            in_context("{instruction}\n===\n{input}"),
            columns("article", "question", "answer"),
        ),
        "context_qa.load_404" => (
            PromptFormat {
                answer: UNANSWERABLE.to_owned(),
                ..in_context("{instruction}\n===\n{input}")
            },
            columns("article", "unanswerable_question", "output"),
        ),
        "context_qa.load_v2" => {
            let text = "Context: {instruction}\nQuestion: {input}\n";
            let format = PromptFormat {
                answer: "Answer: {output}".to_owned(),
                ..PromptFormat::new(text, text)
            };
            (format, columns("context", "question", "answer"))
        }
        "metharme" | "metharme.load" => (
            PromptFormat {
                end_tokens: 3,
                ..PromptFormat::new("{instruction}", "{instruction}")
            },
            columns("prompt", "input", "generation"),
        ),
        "creative_acr.load_answer" => {
            let text = format!("{CREATIVE}\n{}", chat.without_input);
            (
                PromptFormat::new(text.clone(), text),
                columns("instruction", "input", "revision"),
            )
        }
        _ => return None,
    };
    Some(PromptType { format, fields })
}

/// Types that take a style.
fn styled(base: &str, style: &Style) -> Option<PromptType> {
    let (format, fields) = match base {
        "alpaca" => (style.after(TASK), FieldNames::default()),
        "jeopardy" => (
            PromptFormat {
                answer: "what is {output}".to_owned(),
                ..style.after(TASK)
            },
            columns("question", "category", "answer"),
        ),
        "gpteacher" => (
            style.after(TASK),
            columns("instruction", "input", "response"),
        ),
        "oasst" => (
            without_input(style.after(TASK)),
            columns("INSTRUCTION", "input", "RESPONSE"),
        ),
        // Whatever its style is.
        "summarizetldr" => {
            let text =
                "USER: Summarize the following article as a TL;DR.\n{instruction}\nASSISTANT:";
            (
                PromptFormat::new(text, text),
                columns("article", "input", "summary"),
            )
        }
        _ => return None,
    };
    Some(PromptType { format, fields })
}

/// The format for rows that have no input.
fn without_input(format: PromptFormat) -> PromptFormat {
    PromptFormat {
        with_input: format.without_input.clone(),
        ..format
    }
}

fn columns(instruction: &str, input: &str, output: &str) -> FieldNames {
    FieldNames {
        instruction: instruction.to_owned(),
        input: input.to_owned(),
        output: output.to_owned(),
        ..FieldNames::default()
    }
}
