"""What new users said: a file of pairs, thumbs and edits -> rows by user -> judgments as ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prlhf.adapt.margins import Judgment
from prlhf.data.jsonl import read_jsonl
from prlhf.data.labelled import pairs_from_labelled
from prlhf.data.quoting import quote
from prlhf.data.records import JudgedRow, LabelledRow, PreferenceRow, is_labelled, labelled_row, preference_row
from prlhf.data.tokenize import tokenize_pairs, tokenize_responses
from prlhf.errors import DataError
from prlhf.models.personalized import PersonalizedModel
from prlhf.models.policy import PersonalizedPolicy


def read_feedback(path: Path, user_id: str | None) -> dict[str, list[JudgedRow]]:
    """Rows of each user of a file, in order of first appearance.

    A row is a pair {"prompt", "chosen", "rejected"}, a thumb {"prompt", "response", "label"}, or an edit
    {"prompt", "response", "edited"}, which prefers the edited response.

    Args:
        user_id: whose rows those without "user_id" are; None where every row names its user.
    Raises: DataError: every bad line, or a row of another user than `user_id`.
    """
    users: dict[str, list[JudgedRow]] = {}
    wrong: list[str] = []
    for number, record in read_jsonl(path):
        where = f"{path}:{number}"
        try:
            row = _row({"user_id": user_id, **record}, where)
        except DataError as error:
            wrong += error.messages
            continue
        if user_id is not None and row.user_id != user_id:
            wrong.append(f"{where}: a row of user {quote(row.user_id)}; leave --user out to add all users of the file")
        users.setdefault(row.user_id, []).append(row)
    if wrong:
        raise DataError(*wrong)
    return users


def _row(record: dict[str, Any], where: str) -> JudgedRow:
    if "edited" in record:  # whatever thumb comes with it
        if "response" not in record:
            raise DataError(f"{where}: edited, and no response that was edited; add it to the row")
        if record["edited"] == record["response"]:
            raise DataError(f"{where}: the edited response is the response; remove the row")
        return preference_row({**record, "chosen": record["edited"], "rejected": record["response"]}, where)
    return labelled_row(record, where) if is_labelled(record) else preference_row(record, where)


def feedback_pairs(rows: Sequence[JudgedRow]) -> list[PreferenceRow]:
    """The pairs among a user's rows: as they are, and each liked response against each disliked one to a prompt."""
    labelled = [row for row in rows if isinstance(row, LabelledRow)]
    return [row for row in rows if isinstance(row, PreferenceRow)] + pairs_from_labelled(labelled)


def make_judgments(
    model: PersonalizedModel,
    rows: Sequence[JudgedRow],
    *,
    max_tokens: int,
    max_prompt_tokens: int,
    with_user_text: bool = True,
    source: str | None = None,
) -> list[Judgment]:
    """A user's rows as ids; thumbs that no pair holds stand alone.

    Args:
        max_tokens: for user tokens, prompt and response together.
        with_user_text: whether user texts stand in front of prompts.
        source: what an error calls the rows; None: their user's.
    Raises: DataError: a row that cannot be used, or a thumb alone for a reward model, whose level means nothing.
    """
    limits: dict[str, Any] = {
        "max_tokens": max_tokens,
        "max_prompt_tokens": max_prompt_tokens,
        "num_user_tokens": model.soft_prompt.num_user_tokens,
        "with_user_text": with_user_text,
    }
    pairs = feedback_pairs(rows)
    compared = {(pair.prompt, response) for pair in pairs for response in pair.responses}
    thumbs = [row for row in rows if isinstance(row, LabelledRow) and (row.prompt, row.response) not in compared]
    if thumbs and not isinstance(model, PersonalizedPolicy):
        raise DataError(f"user {quote(thumbs[0].user_id)}: a reward model compares answers to one prompt, and a "
                        "response has a thumb alone; give a pair, or a thumb for another response to its prompt")
    of_pairs = tokenize_pairs(pairs, model.tokenizer, None, **limits)
    of_thumbs = tokenize_responses(thumbs, model.tokenizer, **limits)
    dropped = {**of_pairs.dropped, **of_thumbs.dropped}
    if dropped:
        where = f"user {quote(rows[0].user_id)}" if source is None else source
        raise DataError(f"{where}: rows that cannot be used ({dropped}); mend or remove them")
    return [
        *(Judgment(row.prompt_ids, row.responses) for row in of_pairs.rows),
        *(Judgment(row.prompt_ids, (row.response_ids,), thumbs[row.row].label) for row in of_thumbs.rows),
    ]
