"""The personalization tax: what the users' tastes cost on text that none of them judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from prlhf.data.tokenize import TokenizedResponse
from prlhf.data.user_index import GENERIC_USER_ID
from prlhf.evaluation.scoring import TokenSequence, score_sequences
from prlhf.models.policy import PersonalizedPolicy

MAX_USERS = 20


def personalization_tax(
    policy: PersonalizedPolicy,
    texts: Sequence[TokenizedResponse],
    *,
    pad_id: int,
    microbatch_tokens: int,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """NLL per token of neutral texts, in nats, EOS included.

    Args:
        texts: at least one.
        on_batch: called between batches; may raise to stop.
    Returns: `nll_per_token` under the `reference`, as the `generic` user (without users: as the policy is), and the
        mean over `num_users` users, at most 20 that stand evenly among the known ones (None without users and for
        encoders).
    """
    sequences = [TokenSequence(text.prompt_ids, text.response_ids) for text in texts]
    options: dict[str, Any] = {"pad_id": pad_id, "microbatch_tokens": microbatch_tokens, "on_batch": on_batch}

    def nll(model: PersonalizedPolicy, user_id: int | None) -> float:
        users = None if user_id is None else [user_id] * len(sequences)
        scores = score_sequences(model, sequences, users, **options)
        return float(-scores.values.double().sum() / scores.tokens.sum())

    with policy.reference.active() as frozen:
        reference = nll(frozen, None)
    # What an encoder makes of users is not a matter of their ids.
    is_table = policy.user_encoder is not None and policy.contexts is None
    num_known = len(policy.users) if is_table and policy.users is not None else 0
    users = np.linspace(1, num_known, min(num_known, MAX_USERS)).round().astype(int).tolist()
    return {
        "num_texts": len(texts),
        "num_tokens": sum(len(text.response_ids) for text in texts),
        "num_users": len(users),
        "nll_per_token": {
            "reference": reference,
            "generic": nll(policy, None if policy.user_encoder is None else GENERIC_USER_ID),
            "users_mean": float(np.mean([nll(policy, user) for user in users])) if users else None,
        },
    }
