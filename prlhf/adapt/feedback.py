"""What new users said: a file of pairs, thumbs and edits -> rows by user -> judgments as ids."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from prlhf.adapt.margins import Judgment
from prlhf.data.clean import judgment_content, unusable_reason
from prlhf.data.jsonl import read_every_row
from prlhf.data.labelled import pairs_from_labelled
from prlhf.data.quoting import quote
from prlhf.data.records import JudgedRow, LabelledRow, PreferenceRow, is_labelled, labelled_row, preference_row
from prlhf.data.tokenize import tokenize_pairs, tokenize_responses
from prlhf.errors import DataError
from prlhf.models.personalized import PersonalizedModel
from prlhf.models.policy import PersonalizedPolicy

Located = tuple[str, JudgedRow]  # "file:line", and its row
logger = logging.getLogger(__name__)
REASONS = {
    "empty_prompt": "the prompt is empty",
    "empty_response": "a response is empty",
    "equal_responses": "both responses are the same",
    "equal_response_ids": "both responses are the same up to where data.max_tokens cuts them",
    "prompt_too_long": "the prompt is beyond data.max_prompt_tokens and cannot be cut",
    "no_room_for_response": "the prompt leaves no room for a response within data.max_tokens",
}
LONE_THUMB = (
    "a reward model compares answers to one prompt, and a response has a thumb alone; give a pair, or a thumb for "
    "another response to its prompt"
)


def read_feedback(path: Path, user_id: str | None) -> dict[str, list[Located]]:
    """Rows of each user of a file, in order of first appearance; a judgment that is said again counts once, aloud.

    A row is a pair {"prompt", "chosen", "rejected"}, an answered question of --ask {"prompt", "responses": [a, b],
    "choice": 0 or 1}, a thumb {"prompt", "response", "label"}, or an edit {"prompt", "response", "edited"}, which
    prefers the edited response.

    Args:
        user_id: whose rows those without "user_id" are; None where every row names its user.
    Raises: DataError: every bad line, a row of another user than `user_id`, or no row at all.
    """

    def parse(record: dict[str, Any], where: str) -> JudgedRow:
        """A row of the file's user."""
        if user_id is None and "user_id" not in record:
            raise DataError(f"{where}: no user_id; give --user ID, or name the user in every line")
        row = _row({"user_id": user_id, **record}, where)
        if user_id is not None and row.user_id != user_id:
            raise DataError(f"{where}: a row of user {quote(row.user_id)}; leave --user out to add all users of the "
                            "file")
        return row

    rows = read_every_row(path, parse)
    if not rows:
        raise DataError(f"{path}: holds no judgment; write pairs, thumbs or edits, one a line")
    kept = _without_repetitions(rows)
    if len(kept) < len(rows):
        logger.warning("%s: left out of %d rows: %d that say again what an earlier one says", path, len(rows),
                       len(rows) - len(kept))
    users: dict[str, list[Located]] = {}
    for where, row in kept:
        users.setdefault(row.user_id, []).append((where, row))
    return users


def _without_repetitions(rows: Iterable[Located]) -> list[Located]:
    """The first of each judgment, or the last that says something else about its user."""
    kept: dict[object, Located] = {}
    for where, row in rows:
        content = judgment_content(row)
        if content in kept and row.user_text in ("", kept[content][1].user_text):
            continue
        kept.pop(content, None)
        kept[content] = (where, row)
    return list(kept.values())


def num_repeated(first: Iterable[Located], second: Iterable[Located]) -> int:
    """How many rows of the second part say what one of the first says."""
    said = {judgment_content(row) for _, row in first}
    return sum(judgment_content(row) in said for _, row in second)


def _row(record: dict[str, Any], where: str) -> JudgedRow:
    if "edited" in record:  # whatever thumb comes with it
        if "response" not in record:
            raise DataError(f"{where}: edited, and no response that was edited; add it to the row")
        if not isinstance(record["edited"], str | list):
            raise DataError(f"{where}: edited is {quote(record['edited'])}, expected a string; write it in quotes")
        if record["edited"] == record["response"]:
            raise DataError(f"{where}: the edited response is the response; remove the row")
        return preference_row({**record, "chosen": record["edited"], "rejected": record["response"]}, where)
    if "responses" in record:
        return _answer(record, where)
    return labelled_row(record, where) if is_labelled(record) else preference_row(record, where)


def _answer(record: dict[str, Any], where: str) -> PreferenceRow:
    responses, choice = record["responses"], record.get("choice")
    if not isinstance(responses, list) or len(responses) != 2:
        raise DataError(f"{where}: responses is {quote(responses)}, expected a list of two")
    if not all(isinstance(response, str | list) for response in responses):
        raise DataError(f"{where}: responses is {quote(responses)}, expected two texts; write each in quotes")
    if type(choice) is not int or choice not in (0, 1):
        raise DataError(f"{where}: choice is {quote(choice)}; write which of the two responses is the better one, "
                        "0 for the first, 1 for the second")
    return preference_row({**record, "chosen": responses[choice], "rejected": responses[1 - choice]}, where)


def feedback_pairs(rows: Sequence[JudgedRow]) -> list[PreferenceRow]:
    """The pairs among a user's rows: as they are, and each liked response against each disliked one to a prompt.

    A pair that thumbs say again is there once.
    """
    labelled = [row for row in rows if isinstance(row, LabelledRow)]
    pairs = [row for row in rows if isinstance(row, PreferenceRow)] + pairs_from_labelled(labelled)
    distinct: dict[object, PreferenceRow] = {}
    for pair in pairs:
        distinct.setdefault(judgment_content(pair), pair)
    return list(distinct.values())


def check_usable(model: PersonalizedModel, users: Iterable[Sequence[Located]], **limits: Any) -> None:
    """Refuse rows that a model cannot use: of one that reads pairs those that say nothing, else those of which no
    judgment can be made.

    Args:
        users: the rows of each.
        limits: of `make_judgments`.
    Raises: DataError: a line for each row.
    """
    wrong = []
    for located in users:
        lone = _lone_thumbs([row for _, row in located])
        for where, row in located:
            if model.contexts is not None:
                reason = unusable_reason(row) if model.contexts.kind == "history" else None
            elif isinstance(row, LabelledRow) and row in lone and not isinstance(model, PersonalizedPolicy):
                wrong.append(f"{where}: {LONE_THUMB}")
                continue
            else:
                reason = next(iter(_tokenize(model, [row], **limits)[1]), None)
            if reason is not None:
                wrong.append(f"{where}: cannot be used, as {REASONS[reason]}; mend or remove the row")
    if wrong:
        raise DataError(*wrong)


def make_judgments(
    model: PersonalizedModel,
    rows: Sequence[JudgedRow],
    *,
    max_tokens: int,
    max_prompt_tokens: int,
    with_user_text: bool = True,
) -> list[Judgment]:
    """A user's rows as ids; thumbs that no pair holds stand alone.

    Args:
        max_tokens: for user tokens, prompt and response together.
        with_user_text: whether user texts stand in front of prompts.
    Raises: DataError: a row that cannot be used, or a thumb alone for a reward model, whose level means nothing.
    """
    pairs, thumbs = feedback_pairs(rows), _lone_thumbs(rows)
    if thumbs and not isinstance(model, PersonalizedPolicy):
        raise DataError(f"user {quote(thumbs[0].user_id)}: {LONE_THUMB}")
    judgments, dropped = _tokenize(
        model, [*pairs, *thumbs], max_tokens=max_tokens, max_prompt_tokens=max_prompt_tokens,
        with_user_text=with_user_text,
    )
    if dropped:
        raise DataError(f"user {quote(rows[0].user_id)}: rows that cannot be used ({dropped}); mend or remove them")
    return judgments


def _lone_thumbs(rows: Sequence[JudgedRow]) -> list[LabelledRow]:
    """Thumbs whose response is in no pair."""
    compared = {(pair.prompt, response) for pair in feedback_pairs(rows) for response in pair.responses}
    return [row for row in rows if isinstance(row, LabelledRow) and (row.prompt, row.response) not in compared]


def _tokenize(
    model: PersonalizedModel, rows: Sequence[JudgedRow], **limits: Any
) -> tuple[list[Judgment], dict[str, int]]:
    """Judgments of pairs and then of thumbs, and reason -> number of the rows that give none."""
    limits["num_user_tokens"] = model.soft_prompt.num_user_tokens
    thumbs = [row for row in rows if isinstance(row, LabelledRow)]
    pairs = [row for row in rows if isinstance(row, PreferenceRow)]
    of_pairs = tokenize_pairs(pairs, model.tokenizer, None, **limits)
    of_thumbs = tokenize_responses(thumbs, model.tokenizer, **limits)
    judgments = [
        *(Judgment(row.prompt_ids, row.responses) for row in of_pairs.rows),
        *(Judgment(row.prompt_ids, (row.response_ids,), thumbs[row.row].label) for row in of_thumbs.rows),
    ]
    return judgments, {**of_pairs.dropped, **of_thumbs.dropped}
