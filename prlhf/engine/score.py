"""`prlhf score`: what a reward model says of each response of a file, as each of several users."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prlhf.config import Config, load_config
from prlhf.data.jsonl import read_jsonl
from prlhf.data.records import ResponseRow, response_row
from prlhf.data.tokenize import tokenize_responses
from prlhf.engine.build import make_autocast, pick_device, tokenize_limits
from prlhf.engine.checkpoint import CONFIG
from prlhf.errors import DataError
from prlhf.evaluation.samples import known_users, user_contexts, user_indices, user_text
from prlhf.evaluation.scoring import TokenSequence, score_sequences
from prlhf.models.assemble import load_reward_model
from prlhf.models.backbone import pad_token_id
from prlhf.models.reward import PersonalizedRewardModel
from prlhf.models.run_folder import resolve_checkpoint

RESPONSE_KEYS = ("response", "chosen", "rejected")


def score_file(checkpoint: Path, path: Path, users: str | Sequence[str] | None) -> list[dict[str, Any]]:
    """Scores of every response of a file for every user.

    Args:
        path: JSON lines with "prompt" and "response", or "chosen" and "rejected", or all of them. Where training had
            users' texts in prompts, a line without "user_text" stands behind each known user's own.
        users: as `known_users` takes them: known users or "generic"; None: all that the model knows.
    Returns: for each line and user {"line", "pair_id" if there is one, "user_id", and a score for each response under
        its own key}. Scores of one user and prompt compare; their level means nothing.
    Raises: CheckpointError: not a reward model. DataError: an unknown user, or a line without a response or too long.
    """
    directory = resolve_checkpoint(checkpoint)
    config = load_config(directory / CONFIG)
    device = pick_device(config.train.device)
    model = load_reward_model(directory, device=str(device), rows_on_demand=True)
    users = known_users(model, users)
    indices = user_indices(model, users)
    lines = _read_lines(path)
    sequences = _sequences(model, config, path, lines, [user_text(model, user) for user in users])
    responses = [row for _, _, rows in lines for row in rows.values()]
    prompts = [row.prompt for row in responses]
    of_line = [[other.response for other in rows.values()] for _, _, rows in lines for _ in rows]
    asked = [(user, prompt) for user in users for prompt in prompts]
    with make_autocast(config.train.precision, device)():
        values = score_sequences(
            model,
            sequences,
            None if indices is None else [index for index in indices for _ in prompts],
            user_contexts(model, asked, of_line * len(users)),
            pad_id=pad_token_id(model.tokenizer),
            microbatch_tokens=config.train.microbatch_tokens,
        ).values
    scores = dict(zip(users, values.view(len(users), -1).tolist(), strict=True))
    records = []
    first = 0
    for number, given, rows in lines:
        for user in users:
            own = dict(zip(rows, scores[user][first : first + len(rows)], strict=True))
            records.append({"line": number, **given, "user_id": user, **own})
        first += len(rows)
    return records


def _sequences(
    model: PersonalizedRewardModel,
    config: Config,
    path: Path,
    lines: Sequence[tuple[int, dict[str, str], dict[str, ResponseRow]]],
    texts: Sequence[str],
) -> list[TokenSequence]:
    """Every response of the lines as ids for each of some users, whose texts stand in for those that lines lack.

    Raises: DataError: a response that is empty or too long.
    """
    places = [(number, key) for number, _, rows in lines for key in rows]
    limits = tokenize_limits(config, model)
    of_text: dict[str, list[TokenSequence]] = {}
    wrong = []
    for text in dict.fromkeys(texts):
        responses = [replace(row, user_text=row.user_text or text) for _, _, rows in lines for row in rows.values()]
        tokenized = tokenize_responses(responses, model.tokenizer, **limits)
        whole = {row.row for row in tokenized.rows if row.response_ids[-1] == model.tokenizer.eos_token_id}
        wrong += [
            f"{path}:{number}: {key} is empty, or with its prompt longer than data.max_tokens {limits['max_tokens']}; "
            "shorten or remove it"
            for place, (number, key) in enumerate(places)
            if place not in whole
        ]
        of_text[text] = [TokenSequence(row.prompt_ids, row.response_ids) for row in tokenized.rows]
    if wrong:
        raise DataError(*dict.fromkeys(wrong))
    return [sequence for text in texts for sequence in of_text[text]]


def _read_lines(path: Path) -> list[tuple[int, dict[str, str], dict[str, ResponseRow]]]:
    """Of each line its number, its pair_id, and its responses by key."""
    lines = []
    for number, record in read_jsonl(path):
        where = f"{path}:{number}"
        keys = [key for key in RESPONSE_KEYS if key in record]
        if "prompt" not in record or not keys:
            raise DataError(f'{where}: expected "prompt" and "response", or "chosen" and "rejected"')
        shared: dict[str, Any] = {key: record[key] for key in ("prompt", "user_text") if key in record}
        rows = {key: response_row({**shared, "response": record[key]}, where) for key in keys}
        given = {"pair_id": record["pair_id"]} if "pair_id" in record else {}
        lines.append((number, given, rows))
    if not lines:
        raise DataError(f"{path}: holds no line to score")
    return lines
