"""Rows of preference and response data.

A user is a string id in files and an int64 from collate on; index 0 is the generic user and has no string id.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from prlhf.data.quoting import did_you_mean, quote
from prlhf.data.user_index import check_user_id
from prlhf.errors import DataError

PREFERENCE_FIELDS = ("pair_id", "user_id", "prompt", "chosen", "rejected", "user_text")
LABELLED_FIELDS = ("user_id", "prompt", "response", "completion", "label", "user_text")
RESPONSE_FIELDS = ("text", "prompt", "response", "user_text")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


Prompt = str | tuple[Message, ...]


@dataclass(frozen=True)
class PreferenceRow:
    """One judgment: the user preferred `chosen` to `rejected` as an answer to `prompt`.

    Args:
        pair_id: names the prompt with its two responses, whichever was preferred; all who judged the pair share it.
        user_text: what is known about the user in words; ordinary prompt text for the model.
    """

    pair_id: str
    user_id: str
    prompt: Prompt
    chosen: str
    rejected: str
    user_text: str = ""

    @property
    def responses(self) -> tuple[str, ...]:
        """The texts that were judged."""
        return self.chosen, self.rejected


@dataclass(frozen=True)
class LabelledRow:
    """One unpaired judgment: the user liked (`label` true) or disliked `response` as an answer to `prompt`."""

    user_id: str
    prompt: Prompt
    response: str
    label: bool
    user_text: str = ""

    @property
    def responses(self) -> tuple[str, ...]:
        """The text that was judged."""
        return (self.response,)


JudgedRow = PreferenceRow | LabelledRow
Row = TypeVar("Row", PreferenceRow, LabelledRow)


@dataclass(frozen=True)
class ResponseRow:
    """One demonstration; running text has an empty prompt."""

    prompt: Prompt
    response: str
    user_text: str = ""


@dataclass(frozen=True)
class JudgedData(Generic[Row]):
    """Rows for training, for tuning (`dev`) and for reporting, on users seen in training and on others.

    Args:
        source: where the rows come from, for messages and reports.
        declared_users: seen user ids in the order of users.json; None without one.
        ceiling: expected accuracy of one who knows every user's taste, below 1 where labels are noisy; None: not known.
        preferences: user id -> what the user likes, in a sentence; for the prompted baseline alone.
        origin: the built-in data set that the rows of a prepared directory were drawn from; None elsewhere.
    """

    train: list[Row]
    dev: list[Row]
    eval_seen: list[Row]
    eval_unseen: list[Row]
    source: str
    declared_users: tuple[str, ...] | None = None
    ceiling: float | None = None
    preferences: Mapping[str, str] = field(default_factory=dict)
    origin: str | None = None

    @property
    def world(self) -> str | None:
        """The built-in data set that the rows are from, prepared or not; None for other data."""
        return self.source if self.source.startswith("builtin:") else self.origin

    def user_ids(self) -> list[str]:
        """Seen users: the declared ones, else those of the training rows in order of first appearance."""
        if self.declared_users is not None:
            return list(self.declared_users)
        return list(dict.fromkeys(row.user_id for row in self.train))

    def all_user_ids(self) -> set[str]:
        """Users of any row, and declared ones."""
        splits: tuple[list[Row], ...] = (self.train, self.dev, self.eval_seen, self.eval_unseen)
        return {*self.user_ids(), *(row.user_id for split in splits for row in split)}

    def user_texts(self) -> dict[str, str]:
        """What is known about each user in words; users without a text, or with several, are left out."""
        texts: dict[str, set[str]] = {}
        for row in (*self.train, *self.dev, *self.eval_seen, *self.eval_unseen):
            texts.setdefault(row.user_id, set()).add(row.user_text)
        return {user_id: text for user_id, (text, *others) in texts.items() if text and not others}


@dataclass(frozen=True)
class PreferenceData(JudgedData[PreferenceRow]):
    """Pairs."""


@dataclass(frozen=True)
class LabelledData(JudgedData[LabelledRow]):
    """Single responses with a label."""


def prompt_record(prompt: Prompt) -> str | list[dict[str, str]]:
    """The prompt as it stands in a JSON row."""
    if isinstance(prompt, str):
        return prompt
    return [{"role": message.role, "content": message.content} for message in prompt]


def make_pair_id(prompt: Prompt, first: str, second: str) -> str:
    """Content hash of a pair; the same whichever response was preferred."""
    content = json.dumps([prompt_record(prompt), sorted([first, second])])
    return hashlib.sha256(content.encode("ascii")).hexdigest()[:16]


def pair_content(row: JudgedRow) -> tuple[Prompt, frozenset[str]]:
    """What was judged, whoever did and however."""
    return row.prompt, frozenset(row.responses)


def record_from_row(row: JudgedRow | ResponseRow) -> dict[str, Any]:
    """The JSON row of a row; an empty user_text is left out."""
    record = {name: getattr(row, name) for name in row.__dataclass_fields__}
    record["prompt"] = prompt_record(row.prompt)
    if not row.user_text:
        del record["user_text"]
    return record


def preference_row(record: dict[str, Any], where: str) -> PreferenceRow:
    """Read a JSON row: prlhf's own, or TRL's explicit preference format (plain or conversational) plus `user_id`.

    Without `pair_id` the pair is named by its content.

    Args:
        where: file and line, for messages.
    Raises: DataError: a field is missing or has the wrong type.
    """
    prompt = _prompt(_required(record, "prompt", where), where)
    chosen = _response(record, "chosen", where)
    rejected = _response(record, "rejected", where)
    return PreferenceRow(
        pair_id=_text(record, "pair_id", where) or make_pair_id(prompt, chosen, rejected),
        user_id=_user_id(record, where),
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        user_text=_text(record, "user_text", where),
    )


def labelled_row(record: dict[str, Any], where: str) -> LabelledRow:
    """Read an unpaired JSON row: {"user_id", "prompt", "response", "label"}, TRL's unpaired format plus `user_id`.

    TRL's name for the response, "completion", is taken too.

    Raises: DataError: a field is missing or has the wrong type.
    """
    label = _required(record, "label", where)
    if not isinstance(label, bool):
        raise DataError(f"{where}: label is {quote(label)}, expected true or false")
    return LabelledRow(
        user_id=_user_id(record, where),
        prompt=_prompt(_required(record, "prompt", where), where),
        response=_response(record, "response" if "response" in record else "completion", where),
        label=label,
        user_text=_text(record, "user_text", where),
    )


def is_labelled(record: Mapping[str, Any]) -> bool:
    """Whether a JSON row is an unpaired one."""
    return "label" in record and "chosen" not in record


def response_row(record: dict[str, Any], where: str) -> ResponseRow:
    """Read a row for sft: {"text"}, {"prompt", "response"}, or a preference row, of which it takes the chosen response.

    Raises: DataError: none of the three, a judgment by label, which may be of a bad response, or a field of the wrong
        type.
    """
    user_text = _text(record, "user_text", where)
    if "text" in record:
        return ResponseRow(prompt="", response=_response(record, "text", where), user_text=user_text)
    if is_labelled(record):
        raise DataError(f"{where}: has a label, and every response is taken for a good one here; train on judgments "
                        "with method dpo or pdpo and loss.kind kto, or, for sft, keep the good ones without label")
    for name in ("response", "chosen"):
        if name in record:
            prompt = _prompt(_required(record, "prompt", where), where)
            return ResponseRow(prompt=prompt, response=_response(record, name, where), user_text=user_text)
    raise DataError(f'{where}: has the keys {quote(sorted(record))}; expected {{"text"}}, {{"prompt", "response"}} '
                    "or a preference row")


def _required(record: dict[str, Any], name: str, where: str) -> Any:
    if name not in record:
        remedy = did_you_mean(name, record) or "; add it to the row"
        raise DataError(f"{where}: no {name!r} among the keys {quote(sorted(record))}{remedy}")
    if record[name] is None:
        raise DataError(f"{where}: {name} is null; write its value, or remove the line")
    return record[name]


def _text(record: dict[str, Any], name: str, where: str) -> str:
    value = record.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} is {quote(value)}, expected a string; write it in quotes")
    return value


def _user_id(record: dict[str, Any], where: str) -> str:
    _required(record, "user_id", where)
    user_id = _text(record, "user_id", where)
    if not user_id:
        raise DataError(f"{where}: user_id is empty; every row names the user who judged it")
    check_user_id(user_id, where)
    return user_id


def _prompt(value: Any, where: str) -> Prompt:
    if isinstance(value, str):
        return value
    return _messages(value, "prompt", where)


def _messages(value: Any, name: str, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise DataError(f'{where}: {name} is {quote(value)}, expected a string or a list of {{"role", "content"}}')
    for turn in value:
        if not isinstance(turn, dict) or any(not isinstance(turn.get(key), str) for key in ("role", "content")):
            raise DataError(f'{where}: {name} holds {quote(turn)}, expected {{"role": string, "content": string}}')
    return tuple(Message(role=turn["role"], content=turn["content"]) for turn in value)


def _response(record: dict[str, Any], name: str, where: str) -> str:
    value = _required(record, name, where)
    if isinstance(value, str):
        return value
    turns = _messages(value, name, where)
    if len(turns) != 1 or turns[0].role != "assistant":
        roles = [turn.role for turn in turns]
        raise DataError(f"{where}: {name} has the turns {quote(roles)}, expected one assistant turn; "
                        "move the others to prompt")
    return turns[0].content
