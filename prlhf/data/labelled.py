"""Unpaired judgments: read as they are or taken from pairs, and paired again where evaluation needs pairs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from prlhf.data.records import LabelledData, LabelledRow, PreferenceData, PreferenceRow, Prompt, make_pair_id
from prlhf.data.tokenize import Tokenized, TokenizedLabelled, TokenizedResponse, tokenize_responses
from prlhf.data.user_index import GENERIC_USER_ID, UserIndex
from prlhf.errors import DataError


def labelled_from_pairs(rows: Iterable[PreferenceRow]) -> list[LabelledRow]:
    """Two rows of each pair: the chosen response is liked, the rejected one disliked."""
    return [
        LabelledRow(row.user_id, row.prompt, response, label, row.user_text)
        for row in rows
        for response, label in ((row.chosen, True), (row.rejected, False))
    ]


def pairs_from_labelled(rows: Iterable[LabelledRow]) -> list[PreferenceRow]:
    """Each response that a user liked against each one that the same user disliked, after the same prompt."""
    judged: dict[tuple[str, Prompt, str], dict[bool, list[str]]] = {}
    for row in rows:
        key = (row.user_id, row.prompt, row.user_text)
        judged.setdefault(key, {True: [], False: []})[row.label].append(row.response)
    return [
        PreferenceRow(make_pair_id(prompt, liked, disliked), user_id, prompt, liked, disliked, user_text)
        for (user_id, prompt, user_text), responses in judged.items()
        for liked in responses[True]
        for disliked in responses[False]
        if liked != disliked
    ]


def preferences_from_labelled(data: LabelledData) -> PreferenceData:
    """The pairs within unpaired rows, for evaluation; every user of a training row is a seen one."""
    return PreferenceData(
        train=pairs_from_labelled(data.train),
        dev=pairs_from_labelled(data.dev),
        eval_seen=pairs_from_labelled(data.eval_seen),
        eval_unseen=pairs_from_labelled(data.eval_unseen),
        source=data.source,
        declared_users=tuple(data.user_ids()),
        preferences=data.preferences,
    )


def tokenize_labelled(
    rows: Sequence[LabelledRow],
    tokenizer: Any,
    user_index: UserIndex | None,
    *,
    max_tokens: int,
    max_prompt_tokens: int,
    num_user_tokens: int,
    with_user_text: bool = True,
    seed: int,
) -> Tokenized[TokenizedLabelled]:
    """Tokenize unpaired rows, each with a response to another prompt, on which KTO estimates its KL.

    In random order, each row takes the response of the next one with another prompt, cut to the room that its own
    prompt leaves. So the estimate depends on which rows a step has and not on how they are cut into batches, and the
    reference's log-probs of both responses can be computed before training.

    Args:
        user_index: None gives every row to the generic user.
        seed: of the order.
    Raises: DataError: an unknown user, a prompt that cannot be rendered, or fewer than two different prompts.
    """
    tokenized = tokenize_responses(
        rows,
        tokenizer,
        max_tokens=max_tokens,
        max_prompt_tokens=max_prompt_tokens,
        num_user_tokens=num_user_tokens,
        with_user_text=with_user_text,
    )
    if tokenized.rows and len({row.prompt_ids for row in tokenized.rows}) < 2:
        raise DataError("unpaired rows are compared with responses to other prompts, and all of them have one prompt; "
                        "give rows with at least two different prompts")
    order = np.random.default_rng(seed).permutation(len(tokenized.rows)).tolist()
    kept = []
    for row, mismatched in zip(tokenized.rows, _responses_to_others(tokenized.rows, order), strict=True):
        source = rows[row.row]
        user_id = GENERIC_USER_ID if user_index is None else user_index.index(source.user_id)
        room = max_tokens - num_user_tokens - len(row.prompt_ids)
        kept.append(
            TokenizedLabelled(row.row, user_id, row.prompt_ids, row.response_ids, mismatched[:room], source.label)
        )
    return Tokenized(kept, tokenized.dropped)


def _responses_to_others(rows: Sequence[TokenizedResponse], order: Sequence[int]) -> list[tuple[int, ...]]:
    """For each row the response of the next row in the order, taken as a ring, that has another prompt."""
    responses: list[tuple[int, ...]] = [()] * len(rows)
    for place, index in enumerate(order):
        other = place + 1
        while rows[order[other % len(order)]].prompt_ids == rows[index].prompt_ids:
            other += 1
        responses[index] = rows[order[other % len(order)]].response_ids
    return responses
