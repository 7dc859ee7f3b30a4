"""The built-in tokenizer: byte-level BPE, trained in seconds, without an unknown token."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 4096
BOS_TOKEN, EOS_TOKEN, PAD_TOKEN = "<bos>", "<eos>", "<pad>"
# The built-in model's conversations: a line each for the system's text and every turn, no headers, so that one question
# reads as in the pretraining text.
CHAT_TEMPLATE = "{% for m in messages %}{% if m.content %}{{ m.content + '\\n' }}{% endif %}{% endfor %}"


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """A tokenizer of the texts; equal texts give an equal tokenizer.

    All 256 bytes are tokens, so any text has ids and decodes to itself. Encoding adds no special token; there is no
    chat template. Save it with `save_pretrained`, load it with `AutoTokenizer.from_pretrained`.

    Args:
        vocab_size: tokens in all, at least 259: the bytes and the three special tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS_TOKEN, EOS_TOKEN, PAD_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        clean_up_tokenization_spaces=False,
    )
