"""KV-cached sampling for a batch of prompts, each answered for its own user."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import (
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from prlhf.data.context import Context, collate_contexts
from prlhf.data.records import Prompt
from prlhf.data.tokenize import encode_prompt
from prlhf.errors import DataError
from prlhf.models.backbone import pad_token_id, position_limit
from prlhf.models.policy import PersonalizedPolicy


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are drawn; names and meanings as in transformers.

    Args:
        temperature: 0 is greedy.
        top_k: 0 is all tokens.
        repetition_penalty: 1 is none; of the answer's own tokens, not of the prompt's.
        no_repeat_ngram_size: 0 is none; within the answer.
        seed: of the draws; the caller's random state is not touched.
    """

    max_new_tokens: int = 160
    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    seed: int = 0


def generate(
    policy: PersonalizedPolicy,
    prompts: Sequence[Prompt],
    user_ids: Sequence[int] | None,
    *,
    user_texts: Sequence[str] | None = None,
    contexts: Sequence[Context] | None = None,
    options: SamplingOptions = SamplingOptions(),
    max_prompt_tokens: int = 512,
    batch_rows: int = 32,
    on_batch: Callable[[], None] = lambda: None,
) -> list[str]:
    """Answers to prompts, each in its user's way; an answer does not depend on what else is in its batch.

    Args:
        prompts: N texts or message lists.
        user_ids: N indices, 0 is generic; None: no soft prompt (a policy without users, or the reference).
        user_texts: N texts about the users, which stand before the prompt; none by default.
        contexts: what an encoder reads about the N users, such as `policy.contexts.of_user(...)` of a known user or
            `policy.contexts.read_text(...)` of anybody; the generic user by default.
        max_prompt_tokens: longer prompts are cut as for training, see `encode_prompt`.
        batch_rows: prompts answered at the same time.
        on_batch: called between batches; may raise to stop.
    Returns: N texts without prompt and special tokens.
    Raises: DataError: an empty prompt, or prompt and new tokens beyond the model's positions.
    """
    texts = [""] * len(prompts) if user_texts is None else user_texts
    ids = [None] * len(prompts) if user_ids is None else user_ids
    encoded = [
        encode_prompt(policy.tokenizer, prompt, text, max_prompt_tokens=max_prompt_tokens)
        for prompt, text, _ in zip(prompts, texts, ids, strict=True)
    ]
    # The longest first: what does not fit, in positions or in memory, fails before any work is done.
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]), reverse=True)
    answers = [""] * len(encoded)
    for start in range(0, len(order), batch_rows):
        on_batch()
        members = order[start : start + batch_rows]
        new_ids = generate_ids(
            policy,
            [encoded[i] for i in members],
            None if user_ids is None else [user_ids[i] for i in members],
            None if contexts is None else [contexts[i] for i in members],
            options=options,
            streams=members,
        )
        for i, tokens in zip(members, new_ids, strict=True):
            answers[i] = policy.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    return answers


def generate_ids(
    policy: PersonalizedPolicy,
    prompt_ids: Sequence[Sequence[int]],
    user_ids: Sequence[int] | None,
    contexts: Sequence[Context] | None = None,
    *,
    options: SamplingOptions,
    streams: Sequence[int] | None = None,
) -> list[list[int]]:
    """New token ids after each prompt, up to but without EOS.

    Args:
        prompt_ids: N prompts, BOS first where the tokenizer has one.
        user_ids: as for `generate`.
        contexts: likewise.
        streams: N numbers that set apart the draws of rows under one seed; 0 to N - 1 by default.
    Raises: DataError: as `generate`.
    """
    num_rows = len(prompt_ids)
    streams = range(num_rows) if streams is None else streams
    with policy.evaluating(), _own_settings(policy) as stop_ids:
        embeds, mask = _left_padded(policy, prompt_ids, user_ids, contexts)
        limit = position_limit(policy.backbone)
        if limit is not None and embeds.shape[1] + options.max_new_tokens > limit:
            raise DataError(
                f"prompt: {embeds.shape[1]} positions and {options.max_new_tokens} new tokens, but the backbone has "
                f"{limit}; shorten the prompt or lower max_new_tokens"
            )
        generation = GenerationConfig(
            max_new_tokens=options.max_new_tokens,
            do_sample=False,  # `_processors` draws
            eos_token_id=stop_ids,
            pad_token_id=pad_token_id(policy.tokenizer),
        )
        out = cast(Any, policy.backbone).generate(
            inputs_embeds=embeds,
            attention_mask=mask,
            generation_config=generation,
            logits_processor=_processors(options, streams, policy.device),
        )
    return [_until(row, stop_ids) for row in out.tolist()]


def _left_padded(
    policy: PersonalizedPolicy,
    prompt_ids: Sequence[Sequence[int]],
    user_ids: Sequence[int] | None,
    contexts: Sequence[Context] | None,
) -> tuple[Tensor, Tensor]:
    """Embeddings (N, L, D) of [pads] BOS soft prompt text, and their mask (N, L); positions follow the mask."""
    if not all(prompt_ids):
        raise DataError("prompt: empty, and the tokenizer has no BOS to start from; give it some text")
    longest = max(len(ids) for ids in prompt_ids)
    num_pads = [longest - len(ids) for ids in prompt_ids]
    pad_id = pad_token_id(policy.tokenizer)
    padded = torch.tensor([[*ids, *[pad_id] * pads] for ids, pads in zip(prompt_ids, num_pads, strict=True)])
    users = None if user_ids is None else torch.tensor(list(user_ids), dtype=torch.int64, device=policy.device)
    read = None if contexts is None else collate_contexts(contexts, pad_id).to(policy.device)
    embeds = policy.input_embeds(padded.to(policy.device), users, read)
    # Padded on the right, so that BOS is first and the soft prompt finds its place; then turned around.
    embeds = torch.stack([row.roll(pads, dims=0) for row, pads in zip(embeds, num_pads, strict=True)])
    positions = torch.arange(embeds.shape[1])
    mask = positions >= torch.tensor(num_pads)[:, None]
    return embeds, mask.to(device=policy.device, dtype=torch.int64)


def _processors(options: SamplingOptions, streams: Sequence[int], device: torch.device) -> LogitsProcessorList:
    """What is done to the logits before the largest is taken, in transformers' order."""
    steps: list[LogitsProcessor] = []
    if options.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    if options.no_repeat_ngram_size > 0:
        steps.append(NoRepeatNGramLogitsProcessor(options.no_repeat_ngram_size))
    if options.temperature == 0:
        return LogitsProcessorList(steps)
    steps.append(TemperatureLogitsWarper(options.temperature))
    if options.top_k > 0:
        steps.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        steps.append(TopPLogitsWarper(options.top_p))
    steps.append(_Draw([_make_generator(options.seed, stream, device) for stream in streams]))
    return LogitsProcessorList(steps)


class _Draw(LogitsProcessor):
    """Adds Gumbel noise, so that the largest entry is a draw from the softmax (the Gumbel-max trick).

    Each row has a generator of its own: its answer depends neither on its batch nor on anybody's random state.
    """

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self.generators = generators

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.log()


def _make_generator(seed: int, stream: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed((seed * 1_000_003 + stream) % 2**63)


def _until(tokens: list[int], stop_ids: Sequence[int]) -> list[int]:
    return next((tokens[:i] for i, token in enumerate(tokens) if token in stop_ids), tokens)


@contextlib.contextmanager
def _own_settings(policy: PersonalizedPolicy) -> Iterator[list[int]]:
    """Sets aside the sampling defaults of the model's folder, which `generate` would add to ours; gives the stop ids.

    Those are the tokenizer's EOS and the folder's own, as chat models end a turn with another special token.
    """
    backbone = cast(Any, policy.backbone)
    theirs = backbone.generation_config
    eos = theirs.eos_token_id
    named = {eos} if isinstance(eos, int) else set(eos or ())
    special = {token_id for token_id, token in policy.tokenizer.added_tokens_decoder.items() if token.special}
    backbone.generation_config = GenerationConfig()
    try:
        yield sorted({policy.tokenizer.eos_token_id} | (named & special))
    finally:
        backbone.generation_config = theirs
