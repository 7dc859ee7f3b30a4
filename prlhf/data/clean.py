"""Which preference rows cannot be used, and which contradict each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from prlhf.data.quoting import quote
from prlhf.data.records import JudgedRow, PreferenceRow, Row, pair_content

MAX_MESSAGES = 10


def unusable_reason(row: JudgedRow) -> str | None:
    """Why nothing can be learned from a row, or None."""
    if not (row.prompt.strip() if isinstance(row.prompt, str) else row.prompt):
        return "empty_prompt"
    if not all(response.strip() for response in row.responses):
        return "empty_response"
    if len(set(row.responses)) < len(row.responses):
        return "equal_responses"
    return None


def judgment_content(row: JudgedRow) -> tuple[object, ...]:
    """Who judged what, and how: equal for repetitions of a row, not for a user's opposite judgments."""
    return row.user_id, row.prompt, row.responses, getattr(row, "label", None)


def clean_rows(rows: Sequence[Row]) -> tuple[list[Row], dict[str, int]]:
    """Leave out unusable rows and repetitions of a row: same user, prompt, responses and judgment.

    A user who judged the same thing both ways contradicts himself; both rows stay.

    Returns: (rows that stay, reason -> number of rows left out).
    """
    kept: list[Row] = []
    dropped: Counter[str] = Counter()
    seen: set[object] = set()
    for row in rows:
        judgment = judgment_content(row)
        reason = unusable_reason(row) or ("duplicate" if judgment in seen else None)
        if reason:
            dropped[reason] += 1
        else:
            seen.add(judgment)
            kept.append(row)
    return kept, dict(dropped)


def pair_id_conflicts(located: Iterable[tuple[str, PreferenceRow]]) -> list[str]:
    """One line for each use of a pair_id for another prompt or other responses than before.

    Args:
        located: ("file:line", row).
    """
    first: dict[str, tuple[str, object]] = {}
    conflicts = []
    for where, row in located:
        first_where, content = first.setdefault(row.pair_id, (where, pair_content(row)))
        if content != pair_content(row):
            conflicts.append(f"{where}: pair_id {quote(row.pair_id)} names another prompt or other responses than at "
                             f"{first_where}; give different pairs different ids")
    return _at_most(conflicts)


def shared_pairs(
    first: Iterable[tuple[str, JudgedRow]], second: Iterable[tuple[str, JudgedRow]]
) -> list[str]:
    """One line for each row of the second part whose pair, or labelled response, the first part holds."""
    known: dict[object, str] = {}
    for where, row in first:
        known.setdefault(pair_content(row), where)
    shared = [
        f"{where}: the same prompt and responses as {known[pair_content(row)]}; they belong to one split only"
        for where, row in second
        if pair_content(row) in known
    ]
    return _at_most(shared)


def _at_most(messages: list[str]) -> list[str]:
    if len(messages) <= MAX_MESSAGES:
        return messages
    return [*messages[:MAX_MESSAGES], f"and {len(messages) - MAX_MESSAGES} more like these"]
