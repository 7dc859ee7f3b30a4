"""Reader of PRISM: people's dialogues with language models, and what they said about themselves.

Source: Kirk et al. 2024, arXiv:2404.16019; huggingface.co/datasets/HannahRoseKirk/prism-alignment. Expected in the raw
folder: `survey.jsonl`, a person a line, and `conversations.jsonl`, a dialogue a line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from prlhf.data.clean import clean_rows
from prlhf.data.jsonl import read_rows
from prlhf.data.prepared import PreparedSummary, check_writable, write_prepared
from prlhf.data.quoting import did_you_mean, quote
from prlhf.data.records import Message, PreferenceData, PreferenceRow, make_pair_id, pair_content
from prlhf.data.splits import DEV_SHARE, draw
from prlhf.errors import DataError

NUM_TOP_PREFERENCES = 3
# What the user text says after the preferences: field of the survey -> its name there.
ABOUT = {
    "self_description": "self-description",
    "age": "age",
    "gender": "gender",
    "education": "education",
    "employment_status": "employment",
    "marital_status": "marital status",
    "english_proficiency": "English proficiency",
}


@dataclass(frozen=True)
class Dialogue:
    """One dialogue of a user: a row for each answer that was not chosen, in the order of the turns."""

    user_id: str
    rows: list[PreferenceRow]


def prepare_prism(
    raw: Path, out: Path, *, unseen_users: float, eval_prompts: float, seed: int, force: bool = False
) -> PreparedSummary:
    """Read the release and write a prepared directory, with the user texts in users.json.

    Args:
        unseen_users: share of the users held out; users with a single dialogue are held out as well.
        eval_prompts: share of each seen user's dialogues held out.
    Raises: DataError: a file is missing or malformed, or `out` is not empty.
    """
    check_writable(out, force=force)
    dialogues, left_out = read_prism(raw)
    if not dialogues:
        raise DataError(f"{raw}: no dialogue with a chosen and another answer; use files of one release")
    data, num_shared = split_dialogues(
        dialogues, source=str(raw), seed=seed, unseen_users=unseen_users, eval_dialogues=eval_prompts
    )
    return write_prepared(out, data, force=force, left_out={**left_out, "pair_of_another_split": num_shared})


def read_prism(raw: Path) -> tuple[list[Dialogue], dict[str, int]]:
    """Dialogues of the people with a completed one, person by person in the order of the survey.

    A row's prompt is the turn's question behind the earlier turns with the answers that were chosen. A dialogue ends
    before a turn in which none was.

    Returns: (dialogues with at least one row, reason -> rows or turns left out).
    Raises: DataError: a file is missing or malformed, or a dialogue's user is not in the survey.
    """
    people = dict(person for _, person in read_rows(raw / "survey.jsonl", _person))
    left_out: Counter[str] = Counter()
    by_user: dict[str, list[Dialogue]] = {user_id: [] for user_id in people}
    for where, (user_id, turns) in read_rows(raw / "conversations.jsonl", _conversation):
        if user_id not in people:
            raise DataError(f"{where}: user {quote(user_id)} is not in survey.jsonl; use files of one release")
        user_text = people[user_id]
        if user_text is None:
            left_out["turn_of_user_without_completed_dialogue"] += len(turns)
            continue
        chosen = list(takewhile(lambda turn: turn.chosen, turns))
        left_out["turn_without_choice_or_behind_one"] += len(turns) - len(chosen)
        rows, dropped = clean_rows(list(_rows(user_id, user_text, chosen)))
        left_out.update(dropped)
        if rows:
            by_user[user_id].append(Dialogue(user_id, rows))
    return [dialogue for dialogues in by_user.values() for dialogue in dialogues], +left_out


def split_dialogues(
    dialogues: Sequence[Dialogue], *, source: str, seed: int, unseen_users: float, eval_dialogues: float
) -> tuple[PreferenceData, int]:
    """Split by user and by dialogue; numpy's legacy generator draws in the order of the authors of P-RLHF (seed 123).

    Evaluation takes its share of each seen user's dialogues, rounded up; who is left without a training dialogue counts
    as unseen. `dev` is 5% of the training dialogues, of users who keep another one. A pair that two parts hold stays in
    evaluation, else in dev.

    Returns: (data, number of rows left out because another part has their pair).
    Raises: DataError: a share out of range, or no training row left.
    """
    for name, share in (("unseen_users", unseen_users), ("eval_prompts", eval_dialogues)):
        if not 0 <= share < 1:
            raise DataError(f"{name} is {share}, expected a share from 0 to below 1")
    own: dict[str, list[Dialogue]] = {}
    for dialogue in dialogues:
        own.setdefault(dialogue.user_id, []).append(dialogue)
    train, eval_seen = _draw_training(own, unseen_users, eval_dialogues, seed)
    if not train:
        raise DataError(f"{source}: no training row is left of {len(own)} users; lower unseen_users or eval_prompts")
    spare = [(user_id, position) for user_id in train for position in range(1, len(train[user_id]))]
    dev = draw(spare, DEV_SHARE, seed=[seed, 2])
    parts: dict[str, Any] = {
        "eval_seen": _rows_of(eval_seen),
        "eval_unseen": _rows_of(d for user_id in own if user_id not in train for d in own[user_id]),
        "dev": _rows_of(train[user_id][i] for user_id, i in spare if (user_id, i) in dev),
        "train": _rows_of(d for user_id in train for i, d in enumerate(train[user_id]) if (user_id, i) not in dev),
    }
    total = sum(map(len, parts.values()))
    taken = {pair_content(row) for name in ("eval_seen", "eval_unseen") for row in parts[name]}
    for name in ("dev", "train"):
        parts[name] = [row for row in parts[name] if pair_content(row) not in taken]
        taken.update(pair_content(row) for row in parts[name])
    data = PreferenceData(**parts, source=source, declared_users=tuple(train))
    return data, total - sum(map(len, parts.values()))


def _draw_training(
    own: Mapping[str, list[Dialogue]], unseen_users: float, eval_dialogues: float, seed: int
) -> tuple[dict[str, list[Dialogue]], list[Dialogue]]:
    """Each seen user's training dialogues, and all others of these users."""
    generator = np.random.RandomState(seed)
    train: dict[str, list[Dialogue]] = {}
    held_out: list[Dialogue] = []
    users = list(own)
    order = generator.permutation(len(users))
    for user_id in (users[position] for position in order[: int(len(users) * (1 - unseen_users))]):
        mixed = [own[user_id][position] for position in generator.permutation(len(own[user_id]))]
        count = int(len(mixed) * (1 - eval_dialogues))
        if count:
            train[user_id] = mixed[:count]
            held_out += mixed[count:]
    return train, held_out


def describe_person(person: Mapping[str, Any], where: str) -> str:
    """What a survey row says about a person: the three best-rated traits of an answer, self-description, demographics.

    The authors' code takes the traits that the survey happened to show first (`order_stated_prefs`) for the preferred
    ones; here it is those with the highest rating (`stated_prefs`, 0 to 100), ties in the order of the file.

    Raises: DataError: a field is missing or has the wrong type.
    """
    ratings = person.get("stated_prefs")
    if not isinstance(ratings, dict):
        raise DataError(f"{where}: stated_prefs is {quote(ratings)}, expected an object of ratings")
    rated = {name: value for name, value in ratings.items() if isinstance(value, int | float) and name != "other"}
    top = sorted(rated, key=lambda name: -rated[name])[:NUM_TOP_PREFERENCES]
    about = {name: _optional_text(person, field, where) for field, name in ABOUT.items()}
    parts = {"preferences": ", ".join(top), **about}
    return "; ".join(f"{name}: {value}" for name, value in parts.items() if value)


@dataclass(frozen=True)
class _Turn:
    """A question, the chosen answers (mostly one; a tie has several, equal or not) and the others."""

    question: str
    chosen: list[str]
    rejected: list[str]


def _person(record: dict[str, Any], where: str) -> tuple[str, str | None]:
    """User id and user text; None for a person without a completed dialogue."""
    user_id = _text(record, "user_id", where)
    completed = record.get("num_completed_conversations")
    if not isinstance(completed, int):
        raise DataError(f"{where}: num_completed_conversations is {quote(completed)}, expected a number")
    return user_id, describe_person(record, where) if completed else None


def _conversation(record: dict[str, Any], where: str) -> tuple[str, list[_Turn]]:
    """The user id and the turns in their order."""
    history = record.get("conversation_history")
    if not isinstance(history, list):
        raise DataError(f"{where}: conversation_history is {quote(history)}, expected a list of utterances")
    questions: dict[int, str] = {}
    answers: dict[int, list[tuple[bool, str]]] = {}
    for utterance in history:
        turn, role = (utterance.get(key) if isinstance(utterance, dict) else None for key in ("turn", "role"))
        if not isinstance(turn, int) or role not in ("user", "model"):
            raise DataError(f'{where}: conversation_history holds {quote(utterance)}, expected {{"turn": number, '
                            '"role": "user" or "model", "content", ...}')
        content = _text(utterance, "content", where)
        if role == "user":
            questions[turn] = content
        elif isinstance(utterance.get("if_chosen"), bool):
            answers.setdefault(turn, []).append((utterance["if_chosen"], content))
        else:
            raise DataError(f"{where}: if_chosen is {quote(utterance.get('if_chosen'))}, expected true or false")
    return _text(record, "user_id", where), [
        _Turn(questions[turn], *([text for if_chosen, text in answers.get(turn, []) if if_chosen == want]
                                 for want in (True, False)))
        for turn in sorted(questions)
    ]


def _rows(user_id: str, text: str, turns: Sequence[_Turn]) -> Iterable[PreferenceRow]:
    history: tuple[Message, ...] = ()
    for turn in turns:
        prompt = (*history, Message("user", turn.question))
        chosen = turn.chosen[0]
        for rejected in turn.rejected:
            yield PreferenceRow(make_pair_id(prompt, chosen, rejected), user_id, prompt, chosen, rejected, text)
        history = (*prompt, Message("assistant", chosen))


def _rows_of(dialogues: Iterable[Dialogue]) -> list[PreferenceRow]:
    return [row for dialogue in dialogues for row in dialogue.rows]


def _text(record: Mapping[str, Any], name: str, where: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} is {quote(value)}, expected a string{did_you_mean(name, record)}")
    return value


def _optional_text(record: Mapping[str, Any], name: str, where: str) -> str:
    """"" for null."""
    if name not in record:
        raise DataError(f"{where}: no {name}{did_you_mean(name, record)}; use the original release")
    return "" if record[name] is None else _text(record, name, where).strip()
