"""Rows -> token ids, within a budget.

Prompt and response are tokenized apart and their ids concatenated, so the chosen and the rejected response follow
identical prompt ids. A prompt starts with exactly one BOS when the tokenizer has one; a response ends with exactly one
EOS unless it was truncated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from prlhf.data.clean import unusable_reason
from prlhf.data.quoting import quote
from prlhf.data.records import LabelledRow, Message, PreferenceRow, Prompt, ResponseRow
from prlhf.data.render import encode_rendered, encode_text, has_chat_template, render, render_prompt
from prlhf.data.user_index import GENERIC_USER_ID, UserIndex
from prlhf.errors import DataError

__all__ = [
    "Tokenized", "TokenizedLabelled", "TokenizedPair", "TokenizedResponse",
    "encode_prompt", "render_prompt", "tokenize_pairs", "tokenize_responses",
]

T = TypeVar("T")


@dataclass(frozen=True)
class TokenizedPair:
    """One preference row as ids.

    Args:
        row: position in the list that was tokenized.
        user_id: index of the user, 0 is generic.
        prompt_ids: BOS first when the tokenizer has one.
        chosen_ids: EOS last unless truncated.
        rejected_ids: EOS last unless truncated.
    """

    row: int
    user_id: int
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of the longer of the row's two sequences."""
        return len(self.prompt_ids) + max(map(len, self.responses))

    @property
    def responses(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids of the chosen and of the rejected response."""
        return self.chosen_ids, self.rejected_ids

    @property
    def num_packed_tokens(self) -> int:
        """Tokens of the prompt and of both responses."""
        return len(self.prompt_ids) + sum(map(len, self.responses))


@dataclass(frozen=True)
class TokenizedLabelled:
    """One unpaired row as ids; see TokenizedPair.

    Args:
        mismatched_ids: a response to another prompt.
        label: whether the user liked the response.
    """

    row: int
    user_id: int
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    mismatched_ids: tuple[int, ...]
    label: bool

    @property
    def num_tokens(self) -> int:
        """Tokens of the longer of the row's two sequences."""
        return len(self.prompt_ids) + max(map(len, self.responses))

    @property
    def responses(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids of the row's response and of the mismatched one."""
        return self.response_ids, self.mismatched_ids

    @property
    def num_packed_tokens(self) -> int:
        """Tokens of the prompt and of both responses."""
        return len(self.prompt_ids) + sum(map(len, self.responses))


@dataclass(frozen=True)
class TokenizedResponse:
    """One response row as ids; see TokenizedPair."""

    row: int
    user_id: int
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def num_packed_tokens(self) -> int:
        """The same, since there is one response."""
        return self.num_tokens


@dataclass(frozen=True)
class Tokenized(Generic[T]):
    """Rows that can be used, and reason -> number of rows that cannot."""

    rows: list[T]
    dropped: dict[str, int]


def tokenize_pairs(
    rows: Sequence[PreferenceRow],
    tokenizer: Any,
    user_index: UserIndex | None,
    *,
    max_tokens: int,
    max_prompt_tokens: int,
    num_user_tokens: int,
    with_user_text: bool = True,
) -> Tokenized[TokenizedPair]:
    """Tokenize preference rows.

    Dropped and counted: an empty prompt or response, equal responses (as text or as ids), a prompt that does
    not fit even when cut, and no room for a response token.

    Args:
        user_index: None gives every row to the generic user.
        max_tokens: for user tokens, prompt and response together.
        max_prompt_tokens: BOS included; see `encode_prompt` for what is cut.
        num_user_tokens: length T of the soft prompt; 0 without users.
        with_user_text: whether the rows' user texts stand in front of their prompts.
    Raises: DataError: an unknown user, or a prompt that cannot be rendered, naming the pair.
    """
    kept: list[TokenizedPair] = []
    dropped: Counter[str] = Counter()
    prompts = _PromptEncoder(tokenizer, max_prompt_tokens)
    for position, row in enumerate(rows):
        user_id = GENERIC_USER_ID if user_index is None else user_index.index(row.user_id)
        reason = unusable_reason(row)
        user_text = row.user_text if with_user_text else ""
        prompt_ids = None if reason else prompts(row.prompt, user_text, f"pair {quote(row.pair_id)}")
        if prompt_ids is None:
            dropped[reason or "prompt_too_long"] += 1
            continue
        budget = max_tokens - num_user_tokens - len(prompt_ids)
        chosen_ids = _response_ids(tokenizer, row.chosen, budget)
        rejected_ids = _response_ids(tokenizer, row.rejected, budget)
        if budget < 1:
            dropped["no_room_for_response"] += 1
        elif chosen_ids == rejected_ids:
            dropped["equal_response_ids"] += 1
        else:
            kept.append(TokenizedPair(position, user_id, prompt_ids, chosen_ids, rejected_ids))
    return Tokenized(kept, dict(dropped))


def tokenize_responses(
    rows: Sequence[ResponseRow | LabelledRow],
    tokenizer: Any,
    *,
    max_tokens: int,
    max_prompt_tokens: int,
    num_user_tokens: int = 0,
    with_user_text: bool = True,
) -> Tokenized[TokenizedResponse]:
    """Tokenize response rows, all of them the generic user's; running text may have an empty prompt.

    Dropped and counted: an empty response, a prompt that does not fit even when cut, no room for a response token.

    Raises: DataError: a prompt that cannot be rendered, naming the row.
    """
    kept: list[TokenizedResponse] = []
    dropped: Counter[str] = Counter()
    prompts = _PromptEncoder(tokenizer, max_prompt_tokens)
    for position, row in enumerate(rows):
        if not row.response.strip():
            dropped["empty_response"] += 1
            continue
        prompt_ids = prompts(row.prompt, row.user_text if with_user_text else "", f"row {position}")
        if prompt_ids is None:
            dropped["prompt_too_long"] += 1
            continue
        budget = max_tokens - num_user_tokens - len(prompt_ids)
        if budget < 1:
            dropped["no_room_for_response"] += 1
            continue
        response_ids = _response_ids(tokenizer, row.response, budget)
        kept.append(TokenizedResponse(position, GENERIC_USER_ID, prompt_ids, response_ids))
    return Tokenized(kept, dict(dropped))


def encode_prompt(tokenizer: Any, prompt: Prompt, user_text: str = "", *, max_prompt_tokens: int) -> list[int]:
    """Ids of a prompt up to where the response starts, BOS first when the tokenizer has one.

    Too long: without a chat template the end is kept. With one, the oldest turns are dropped, up to the next user
    message, keeping system messages; if the last exchange alone is too long, its first message keeps its end.

    Raises: DataError: the prompt cannot be rendered, or does not fit even so.
    """
    ids = _fit_prompt(tokenizer, prompt, user_text, max_prompt_tokens)
    if ids is None:
        raise DataError(f"the prompt's system text and headers alone exceed max_prompt_tokens {max_prompt_tokens}; "
                        "raise it")
    return ids


class _PromptEncoder:
    """encode_prompt with a memory: opposed users judge the same prompts."""

    def __init__(self, tokenizer: Any, max_prompt_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._max_prompt_tokens = max_prompt_tokens
        self._known: dict[tuple[Prompt, str], tuple[int, ...] | None] = {}

    def __call__(self, prompt: Prompt, user_text: str, where: str) -> tuple[int, ...] | None:
        key = (prompt, user_text)
        if key not in self._known:
            try:
                ids = _fit_prompt(self._tokenizer, prompt, user_text, self._max_prompt_tokens)
            except DataError as error:
                raise DataError(*(f"{where}: {message}" for message in error.messages)) from error
            self._known[key] = None if ids is None else tuple(ids)
        return self._known[key]


def _response_ids(tokenizer: Any, response: str, budget: int) -> tuple[int, ...]:
    ids = (*encode_text(tokenizer, response), tokenizer.eos_token_id)
    return ids[: max(0, budget)]


def _fit_prompt(tokenizer: Any, prompt: Prompt, user_text: str, limit: int) -> list[int] | None:
    """Ids of the prompt, cut to the limit; None when nothing that may be cut is left."""
    ids = _prompt_ids(tokenizer, prompt, user_text)
    if len(ids) <= limit:
        return ids
    if not has_chat_template(tokenizer):
        bos = ids[: num_bos(tokenizer)]
        num_kept = limit - len(bos)
        return bos + ids[-num_kept:] if num_kept > 0 else None
    messages = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    shortened: Sequence[Message] = messages
    for shortened in _without_oldest_turns(messages):
        ids = _prompt_ids(tokenizer, tuple(shortened), user_text)
        if len(ids) <= limit:
            return ids
    return _fit_first_message(lambda cut: _prompt_ids(tokenizer, cut, user_text), shortened, limit)


def _without_oldest_turns(messages: Sequence[Message]) -> list[list[Message]]:
    """The conversation from its second, third, ... user message on, each with the leading system messages."""
    num_system = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
    starts = [i for i in range(num_system + 1, len(messages)) if messages[i].role == "user"]
    return [[*messages[:num_system], *messages[start:]] for start in starts]


def _fit_first_message(
    encode: Callable[[tuple[Message, ...]], list[int]], messages: Sequence[Message], limit: int
) -> list[int] | None:
    """Ids with the longest end of the first non-system message that fits; None if not one character does."""
    first = next((i for i, message in enumerate(messages) if message.role != "system"), None)
    if first is None:
        return None
    content = messages[first].content
    fitting, too_long, best = 0, len(content), None
    while too_long - fitting > 1:
        length = (fitting + too_long) // 2
        cut = Message(messages[first].role, content[len(content) - length :])
        ids = encode((*messages[:first], cut, *messages[first + 1 :]))
        if len(ids) <= limit:
            fitting, best = length, ids
        else:
            too_long = length
    return best


def num_bos(tokenizer: Any) -> int:
    """1 if prompts start with BOS, else 0."""
    return 0 if tokenizer.bos_token_id is None else 1


def _prompt_ids(tokenizer: Any, prompt: Prompt, user_text: str) -> list[int]:
    """BOS, if there is one, then the prompt without any BOS that a template wrote."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = encode_rendered(tokenizer, render(tokenizer, prompt, user_text)) if prompt or user_text else []
    if bos is None:
        return ids
    if ids and ids[0] == bos:
        ids = ids[1:]
    if bos != eos:
        ids = [token for token in ids if token != bos]
    return [bos, *ids]
