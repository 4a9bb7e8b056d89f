//! What a `tokenizer.model` says: the message `ModelProto` of SentencePiece, of which only the fields that decide how text is
//! tokenised are read (numbers and defaults: `sentencepiece_model.proto` of SentencePiece 0.2).

use prost::Message;

use super::beside::CONVERT;
use super::charsmap;

/// Largest `tokenizer.model`, in bytes; those with 256,000 pieces have 4 MB.
pub const MAX_BYTES: u64 = 16 << 20;

/// Longest text of a piece, in bytes; SentencePiece makes none of more than 64.
const MAX_PIECE_BYTES: usize = 1 << 10;

const MAX_PIECES: usize = 1 << 22;

#[derive(Clone, PartialEq, Message)]
pub(super) struct ModelProto {
    #[prost(message, repeated, tag = "1")]
    pub pieces: Vec<PieceProto>,
    #[prost(message, optional, tag = "2")]
    pub trainer_spec: Option<TrainerSpec>,
    #[prost(message, optional, tag = "3")]
    pub normalizer_spec: Option<NormalizerSpec>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct PieceProto {
    #[prost(string, optional, tag = "1")]
    pub piece: Option<String>,
    #[prost(float, optional, tag = "2")]
    pub score: Option<f32>,
    #[prost(int32, optional, tag = "3")]
    pub kind: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct TrainerSpec {
    #[prost(int32, optional, tag = "3")]
    pub model_type: Option<i32>,
    #[prost(bool, optional, tag = "24")]
    pub treat_whitespace_as_suffix: Option<bool>,
    #[prost(bool, optional, tag = "35")]
    pub byte_fallback: Option<bool>,
    #[prost(int32, optional, tag = "40")]
    pub unk_id: Option<i32>,
    #[prost(int32, optional, tag = "41")]
    pub bos_id: Option<i32>,
    #[prost(int32, optional, tag = "42")]
    pub eos_id: Option<i32>,
    #[prost(string, optional, tag = "45")]
    pub unk_piece: Option<String>,
    #[prost(string, optional, tag = "46")]
    pub bos_piece: Option<String>,
    #[prost(string, optional, tag = "47")]
    pub eos_piece: Option<String>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct NormalizerSpec {
    #[prost(bytes = "vec", optional, tag = "2")]
    pub precompiled_charsmap: Option<Vec<u8>>,
    #[prost(bool, optional, tag = "3")]
    pub add_dummy_prefix: Option<bool>,
    #[prost(bool, optional, tag = "4")]
    pub remove_extra_whitespaces: Option<bool>,
    #[prost(bool, optional, tag = "5")]
    pub escape_whitespaces: Option<bool>,
}

/// What a piece is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

#[derive(Clone, Debug)]
pub(super) struct Piece {
    pub text: String,
    pub score: f32,
    pub kind: Kind,
}

/// A model of SentencePiece that was read and checked.
#[derive(Debug)]
pub(super) struct Model {
    pub pieces: Vec<Piece>,
    /// Unigram, and otherwise BPE.
    pub is_unigram: bool,
    pub byte_fallback: bool,
    pub unk_id: u32,
    /// Rules that change text before it is divided, as SentencePiece compiles them; empty where there are none.
    pub charsmap: Vec<u8>,
    pub add_dummy_prefix: bool,
    pub remove_extra_whitespaces: bool,
    pub escape_whitespaces: bool,
    trainer: TrainerSpec,
}

/// What a file is that other programs call `tokenizer.model`, too.
pub(super) fn foreign(bytes: &[u8]) -> Option<&'static str> {
    let line = bytes.split(|byte| *byte == b'\n').next()?;
    let (token, rank) = std::str::from_utf8(line).ok()?.trim_end().split_once(' ')?;
    let is_base64 = |byte: u8| byte.is_ascii_alphanumeric() || b"+/=".contains(&byte);
    let is_ranked = !rank.is_empty() && rank.bytes().all(|byte| byte.is_ascii_digit());
    let is_tiktoken = is_ranked && !token.is_empty() && token.bytes().all(is_base64);
    is_tiktoken.then_some("a vocabulary of tiktoken")
}

impl Model {
    /// Reads the message. The error is the reason alone.
    pub fn read(bytes: &[u8]) -> Result<Self, String> {
        let proto = ModelProto::decode(bytes).map_err(|error| {
            format!("is no SentencePiece model, or is damaged ({error}): download it again, or {CONVERT}")
        })?;
        if proto.pieces.is_empty() {
            return Err("has no pieces: it is no SentencePiece model, or is damaged".to_owned());
        }
        let (Some(trainer), Some(normalizer)) = (proto.trainer_spec, proto.normalizer_spec) else {
            return Err(
                "does not say how it was trained: it ends too early; download it again".to_owned(),
            );
        };
        if proto.pieces.len() > MAX_PIECES {
            return Err(format!(
                "has {} pieces, and may have {MAX_PIECES}",
                proto.pieces.len()
            ));
        }
        let pieces: Result<Vec<Piece>, String> = (0..).zip(proto.pieces).map(piece).collect();
        let pieces = pieces?;
        let is_unigram = match trainer.model_type.unwrap_or(1) {
            1 => true,
            2 => false,
            other => {
                let name = match other {
                    3 => "of whole words (model_type WORD)".to_owned(),
                    4 => "of characters (model_type CHAR)".to_owned(),
                    other => format!("of model_type {other}"),
                };
                return Err(format!(
                    "is a SentencePiece model {name}: only those of BPE and Unigram are read"
                ));
            }
        };
        if trainer.treat_whitespace_as_suffix == Some(true) {
            return Err(
                "has its spaces at the ends of words (treat_whitespace_as_suffix), which is not read: use a model with a tokenizer.json"
                    .to_owned(),
            );
        }
        let unk_id = trainer.unk_id.unwrap_or(0);
        let in_range = u32::try_from(unk_id)
            .ok()
            .filter(|id| (*id as usize) < pieces.len());
        let Some(unk_id) = in_range else {
            return Err(format!(
                "names {unk_id} as its unknown token, and has {} pieces",
                pieces.len()
            ));
        };
        let charsmap = normalizer.precompiled_charsmap.unwrap_or_default();
        if !charsmap.is_empty() {
            charsmap::check(&charsmap).map_err(|reason| {
                format!("has rules for text that are damaged (precompiled_charsmap {reason}): download it again")
            })?;
        }
        Ok(Self {
            pieces,
            is_unigram,
            byte_fallback: trainer.byte_fallback.unwrap_or(false),
            unk_id,
            charsmap,
            add_dummy_prefix: normalizer.add_dummy_prefix.unwrap_or(true),
            remove_extra_whitespaces: normalizer.remove_extra_whitespaces.unwrap_or(true),
            escape_whitespaces: normalizer.escape_whitespaces.unwrap_or(true),
            trainer,
        })
    }

    /// The special token of this name that the model was trained with.
    pub fn special(&self, name: &str) -> Option<&str> {
        let trainer = &self.trainer;
        let (id, text, usual) = match name {
            "bos_token" => (trainer.bos_id.unwrap_or(1), &trainer.bos_piece, "<s>"),
            "eos_token" => (trainer.eos_id.unwrap_or(2), &trainer.eos_piece, "</s>"),
            "unk_token" => return Some(self.unk_piece()),
            _ => return None,
        };
        (id >= 0).then(|| text.as_deref().unwrap_or(usual))
    }

    pub fn unk_piece(&self) -> &str {
        self.trainer.unk_piece.as_deref().unwrap_or("<unk>")
    }

    /// Whether each of the 256 bytes has a piece, so that no character is unknown.
    pub fn has_all_bytes(&self) -> bool {
        let bytes = self.pieces.iter().filter(|piece| piece.kind == Kind::Byte);
        bytes.count() == 256
    }
}

fn piece((id, piece): (usize, PieceProto)) -> Result<Piece, String> {
    let text = piece.piece.unwrap_or_default();
    let score = piece.score.unwrap_or(0.0);
    if text.is_empty() || text.len() > MAX_PIECE_BYTES {
        return Err(format!(
            "has a piece {id} of {} bytes; 1 to {MAX_PIECE_BYTES} are possible",
            text.len()
        ));
    }
    if !score.is_finite() {
        return Err(format!("gives the piece {id} the score {score}"));
    }
    let kind = match piece.kind.unwrap_or(1) {
        1 => Kind::Normal,
        2 => Kind::Unknown,
        3 => Kind::Control,
        4 => Kind::UserDefined,
        5 => Kind::Unused,
        6 => Kind::Byte,
        other => {
            return Err(format!(
                "gives the piece {id} the type {other}, which is not known"
            ));
        }
    };
    Ok(Piece { text, score, kind })
}
