"""Byte-level tokenizers of about 300 tokens, made in memory, in the variants that models come with."""

from __future__ import annotations

from typing import Any

from prlhf.data.world.tokenizer import train_tokenizer

SENTENCES = (
    "The moon pulls the sea, and the sea answers twice a day.",
    "Tell me about tea. Tea is made of leaves and hot water.",
    "Bees dance to say where the flowers are.",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
VARIANTS = ["plain", "no_bos", "pad_is_eos", "no_pad", "chat"]


def tiny_tokenizer(variant: str = "plain") -> Any:
    """One of `VARIANTS`; `plain` has BOS 0, EOS 1, pad 2 and no chat template."""
    assert variant in VARIANTS
    tokenizer = train_tokenizer(SENTENCES, vocab_size=300)
    if variant == "no_bos":
        tokenizer.bos_token = None
    if variant == "pad_is_eos":
        tokenizer.pad_token = tokenizer.eos_token
    if variant == "no_pad":
        tokenizer.pad_token = None
    if variant == "chat":
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
