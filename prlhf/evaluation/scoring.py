"""Log-probs or reward scores of many ragged sequences, in padded batches of similar length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prlhf.data.collate import collate_responses
from prlhf.data.context import NO_CONTEXT, Context
from prlhf.data.records import GENERIC_USER_ID
from prlhf.data.sampler import cut_microbatches
from prlhf.data.tokenize import TokenizedPair, TokenizedResponse
from prlhf.distributed import all_reduce_sum, rank, world_size
from prlhf.models.personalized import PersonalizedModel


class TokenSequence(NamedTuple):
    """Token ids of a prompt (BOS first where there is one) and of a response."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]


class Scores(NamedTuple):
    """Values (N,) float32 and response tokens (N,) int64, on the CPU, in the order given.

    The value of a response is its summed log-prob in nats under a policy, its score under a reward model.
    """

    values: Tensor
    tokens: Tensor


def score_sequences(
    model: PersonalizedModel,
    sequences: Sequence[TokenSequence],
    user_ids: Sequence[int] | None,
    contexts: Sequence[Context] | None = None,
    *,
    pad_id: int,
    microbatch_tokens: int,
    on_batch: Callable[[], None] = lambda: None,
) -> Scores:
    """Value of each response after its prompt, in evaluation mode and without gradient.

    Args:
        sequences: N of them, any lengths.
        user_ids: N ids, 0 is generic; None: no soft prompt.
        contexts: N of them, for an encoder; None for the generic user.
        on_batch: called between batches; may raise to stop.
    """
    users = [GENERIC_USER_ID] * len(sequences) if user_ids is None else user_ids
    rows = [
        TokenizedResponse(row, user_id, *sequence)
        for row, (sequence, user_id) in enumerate(zip(sequences, users, strict=True))
    ]
    num_soft = 0 if user_ids is None else model.soft_prompt.num_user_tokens
    cuts = cut_microbatches(range(len(rows)), lambda i: rows[i].num_tokens + num_soft, microbatch_tokens)
    results = []
    with model.evaluating():
        for members in cuts:
            on_batch()
            read = None if contexts is None else [contexts[i] for i in members]
            batch = collate_responses([rows[i] for i in members], pad_id, read).to(model.device)
            results.append(model.sequence_values(batch, None if user_ids is None else batch.user_ids, batch.context))
    scores = Scores(torch.zeros(len(rows)), torch.zeros(len(rows), dtype=torch.int64))
    # The device is waited for here alone, not once a batch.
    for members, (values, tokens) in zip(cuts, results, strict=True):
        scores.values[members], scores.tokens[members] = values.cpu(), tokens.cpu()
    return scores


def score_pair_responses(
    model: PersonalizedModel,
    rows: Sequence[TokenizedPair],
    user_ids: Sequence[int] | None,
    contexts: Sequence[Context] | None = None,
    **options: Any,
) -> Tensor:
    """Values of the chosen and the rejected response of each row, the work shared between ranks.

    What recurs is scored once: several users over one pair under one soft prompt, and the same pair with either label.

    Args:
        user_ids: one a row, 0 is generic; None: no soft prompt.
        contexts: one a row, for an encoder; None for the generic user.
        **options: of `score_sequences`.
    Returns: (N, 2) float32 on the CPU, the same on every rank.
    """
    distinct: dict[tuple[TokenSequence, int, Context], int] = {}
    places = torch.zeros(len(rows), 2, dtype=torch.int64)
    for i, row in enumerate(rows):
        user = GENERIC_USER_ID if user_ids is None else user_ids[i]
        context = NO_CONTEXT if contexts is None else contexts[i]
        for j, response in enumerate((row.chosen_ids, row.rejected_ids)):
            key = (TokenSequence(row.prompt_ids, response), user, context)
            places[i, j] = distinct.setdefault(key, len(distinct))
    mine = list(distinct)[rank() :: world_size()]
    users = None if user_ids is None else [user for _, user, _ in mine]
    read = None if contexts is None else [context for _, _, context in mine]
    scores = score_sequences(model, [sequence for sequence, _, _ in mine], users, read, **options)
    # On the model's device, because NCCL sums nothing on the CPU; each entry is one rank's value plus zeros.
    values = torch.zeros(len(distinct), device=model.device)
    values[rank() :: world_size()] = scores.values.to(model.device)
    return all_reduce_sum(values).cpu()[places]
