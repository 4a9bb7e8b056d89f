//! What a `config.json` asks for and is not done, or cannot be: refused by name.

use serde_json::Value;

use super::error::ModelError;
use super::family::{Family, Windows};
use super::fields::Fields;
use crate::files::model::{Architecture, is_four_bits, is_mxfp4};

impl Fields<'_> {
    pub(super) fn refuse_unsupported(
        &self,
        architecture: Architecture,
        is_gelu: bool,
    ) -> Result<(), ModelError> {
        // Gemma reads this one alone.
        let (key, wanted) = match is_gelu {
            true => ("hidden_activation", "gelu_pytorch_tanh"),
            false => ("hidden_act", "silu"),
        };
        let activation = self.json[key].as_str().unwrap_or(wanted);
        if activation != wanted {
            return Err(self.unsupported(format!("{key} {activation:?} (supported: {wanted:?})")));
        }
        self.refuse_bidirectional(architecture)?;
        let is_read = is_four_bits(self.json)
            || (is_mxfp4(self.json) && architecture == Architecture::GptOss);
        if self.json["quantization_config"].is_object() && !is_read {
            return Err(self.unsupported("a quantised base model".to_owned()));
        }
        Ok(())
    }

    /// Phi-3 names three dropouts of the base model, and training without them would be other than its `config.json` says.
    pub(super) fn refuse_dropout(&self, architecture: Architecture) -> Result<(), ModelError> {
        if architecture != Architecture::Phi3 {
            return Ok(());
        }
        for key in ["resid_pdrop", "embd_pdrop", "attention_dropout"] {
            if let Some(dropout) = self.number(key).filter(|dropout| *dropout != 0.0) {
                return Err(self.unsupported(format!("{key} {dropout} (supported: 0)")));
            }
        }
        Ok(())
    }

    /// Where Gemma 4 says "vision", tokens of an image see each other, of which there are none in texts.
    fn refuse_bidirectional(&self, architecture: Architecture) -> Result<(), ModelError> {
        const KEY: &str = "use_bidirectional_attention";
        let is_of_images = |text: &str| architecture == Architecture::Gemma4 && text == "vision";
        match &self.json[KEY] {
            Value::Null | Value::Bool(false) => Ok(()),
            Value::String(text) if is_of_images(text) => Ok(()),
            Value::Bool(true) => Err(self.unsupported(KEY.to_owned())),
            other => Err(self.unsupported(format!("{KEY} {other}"))),
        }
    }

    /// Refuses layers with a window where no window is to be.
    pub(super) fn check_windows(&self, family: &Family) -> Result<(), ModelError> {
        let types = self.json["layer_types"].as_array();
        let is_sliding = |kind: &Value| kind == "sliding_attention";
        let some_are = types.is_some_and(|types| types.iter().any(is_sliding));
        let is_null =
            self.json["sliding_window"].is_null() && self.json.get("sliding_window").is_some();
        if family.layers_differ && is_null {
            return Err(
                self.bad("sliding_window is null, where layers are told from others by having one")
            );
        }
        if is_null && family.windows != Windows::Never && some_are {
            return Err(self.bad("layer_types has sliding_attention, but sliding_window is null"));
        }
        if family.windows == Windows::EveryOtherAsked
            && !self.flag("use_sliding_window")
            && some_are
        {
            return Err(
                self.bad("layer_types has sliding_attention, but use_sliding_window is false")
            );
        }
        let ends_with_window = types.and_then(|types| types.last()).is_some_and(is_sliding);
        if family.windows == Windows::AllButSixthAndLast && ends_with_window {
            return Err(self.bad(
                "layer_types has sliding_attention for the last layer, which Transformers makes full_attention; say so there",
            ));
        }
        Ok(())
    }
}
