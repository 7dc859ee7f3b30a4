"""The choice of the next token of each row, from its logits and its answer so far."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from prlhf.generation.options import SamplingOptions

NUM_SPARE_TOKENS = 8  # of an answer's end that is searched for stop strings; special tokens have no text


class Answer:
    """A row's tokens so far, and what of them the next one depends on.

    Each answer has a random generator of its own: its draws depend neither on its batch nor on anybody's random state.

    Args:
        stop_ids: tokens that end the answer and are no part of it.
        stream: sets the draws apart from those of other answers under the same seed.
        device: of the logits.
    """

    def __init__(
        self, options: SamplingOptions, tokenizer: Any, stop_ids: Collection[int], *, stream: int, device: torch.device
    ) -> None:
        self.tokens: list[int] = []
        self.options = options
        self.generator = torch.Generator(device).manual_seed((options.seed * 1_000_003 + stream) % 2**63)
        self._tokenizer = tokenizer
        self.stop_ids = stop_ids
        self._followers: dict[tuple[int, ...], list[int]] = {}
        longest = max((len(text.encode()) for text in options.stop_strings), default=0)
        self._num_searched = longest + NUM_SPARE_TOKENS

    def add(self, token: int) -> bool:
        """Go on with this token; returns whether the answer has ended."""
        if token in self.stop_ids:
            return True
        self.tokens.append(token)
        size = self.options.no_repeat_ngram_size
        if 0 < size <= len(self.tokens):
            self._followers.setdefault(tuple(self.tokens[-size:-1]), []).append(token)
        return len(self.tokens) == self.options.max_new_tokens or self._has_stop_string()

    def banned(self) -> list[int]:
        """Tokens that would repeat an n-gram of the answer."""
        size = self.options.no_repeat_ngram_size
        return self._followers.get(tuple(self.tokens[len(self.tokens) - size + 1 :]), [])

    def _has_stop_string(self) -> bool:
        if not self.options.stop_strings:
            return False
        text = self._tokenizer.decode(self.tokens[-self._num_searched :], skip_special_tokens=True)
        return any(stop in text for stop in self.options.stop_strings)


def choose_tokens(answers: Sequence[Answer], logits: Tensor, options: SamplingOptions) -> list[int]:
    """The next token of each answer; what is done to the logits comes in transformers' order.

    Args:
        answers: N.
        logits: (N, V).
    """
    scores = logits.float()
    if options.repetition_penalty != 1:
        scores = _penalized(scores, answers, options.repetition_penalty)
    if options.no_repeat_ngram_size > 0:
        banned = [(row, token) for row, answer in enumerate(answers) for token in answer.banned()]
        if banned:
            rows, tokens = torch.tensor(banned, device=scores.device).T
            scores = scores.index_put((rows, tokens), scores.new_tensor(-torch.inf))
    if options.temperature > 0:
        scores = _warped(scores, options)
        noise = torch.empty_like(scores)
        for row, answer in zip(noise, answers, strict=True):
            row.exponential_(generator=answer.generator)
        # The largest entry is a draw from the softmax (the Gumbel-max trick).
        scores = scores - noise.log()
    return scores.argmax(dim=-1).tolist()


def _penalized(scores: Tensor, answers: Sequence[Answer], penalty: float) -> Tensor:
    seen = [(row, token) for row, answer in enumerate(answers) for token in set(answer.tokens)]
    if not seen:
        return scores
    rows, tokens = torch.tensor(seen, device=scores.device).T
    values = scores[rows, tokens]
    return scores.index_put((rows, tokens), torch.where(values < 0, values * penalty, values / penalty))


def _warped(scores: Tensor, options: SamplingOptions) -> Tensor:
    ids = torch.empty(0, dtype=torch.int64)  # part of the signature, and looked at by none of the three
    scores = TemperatureLogitsWarper(options.temperature)(ids, scores)
    if options.top_k > 0:
        scores = TopKLogitsWarper(options.top_k)(ids, scores)
    if options.top_p < 1:
        scores = TopPLogitsWarper(options.top_p)(ids, scores)
    return scores
