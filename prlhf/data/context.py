"""What an encoder reads about a user: the user's text, or a few pairs that the user has judged."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from prlhf.data.clean import unusable_reason
from prlhf.data.records import JudgedRow, PreferenceRow, Prompt, preference_row, record_from_row
from prlhf.data.render import encode_text
from prlhf.data.splits import prompt_key

ContextKind = Literal["text", "history"]
Context = tuple[tuple[int, ...], ...]  # the ids of each text; nothing is the generic user
NO_CONTEXT: Context = ()


@dataclass(frozen=True)
class UserFacts:
    """What is known about a user: their own text, and the pairs they have judged."""

    text: str = ""
    pairs: tuple[PreferenceRow, ...] = ()


def collect_facts(rows: Iterable[JudgedRow]) -> dict[str, UserFacts]:
    """Facts of every user of the rows; the last text of a user counts, and unpaired rows add nothing else."""
    texts: dict[str, str] = {}
    pairs: dict[str, list[PreferenceRow]] = {}
    for row in rows:
        texts[row.user_id] = row.user_text or texts.get(row.user_id, "")
        own = pairs.setdefault(row.user_id, [])
        if isinstance(row, PreferenceRow) and unusable_reason(row) is None:
            own.append(row)
    return {user_id: UserFacts(text, tuple(pairs[user_id])) for user_id, text in texts.items()}


class UserContexts:
    """Contexts of rows and of users, as token ids.

    The context of a row never holds a pair with the row's prompt (of a dialogue: its opening) or one of its responses:
    the answer would stand in it.

    Args:
        kind: "text": one text; "history": chosen, rejected, chosen, ... of up to `max_pairs` pairs.
        max_tokens: of a text or a response; what is longer is cut.
        facts: user id -> what is known about the user.
    """

    def __init__(
        self,
        kind: ContextKind,
        tokenizer: Any,
        *,
        max_tokens: int,
        max_pairs: int,
        facts: Mapping[str, UserFacts] | None = None,
    ) -> None:
        self.kind = kind
        self.max_tokens = max_tokens
        self.max_pairs = max_pairs
        self.facts = dict(facts or {})
        self._tokenizer = tokenizer
        self._known_ids: dict[str, tuple[int, ...]] = {}

    def with_facts(self, facts: Mapping[str, UserFacts]) -> UserContexts:
        """The same reader of other users."""
        return UserContexts(
            self.kind, self._tokenizer, max_tokens=self.max_tokens, max_pairs=self.max_pairs, facts=facts
        )

    def of_row(self, row: JudgedRow, key: Sequence[int], *, training: bool = False) -> Context:
        """The context of a row: its own user text, or other pairs of its user.

        Args:
            key: of the draw of the pairs.
            training: draw 0 to `max_pairs` pairs, so that the encoder learns to do with few, not as many as there are.
        """
        facts = replace(self.facts.get(row.user_id, UserFacts()), text=row.user_text)
        return self._read(facts, row.prompt, row.responses, key, training)

    def of_user(self, user_id: str, prompt: Prompt, responses: Collection[str] = ()) -> Context:
        """The context of a user who is answered, or whose view of some responses is asked for."""
        return self._read(self.facts.get(user_id, UserFacts()), prompt, responses, (0,), training=False)

    def read_text(self, text: str) -> Context:
        """The context of a text about somebody."""
        ids = self._encode(text)
        return (ids,) if ids else NO_CONTEXT

    def read_pairs(self, pairs: Iterable[PreferenceRow]) -> Context:
        """The context of pairs that somebody has judged."""
        return tuple(self._encode(response) for pair in pairs for response in (pair.chosen, pair.rejected))

    def to_keep(self, seed: int) -> dict[str, UserFacts]:
        """What a checkpoint needs of the facts: the texts, or `max_pairs` pairs a user, drawn once."""
        if self.kind == "text":
            return {user_id: UserFacts(text=facts.text) for user_id, facts in self.facts.items()}
        return {
            user_id: UserFacts(pairs=tuple(facts.pairs[i] for i in _order([seed, user], facts)[: self.max_pairs]))
            for user, (user_id, facts) in enumerate(self.facts.items())
        }

    def _read(
        self, facts: UserFacts, prompt: Prompt, responses: Collection[str], key: Sequence[int], training: bool
    ) -> Context:
        if self.kind == "text":
            return self.read_text(facts.text)
        most = int(np.random.default_rng([*key, 1]).integers(self.max_pairs + 1)) if training else self.max_pairs
        opening, known = prompt_key(prompt), {_plain(response) for response in responses}
        drawn: list[PreferenceRow] = []
        for i in _order(key, facts):
            pair = facts.pairs[i]
            if len(drawn) == most:
                break
            if prompt_key(pair.prompt) != opening and known.isdisjoint((_plain(pair.chosen), _plain(pair.rejected))):
                drawn.append(pair)
        return self.read_pairs(drawn)

    def _encode(self, text: str) -> tuple[int, ...]:
        if text not in self._known_ids:
            self._known_ids[text] = tuple(encode_text(self._tokenizer, text)[: self.max_tokens])
        return self._known_ids[text]


def _order(key: Sequence[int], facts: UserFacts) -> list[int]:
    return np.random.default_rng([*key, 0]).permutation(len(facts.pairs)).tolist()


def _plain(response: str) -> str:
    return " ".join(response.casefold().split())


def facts_record(facts: Mapping[str, UserFacts]) -> dict[str, Any]:
    """Facts as JSON values."""
    return {
        user_id: {"text": known.text, "pairs": [record_from_row(pair) for pair in known.pairs]}
        for user_id, known in facts.items()
    }


def facts_from_record(record: Mapping[str, Any], where: str) -> dict[str, UserFacts]:
    """Facts of `facts_record`.

    Raises: DataError: a pair that is none.
    """
    return {
        user_id: UserFacts(known["text"], tuple(preference_row(pair, where) for pair in known["pairs"]))
        for user_id, known in record.items()
    }


@dataclass(frozen=True)
class ContextBatch:
    """Contexts of B rows, padded on the right to S texts of L tokens; a text of length 0 is none.

    Args:
        input_ids: (B, S, L) int64.
        lengths: (B, S) int64.
    """

    input_ids: Tensor
    lengths: Tensor

    def to(self, device: torch.device | str) -> ContextBatch:
        """The batch on another device."""
        return ContextBatch(self.input_ids.to(device), self.lengths.to(device))


def collate_contexts(contexts: Sequence[Context], pad_id: int) -> ContextBatch:
    """Batch of at least one context, all of one kind; as wide as a pair where all of them are empty."""
    num_texts = max(map(len, contexts)) or 2
    longest = max((len(ids) for context in contexts for ids in context), default=0)
    input_ids = torch.full((len(contexts), num_texts, max(1, longest)), pad_id, dtype=torch.int64)
    lengths = torch.zeros(len(contexts), num_texts, dtype=torch.int64)
    for row, context in enumerate(contexts):
        for place, ids in enumerate(context):
            input_ids[row, place, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
            lengths[row, place] = len(ids)
    return ContextBatch(input_ids, lengths)
