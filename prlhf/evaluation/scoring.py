"""Log-probs or reward scores of many ragged sequences; those with a common prompt share it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prlhf.data.collate import ResponseTree, collate_trees
from prlhf.data.context import NO_CONTEXT, Context
from prlhf.data.sampler import cut_packs, cut_rows, shard
from prlhf.data.tokenize import TokenizedLabelled, TokenizedPair
from prlhf.data.user_index import GENERIC_USER_ID
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
    trees, members = _grow_trees(sequences, user_ids, contexts, microbatch_tokens)
    num_soft = 0 if user_ids is None else model.soft_prompt.num_user_tokens
    results = []
    cuts = _cut(model, trees, num_soft, microbatch_tokens)
    with model.evaluating():
        for cut in cuts:
            on_batch()
            read = None if contexts is None else [contexts[members[i][0]] for i in cut]
            batch = collate_trees([trees[i] for i in cut], pad_id, read).to(model.device)
            results.append(model.sequence_values(batch, None if user_ids is None else batch.user_ids, batch.context))
    scores = Scores(torch.zeros(len(sequences)), torch.zeros(len(sequences), dtype=torch.int64))
    # The device is waited for here alone, not once a batch.
    for cut, (values, tokens) in zip(cuts, results, strict=True):
        places = [place for i in cut for place in members[i]]
        scores.values[places], scores.tokens[places] = values.cpu(), tokens.cpu()
    return scores


def _grow_trees(
    sequences: Sequence[TokenSequence],
    user_ids: Sequence[int] | None,
    contexts: Sequence[Context] | None,
    microbatch_tokens: int,
) -> tuple[list[ResponseTree], list[list[int]]]:
    """Sequences with the same user, context and prompt as trees no larger than a micro-batch, and their places."""
    places: dict[tuple[int, Context, tuple[int, ...]], list[int]] = {}
    users = [GENERIC_USER_ID] * len(sequences) if user_ids is None else user_ids
    read = [NO_CONTEXT] * len(sequences) if contexts is None else contexts
    for place, (sequence, user_id, context) in enumerate(zip(sequences, users, read, strict=True)):
        places.setdefault((user_id, context, sequence.prompt_ids), []).append(place)
    trees: list[ResponseTree] = []
    members: list[list[int]] = []
    for (user_id, _, prompt_ids), group in places.items():
        room = microbatch_tokens - len(prompt_ids)
        for part in cut_packs(group, lambda place: len(sequences[place].response_ids), room):
            responses = tuple(sequences[place].response_ids for place in part)
            trees.append(ResponseTree(len(trees), user_id, prompt_ids, responses))
            members.append(part)
    return trees, members


def _cut(
    model: PersonalizedModel, trees: Sequence[ResponseTree], num_soft: int, microbatch_tokens: int
) -> list[list[int]]:
    """Micro-batches of trees: by their tokens where rows are packed, by their padded size elsewhere."""

    def longest(i: int) -> int:
        return len(trees[i].prompt_ids) + max(map(len, trees[i].responses))

    return cut_rows(
        range(len(trees)),
        packs=lambda i: model.packs(longest(i)),
        num_packed=lambda i: trees[i].num_tokens + num_soft,
        num_padded=lambda i: len(trees[i].responses) * (longest(i) + num_soft),
        microbatch_tokens=microbatch_tokens,
    )


def score_pair_responses(
    model: PersonalizedModel,
    rows: Sequence[TokenizedPair | TokenizedLabelled],
    user_ids: Sequence[int] | None,
    contexts: Sequence[Context] | None = None,
    **options: Any,
) -> Tensor:
    """Values of both responses of each row (chosen, rejected; or own, mismatched), the work shared between ranks.

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
        for j, response in enumerate(row.responses):
            key = (TokenSequence(row.prompt_ids, response), user, context)
            places[i, j] = distinct.setdefault(key, len(distinct))
    mine = shard(list(distinct), rank(), world_size())
    users = None if user_ids is None else [user for _, user, _ in mine]
    read = None if contexts is None else [context for _, _, context in mine]
    scores = score_sequences(model, [sequence for sequence, _, _ in mine], users, read, **options)
    # On the model's device, because NCCL sums nothing on the CPU; each entry is one rank's value plus zeros.
    values = torch.zeros(len(distinct), device=model.device)
    values[shard(range(len(distinct)), rank(), world_size())] = scores.values.to(model.device)
    return all_reduce_sum(values).cpu()[places]
