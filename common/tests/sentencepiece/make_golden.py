#!/usr/bin/env python3
"""Trains small SentencePiece models, tokenises texts with what Transformers makes of them, and writes golden.json.

    python make_golden.py        # needs transformers 5, sentencepiece, protobuf

Each case is a model folder without tokenizer.json: one of the models here as tokenizer.model, and the JSON files that the
case gives. AutoTokenizer reads the folder as it stands. The models are kept beside golden.json, since training may give others
with another version; `--train` makes them anew.
"""
import json
import pathlib
import shutil
import sys
import tempfile

import sentencepiece
import transformers

HERE = pathlib.Path(__file__).parent

SUBJECTS = "the river,a small boat,the old mill,every evening,my neighbour,the lighthouse keeper,a grey heron,the market".split(",")
VERBS = "carries,follows,remembers,crosses,measures,forgets,paints,repairs".split(",")
OBJECTS = "the quiet water,forty-two barrels,two hundred lanterns,the northern road,an empty harbour,the letters of 1987,her brother's map".split(",")
CORPUS = [f"{s} {v} {o}." for s in SUBJECTS for v in VERBS for o in OBJECTS]
CORPUS += ["def run(x):", "    return x + 1", "        if x > 10:", "Grüße aus Köln", "日本語 の 文", "a, b; c: d!", "(1) 2% 3/4 \"x\""] * 20

# The rules of a normaliser, few enough to stay small: code points, and what they become.
RULES = {"\t": " ", "ﬁ": "fi", "Ａ": "A", "Ｂ": "B", "e\u0301": "\u00e9", "…": "...", "\u00a0": " ", "\u200b": ""}

CODE = dict(model_type="bpe", vocab_size=420, byte_fallback=True, normalization_rule_name="identity",
            remove_extra_whitespaces=False, split_digits=True, allow_whitespace_only_pieces=True)
MODELS = {
    "bpe": CODE,
    # User-defined pieces, of which one has spaces and one the characters of patterns; a control piece; spaces are reduced.
    "defined": dict(model_type="bpe", vocab_size=420, byte_fallback=True, normalization_rule_name="identity",
                    user_defined_symbols=["<|im_start|>", "a.*(b", "the  ", "the"], control_symbols=["<ctl>", "<spare>"]),
    "gemma": dict(CODE, add_dummy_prefix=False, pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>",
                  bos_piece="<bos>", user_defined_symbols=["<mask>", "<start_of_turn>", "<end_of_turn>", "\n", "\n\n", "▁▁"]),
    "unigram": dict(model_type="unigram", vocab_size=90),
    "unigram_bytes": dict(model_type="unigram", vocab_size=345, byte_fallback=True, add_dummy_prefix=False, pad_id=3),
}


def points(text):
    return " ".join(f"{ord(character):X}" for character in text)


def train():
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        (folder / "corpus.txt").write_text("\n".join(CORPUS))
        rules = "".join(f"{points(a)}\t{points(b)}\n" for a, b in sorted(RULES.items()))
        (folder / "rules.tsv").write_text(rules)
        for name, options in MODELS.items():
            options = dict(options)
            if options.get("normalization_rule_name") is None:
                options["normalization_rule_tsv"] = str(folder / "rules.tsv")
            sentencepiece.SentencePieceTrainer.train(
                input=str(folder / "corpus.txt"), model_prefix=str(folder / name), minloglevel=2, num_threads=1, **options)
            shutil.copy(folder / f"{name}.model", HERE)


def added(content, **flags):
    token = dict(content=content, lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)
    return dict(token, **flags)


ENDS = {"0": added("<unk>"), "1": added("<s>"), "2": added("</s>")}
LLAMA = dict(tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos_token=True,
             add_eos_token=False)


def files(model_type, tokenizer_config=None, **more):
    found = {"config.json": {"model_type": model_type}}
    if tokenizer_config is not None:
        found["tokenizer_config.json"] = tokenizer_config
    return dict(found, **{name.replace("__", "."): content for name, content in more.items()})


CASES = {
    "llama": ("bpe", files("llama", LLAMA)),
    "llama, legacy": ("bpe", files("llama", dict(LLAMA, legacy=True, add_eos_token=True, added_tokens_decoder=ENDS))),
    "llama, not legacy": ("bpe", files("llama", dict(LLAMA, legacy=False, tokenizer_class="LlamaTokenizerFast"))),
    "llama, no prefix": ("bpe", files("llama", dict(LLAMA, add_prefix_space=False, added_tokens_decoder=dict(
        ENDS, **{"420": added("<|user|>", rstrip=True), "421": added("plain", special=False, single_word=True)})))),
    "llama, class alone": ("bpe", files("llama", dict(tokenizer_class="LlamaTokenizer"))),
    "llama, older files": ("bpe", files("llama", dict(tokenizer_class="LlamaTokenizer", add_bos_token=True),
                                        special_tokens_map__json=dict(bos_token="<s>", eos_token="</s>", pad_token="[PAD]"),
                                        added_tokens__json={"[PAD]": 420, "word": 421})),
    "llama, defined": ("defined", files("llama", LLAMA)),
    "llama, listed": ("defined", files("llama", dict(LLAMA, additional_special_tokens=["<ctl>", "<new>"]))),
    "class of config.json": ("bpe", files("smollm3", None) | {"config.json": {"model_type": "smollm3", "tokenizer_class": "LlamaTokenizer"}}),
    "no files": ("bpe", files("llama")),
    "mistral": ("bpe", files("mistral", dict(LLAMA, legacy=True, added_tokens_decoder=ENDS))),
    "mistral, not legacy": ("bpe", files("mistral", dict(LLAMA, legacy=False))),
    "mistral, unknown class": ("defined", files("llama", dict(LLAMA, tokenizer_class="InternLM2Tokenizer"))),
    "phi3": ("defined", files("phi3", dict(LLAMA, add_bos_token=False, legacy=False, added_tokens_decoder=dict(
        ENDS, **{"5": added("<|end|>", rstrip=True), "420": added("<|user|>", normalized=True)})))),
    "gemma": ("gemma", files("gemma2", dict(tokenizer_class="GemmaTokenizer", add_bos_token=True))),
    "gemma, no class": ("gemma", files("gemma3_text", dict(add_bos_token=True, added_tokens_decoder={
        "5": added("<start_of_turn>"), "6": added("<end_of_turn>")}, additional_special_tokens=["<start_of_turn>", "<end_of_turn>"]))),
    "gemma's pieces, generic": ("gemma", files("olmo2")),
    "unigram": ("unigram", files("mistral", dict(add_bos_token=True, add_eos_token=True))),
    "unigram, not legacy": ("unigram", files("llama", dict(legacy=None, extra_special_tokens={"image_token": "<image>"}))),
    "unigram, bytes": ("unigram_bytes", files("granite", dict(pad_token="<pad>"))),
}

TEXTS = [
    "", " ", "  ", "\n", "the river", " the river", "  the   river  ", "the river\n\nfollows\tthe  map\r\n", "x", "12", "1987 2%",
    "🦀", "👩‍👩‍👧 naïve", "Grüße aus Köln", "日本語の文 한국어", "e\u0301 é ñ n\u0303", "Ｂ ﬁn… a\u00a0b\u200bc", "▁ ▁▁a", "\u0000\u0007",
    "<s>", "</s>the</s> river <s> boat", "a<unk>b <unk> c", "the  <|im_start|>user\nthe", "<|im_start|> a.*(b a.*(bthe   x",
    "<ctl> <spare><ctl>x", "<|user|>  hi<|user|>\n", "plain plainly plain", "[PAD]word words [PAD] x", "<|end|>  the<|end|>\n",
    "<new> <image>x", "<bos><start_of_turn>user\nthe river<end_of_turn>\n\n\n<eos>", "<mask> <pad>", "    return x + 1\n        if",
    "forty-two barrels; her brother's map.", "THE RIVER", "𝔘𝔫𝔦 ∑ €", "a  b   c    d",
]


def tokenised(name, folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = []
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        found.append([ids, tokenizer(text)["input_ids"], tokenizer.decode(ids, clean_up_tokenization_spaces=False)])
    tokens = json.loads(tokenizer.backend_tokenizer.to_str())["added_tokens"]
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    return {
        "class": type(tokenizer).__name__,
        "special": special,
        "added": [[token["id"], token["content"], token["special"]] for token in tokens],
        "texts": found,
    }


def main():
    if "--train" in sys.argv:
        train()
    cases = []
    for name, (model, beside) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            shutil.copy(HERE / f"{model}.model", folder / "tokenizer.model")
            for file, content in beside.items():
                (folder / file).write_text(json.dumps(content))
            cases.append({"name": name, "model": model, "files": beside} | tokenised(name, folder))
    golden = {"transformers": transformers.__version__, "texts": TEXTS, "cases": cases}
    text = json.dumps(golden, ensure_ascii=True, separators=(",", ":"))
    (HERE / "golden.json").write_text(text.replace('{"name"', '\n{"name"') + "\n")


main()
