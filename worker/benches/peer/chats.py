"""Chats as a model's tokenizer sees them, with the labels of a fine-tuning on the answers."""

import json

IGNORED = -100


def tokenizer_of(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def read(path, tokenizer, longest):
    """[(ids, labels)] of rows of one question and one answer: the answer is learned, and its end."""
    examples = []
    with open(path) as rows:
        for row in rows:
            messages = json.loads(row)["messages"]
            question = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
            whole = tokenizer.apply_chat_template(messages, tokenize=False)
            prefix = len(tokenizer(question, add_special_tokens=False)["input_ids"])
            ids = tokenizer(whole, add_special_tokens=False)["input_ids"][:longest]
            ends = [at for at, token in enumerate(ids) if token == tokenizer.eos_token_id and at >= prefix]
            end = ends[-1] if ends else len(ids)
            labels = [token if prefix <= at <= end else IGNORED for at, token in enumerate(ids)]
            examples.append((ids, labels))
    return examples


def pad(examples, padding):
    """Tensors as long as the longest of the examples."""
    import torch

    longest = max(len(ids) for ids, _ in examples)

    def rows(which, filler):
        return torch.tensor([list(which(one)) + [filler] * (longest - len(which(one))) for one in examples])

    return {
        "input_ids": rows(lambda one: one[0], padding),
        "labels": rows(lambda one: one[1], IGNORED),
        "attention_mask": rows(lambda one: [1] * len(one[0]), 0),
    }
