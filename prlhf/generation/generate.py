"""Batched answers to prompts, each for its own user."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

from prlhf.data.context import Context
from prlhf.data.records import Prompt
from prlhf.data.tokenize import encode_prompt
from prlhf.errors import DataError
from prlhf.generation.choose import Answer
from prlhf.generation.decode import Request, decode
from prlhf.generation.options import SamplingOptions
from prlhf.models.backbone import describe_positions, position_limit
from prlhf.models.policy import PersonalizedPolicy

DEFAULTS = SamplingOptions()
logger = logging.getLogger(__name__)


def generate(
    policy: PersonalizedPolicy,
    prompts: Sequence[Prompt],
    user_ids: Sequence[int] | None,
    *,
    user_texts: Sequence[str] | None = None,
    contexts: Sequence[Context] | None = None,
    options: SamplingOptions = DEFAULTS,
    streams: Sequence[int] | None = None,
    max_prompt_tokens: int = 512,
    batch_rows: int = 32,
    on_batch: Callable[[], None] = lambda: None,
) -> list[str]:
    """Answers to prompts, each in its user's way; with the same stream, whatever else is answered beside it.

    Args:
        prompts: N texts or message lists.
        user_ids: N indices, 0 is generic; None: no soft prompt (a policy without users, or the reference).
        user_texts: N texts about the users, which stand before the prompt; none by default.
        contexts: what an encoder reads about the N users, such as `policy.contexts.of_user(...)` of a known user or
            `policy.contexts.read_text(...)` of anybody; the generic user by default.
        streams: N numbers, with `options.seed` the seed of each row's draws; 0 to N - 1 by default.
        max_prompt_tokens: longer prompts are cut as for training, see `encode_prompt`.
        batch_rows: prompts answered at the same time.
        on_batch: called before prompts are read; may raise to stop.
    Returns: N texts without prompt and special tokens.
    Raises: DataError: an empty prompt where the tokenizer has no BOS to start from, a text that is not UTF-8, or prompt
        and new tokens beyond the model's positions.
    """
    texts = [""] * len(prompts) if user_texts is None else user_texts
    ids = [None] * len(prompts) if user_ids is None else user_ids
    encoded = [
        _encode(policy, prompt, text, max_prompt_tokens) for prompt, text, _ in zip(prompts, texts, ids, strict=True)
    ]
    num_cut = sum(is_cut for _, is_cut in encoded)
    if num_cut:
        logger.warning("%d of %d prompts are longer than %d tokens and cut", num_cut, len(prompts), max_prompt_tokens)
    prompt_ids = [own for own, _ in encoded]
    answers = generate_ids(
        policy,
        prompt_ids,
        user_ids,
        contexts,
        options=options,
        streams=streams,
        batch_rows=batch_rows,
        on_batch=on_batch,
    )
    decoded = [policy.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answers]
    return [_before(text, options.stop_strings).strip() for text in decoded]


def _encode(policy: PersonalizedPolicy, prompt: Prompt, text: str, limit: int) -> tuple[Sequence[int], bool]:
    """Ids of a prompt, and whether it was cut to the limit."""
    whole = encode_prompt(policy.tokenizer, prompt, text, max_prompt_tokens=sys.maxsize)
    if len(whole) <= limit:
        return whole, False
    return encode_prompt(policy.tokenizer, prompt, text, max_prompt_tokens=limit), True


def generate_ids(
    policy: PersonalizedPolicy,
    prompt_ids: Sequence[Sequence[int]],
    user_ids: Sequence[int] | None,
    contexts: Sequence[Context] | None = None,
    *,
    options: SamplingOptions,
    streams: Sequence[int] | None = None,
    batch_rows: int = 32,
    on_batch: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """New token ids after each prompt, up to but without EOS; a stop string's own tokens are the last.

    Args:
        prompt_ids: N prompts, BOS first where the tokenizer has one.
        user_ids: as for `generate`.
        contexts: likewise.
        streams: likewise.
        batch_rows: as for `generate`.
        on_batch: likewise.
    Raises: DataError: as `generate`.
    """
    num_rows = len(prompt_ids)
    users = [None] * num_rows if user_ids is None else user_ids
    known = [None] * num_rows if contexts is None else contexts
    requests = [Request(tuple(ids), user, context) for ids, user, context in zip(prompt_ids, users, known, strict=True)]
    _check_lengths(policy, requests, options)
    stop_ids = _stop_ids(policy)
    answers = [
        Answer(options, policy.tokenizer, stop_ids, stream=stream, device=policy.device)
        for _, stream in zip(requests, range(num_rows) if streams is None else streams, strict=True)
    ]
    # The longest first, as `decode` wants it; equal prompts side by side, so that they are read together.
    order = sorted(range(num_rows), key=lambda i: (-len(prompt_ids[i]), requests[i].prompt_ids, users[i] or 0))
    with policy.evaluating():
        decode(
            policy,
            [requests[i] for i in order],
            [answers[i] for i in order],
            options,
            batch_rows=batch_rows,
            on_batch=on_batch,
        )
    return [answer.tokens for answer in answers]


def _check_lengths(policy: PersonalizedPolicy, requests: Sequence[Request], options: SamplingOptions) -> None:
    if not all(request.prompt_ids for request in requests):
        raise DataError("prompt: empty, and the tokenizer has no BOS to start from; give it some text")
    num_soft = [0 if request.user_id is None else policy.soft_prompt.num_user_tokens for request in requests]
    longest = max((len(r.prompt_ids) + soft for r, soft in zip(requests, num_soft, strict=True)), default=0)
    limit = position_limit(policy.backbone)
    if limit is not None and longest + options.max_new_tokens > limit:
        raise DataError(
            f"prompt: {longest} positions and {options.max_new_tokens} new tokens, but the backbone has "
            f"{describe_positions(policy.backbone)}; shorten the prompt or lower max_new_tokens"
        )


def _stop_ids(policy: PersonalizedPolicy) -> set[int]:
    """The tokenizer's EOS and those of the model's folder, as chat models end a turn with another special token."""
    eos = cast(Any, policy.backbone).generation_config.eos_token_id
    named = {eos} if isinstance(eos, int) else set(eos or ())
    special = {token_id for token_id, token in policy.tokenizer.added_tokens_decoder.items() if token.special}
    return {policy.tokenizer.eos_token_id} | (named & special)


def _before(text: str, stop_strings: Sequence[str]) -> str:
    """The text up to the first stop string in it."""
    return text[: min((place for stop in stop_strings if (place := text.find(stop)) >= 0), default=len(text))]
