"""A tokenizer made here, for tests that need to know every piece of it."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_toy_tokenizer(*, bos: bool = True, template: str | None = None) -> Any:
    """Byte-level BPE with a few merges that cross the usual boundaries, and special tokens of both chat styles."""
    vocab = {piece: index for index, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [
        ("Ċ", "Ċ"), (":", "Ġ"), ("Ġ", "a"), ("h", "e"), ("?", "Ċ"), ("<", "/"), ("</", "s"), ("</s", ">"), ("<", "s"),
    ]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    if bos:
        names["bos_token"] = "<|begin|>"
    toy = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    toy.chat_template = template
    return toy
