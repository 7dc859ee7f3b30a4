"""Placement of the user's soft prompt in the sequence, and its starting value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prlhf.data.render import encode_text
from prlhf.errors import ConfigError

NUM_CANDIDATES = 8


class SoftPromptAdapter(nn.Module):
    """Puts a soft prompt right after BOS, or first when the tokenizer has no BOS.

    The pads of a right-padded batch stay behind the text, so they never stand between soft prompt and text.

    Args:
        has_bos: whether every sequence starts with the tokenizer's BOS.
        num_user_tokens: T, soft-prompt positions of each user; 0 for methods without users.
    """

    def __init__(self, *, has_bos: bool, num_user_tokens: int) -> None:
        super().__init__()
        self.num_bos = int(has_bos)
        self.num_user_tokens = num_user_tokens

    @property
    def num_head(self) -> int:
        """Positions before the text: BOS and soft prompt."""
        return self.num_bos + self.num_user_tokens

    def forward(self, token_embeds: Tensor, soft_prompt: Tensor) -> Tensor:
        """Join text and soft prompt.

        Args:
            token_embeds: (N, L, D) embeddings of [BOS] text.
            soft_prompt: (N, T, D).
        Returns: (N, L + T, D) in the dtype of `token_embeds`.
        """
        head, tail = token_embeds[:, : self.num_bos], token_embeds[:, self.num_bos :]
        return torch.cat([head, soft_prompt.to(token_embeds.dtype), tail], dim=1)


@torch.no_grad()
def draw_vocabulary_prompts(
    embedding: nn.Module,
    *,
    count: int,
    num_user_tokens: int,
    vocab_size: int,
    forbidden: set[int],
    generator: torch.Generator,
) -> Tensor:
    """Soft prompts made of the embeddings of random tokens, drawn with replacement.

    Args:
        embedding: called, never indexed: some families scale or project inside (Gemma, OPT).
        vocab_size: tokens of the tokenizer; ids that the embedding has no row for are left out.
        forbidden: ids never drawn.
        generator: on the CPU, so that every device draws alike.
    Returns: (count, T, D).
    """
    weight = next(embedding.parameters())
    known = range(min(vocab_size, weight.shape[0]))
    allowed = torch.tensor([token for token in known if token not in forbidden])
    picks = torch.randint(len(allowed), (count, num_user_tokens), generator=generator)
    return embedding(allowed[picks].to(weight.device))


@torch.no_grad()
def embed_texts(embedding: nn.Module, tokenizer: Any, texts: Sequence[str], *, num_user_tokens: int) -> Tensor:
    """Soft prompts that start as texts: the embeddings of a text's tokens, from the front again until it is full.

    Args:
        embedding: called, never indexed, as in `draw_vocabulary_prompts`.
    Returns: (texts, T, D).
    Raises: ConfigError: texts without a token, or with more than T.
    Source: Lester et al. 2021, arXiv:2104.08691, section 3.2, where the texts are class labels.
    """
    token_ids = [encode_text(tokenizer, text) for text in texts]
    wrong = [
        f"user.init_texts: {text!r} has {len(ids)} tokens, expected 1 to user.num_user_tokens ({num_user_tokens})"
        for text, ids in zip(texts, token_ids, strict=True)
        if not 0 < len(ids) <= num_user_tokens
    ]
    if wrong:
        raise ConfigError(*wrong)
    filled = torch.tensor([(ids * num_user_tokens)[:num_user_tokens] for ids in token_ids])
    return embedding(filled.to(next(embedding.parameters()).device))


def first_of_equal(prompts: Tensor) -> list[int]:
    """Places of the soft prompts (N, T, D) that equal none before them, in order."""
    _, group_of = prompts.flatten(1).unique(dim=0, return_inverse=True)
    first: dict[int, int] = {}
    for place, group in enumerate(group_of.tolist()):
        first.setdefault(group, place)
    return list(first.values())
