"""Generations of a policy for every user, and what a judge and the frozen reference say of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prlhf.data.context import NO_CONTEXT, Context
from prlhf.data.records import Prompt, prompt_record
from prlhf.data.tokenize import TokenizedResponse
from prlhf.data.user_index import ALL, GENERIC, GENERIC_USER_ID, UserIndex
from prlhf.errors import DataError
from prlhf.evaluation.judges import Judge, RuleJudge, repeated_4gram_share
from prlhf.evaluation.scoring import TokenSequence, score_sequences
from prlhf.generation import SamplingOptions, generate
from prlhf.models.personalized import PersonalizedModel
from prlhf.models.policy import PersonalizedPolicy

REFERENCE_SEED_OFFSET = 1


@dataclass(frozen=True)
class Sample:
    """One answer; `user_id` is whom it is judged for (and written for, if the policy has users).

    Args:
        score: how well it serves the user, as a judge says; None without one.
    """

    user_id: str
    prompt: Prompt
    response: str
    nll_per_token: float
    num_tokens: int
    score: float | None = None

    def record(self) -> dict[str, Any]:
        """As a JSON row; an empty answer has no NLL, one that nobody judged no score."""
        nll = None if np.isnan(self.nll_per_token) else self.nll_per_token
        record = {**dataclasses.asdict(self), "prompt": prompt_record(self.prompt), "nll_per_token": nll}
        if self.score is None:
            del record["score"]
        return record


def sample_answers(
    policy: PersonalizedPolicy,
    prompts: Sequence[Prompt],
    users: Sequence[str],
    *,
    options: SamplingOptions,
    as_reference: bool,
    max_prompt_tokens: int,
    batch_rows: int,
    score: Callable[..., list[Sample]],
    user_texts: Mapping[str, str] | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> list[Sample]:
    """Every user's answer to every prompt; from the reference when `as_reference`, which knows no user but reads texts.

    Args:
        user_texts: what stands in front of a user's prompts; nothing for users who are not in it.
    """
    pairs = [(user, prompt) for user in users for prompt in prompts]
    settings: dict[str, Any] = {"max_prompt_tokens": max_prompt_tokens, "batch_rows": batch_rows, "on_batch": on_batch}
    settings["user_texts"] = [(user_texts or {}).get(user, "") for user, _ in pairs]
    texts = [prompt for _, prompt in pairs]
    if as_reference:
        options = dataclasses.replace(options, seed=options.seed + REFERENCE_SEED_OFFSET)
        with policy.reference.active() as frozen:
            answers = generate(frozen, texts, None, options=options, **settings)
    else:
        answers = generate(
            policy,
            texts,
            user_indices(policy, [user for user, _ in pairs]),
            contexts=user_contexts(policy, pairs),
            options=options,
            **settings,
        )
    return score([(user, prompt, answer) for (user, prompt), answer in zip(pairs, answers, strict=True)])


def known_users(model: PersonalizedModel, asked: str | Sequence[str] | None) -> list[str]:
    """Ids to answer, each once: those asked for, else all that the model knows, else "generic".

    Args:
        asked: ids; None: all. One text, as on the command line, is "all", a known id, or several with commas between.
    Raises: DataError: each id that is neither known nor "generic".
    """
    known = model.users if model.user_encoder is not None and model.users is not None else UserIndex(())
    if asked is None or asked == ALL:
        return list(known.user_ids) or [GENERIC]
    if isinstance(asked, str):
        asked = [asked] if asked in known else asked.split(",")
    messages = []
    for user in asked:
        if user != GENERIC and user not in known:
            try:
                known.index(user)
            except DataError as error:
                messages += error.messages
    if messages:
        raise DataError(*(f"{message}; give known users, all or {GENERIC}" for message in messages))
    return list(dict.fromkeys(asked))


def user_indices(model: PersonalizedModel, users: Sequence[str]) -> list[int] | None:
    """Row indices of user ids; "generic" is 0; None for a model without users."""
    if model.user_encoder is None or model.users is None:
        return None
    return [GENERIC_USER_ID if user == GENERIC else model.users.index(user) for user in users]


def user_contexts(
    model: PersonalizedModel, pairs: Sequence[tuple[str, Prompt]], responses: Sequence[Sequence[str]] | None = None
) -> list[Context] | None:
    """What an encoder reads of each (user, prompt), nothing for "generic"; None for other models.

    Args:
        responses: to each prompt, if some are to be scored; no context holds one of them, or the prompt.
    """
    if model.contexts is None:
        return None
    asked = [()] * len(pairs) if responses is None else responses
    return [
        NO_CONTEXT if user == GENERIC else model.contexts.of_user(user, prompt, texts)
        for (user, prompt), texts in zip(pairs, asked, strict=True)
    ]


def user_text(model: PersonalizedModel, user: str) -> str:
    """What stands in front of a user's prompts, as in training; nothing for "generic"."""
    return "" if user == GENERIC else model.user_texts.get(user, "")


def about_users(
    model: PersonalizedModel, pairs: Sequence[tuple[str, Prompt]], texts: Sequence[str]
) -> dict[str, Any]:
    """What `generate` is told of (user, prompt) pairs.

    Args:
        texts: one for each pair, for the encoder that reads texts, else before the prompt; "": what the checkpoint
            keeps of the user.
    """
    contexts = user_contexts(model, pairs)
    before = [text or user_text(model, user) for text, (user, _) in zip(texts, pairs, strict=True)]
    if contexts is not None and model.contexts is not None and model.contexts.kind == "text":
        before = ["" if text else kept for text, kept in zip(texts, before, strict=True)]
        contexts = [
            model.contexts.read_text(text) if text else own for text, own in zip(texts, contexts, strict=True)
        ]
    return {"contexts": contexts, "user_texts": before}


def score_under_reference(
    policy: PersonalizedPolicy,
    answers: Sequence[tuple[str, Prompt, str]],
    tokenize: Callable[[Sequence[tuple[str, Prompt, str]]], list[TokenizedResponse]],
    *,
    pad_id: int,
    microbatch_tokens: int,
    on_batch: Callable[[], None] = lambda: None,
) -> list[Sample]:
    """NLL per token (EOS included) of each answer under the frozen reference; NaN for an empty answer."""
    tokenized = tokenize(answers)
    nll = np.full(len(answers), np.nan)
    tokens = np.zeros(len(answers), dtype=np.int64)
    with policy.reference.active() as frozen:
        scores = score_sequences(
            frozen,
            [TokenSequence(row.prompt_ids, row.response_ids) for row in tokenized],
            None,
            pad_id=pad_id,
            microbatch_tokens=microbatch_tokens,
            on_batch=on_batch,
        )
    places = np.array([row.row for row in tokenized], dtype=np.int64)
    nll[places] = (-scores.values / scores.tokens).numpy()
    tokens[places] = scores.tokens.numpy()
    return [
        Sample(user, prompt, answer, float(nll[i]), int(tokens[i])) for i, (user, prompt, answer) in enumerate(answers)
    ]


def judge_generations(samples: Mapping[str, list[Sample]], judge: Judge, *, temperature: float) -> dict[str, Any]:
    """What a judge and the reference say of the answers of "policy" and "reference".

    Returns: `samples` with the scores, and of `eval/final.json` `win_rate`, `text` and `on_side` (None where an answer
        is on no side by itself).
    """
    scored = {
        name: [dataclasses.replace(s, score=judge.serves(s.response, s.user_id)) for s in samples[name]]
        for name in ("policy", "reference")
    }
    judged = {name: judge_samples(group, judge) for name, group in scored.items()}
    on_side = None
    if isinstance(judge, RuleJudge):
        on_side = {user: {name: judged[name][user]["on_side"] for name in judged} for user in judged["policy"]}
    return {
        "samples": {**samples, **scored},
        "win_rate": win_rates(scored["policy"], scored["reference"], judge, opponent="reference"),
        "on_side": on_side,
        "text": {
            "temperature": temperature,
            **{name: {**text_quality(scored[name], judge), "per_user": judged[name]} for name in scored},
        },
    }


def judge_samples(samples: Sequence[Sample], judge: Judge) -> dict[str, dict[str, Any]]:
    """By user: well-formed share, repeated 4-grams, words, NLL per token, and by the rule judge `on_side`.

    That is the share on the user's side; of users with a taste on several axes the mean share of the axes.
    """
    by_user: dict[str, list[Sample]] = {}
    for sample in samples:
        by_user.setdefault(sample.user_id, []).append(sample)
    figures = {user: text_quality(group, judge) for user, group in by_user.items()}
    if isinstance(judge, RuleJudge):
        for user, group in by_user.items():
            figures[user]["on_side"] = float(np.mean([judge.serves(s.response, user) for s in group]))
    return figures


def text_quality(samples: Sequence[Sample], judge: Judge) -> dict[str, Any]:
    """Whether generations are still text; the rule judge alone knows what is well-formed."""
    nll = np.array([sample.nll_per_token for sample in samples])
    well_formed = None
    if isinstance(judge, RuleJudge):
        well_formed = float(np.mean([judge.well_formed(sample.response) for sample in samples]))
    return {
        "well_formed": well_formed,
        "repeated_4grams": repeated_4gram_share([sample.response for sample in samples]),
        "words": _mean_words(samples),
        "nll_per_token": float(np.nanmean(nll)) if np.isfinite(nll).any() else None,
        "empty": int(np.isnan(nll).sum()),
        "num_samples": len(samples),
    }


def words_per_user(samples: Mapping[str, Sequence[Sample]]) -> dict[str, Any]:
    """Mean number of words of an answer: of each user's, the generic user's (None without users), the reference's.

    Args:
        samples: answers by who gave them: "policy", "reference", perhaps "generic".
    """
    by_user: dict[str, list[Sample]] = {}
    for sample in samples["policy"]:
        by_user.setdefault(sample.user_id, []).append(sample)
    return {
        "per_user": {user: _mean_words(group) for user, group in by_user.items()},
        "generic": _mean_words(samples[GENERIC]) if GENERIC in samples else None,
        "reference": _mean_words(samples["reference"]),
    }


def _mean_words(samples: Sequence[Sample]) -> float:
    return float(np.mean([len(sample.response.split()) for sample in samples]))


def win_rates(
    samples: Sequence[Sample], opponents: Sequence[Sample], judge: Judge, *, opponent: str
) -> dict[str, Any]:
    """Wins, ties and losses, answer by answer to the same prompt for the same user.

    A win: the judge finds the user served better. `mean` counts a tie as half a win.
    """
    if [(s.user_id, s.prompt) for s in samples] != [(s.user_id, s.prompt) for s in opponents]:
        raise ValueError("win_rates: the two lists answer different prompts or users; sample them with equal settings")
    outcomes = [
        (ours.user_id, judge.prefers(ours.response, theirs.response, ours.user_id))
        for ours, theirs in zip(samples, opponents, strict=True)
    ]
    return count_outcomes(outcomes, judge=judge.name, opponent=opponent)


def count_outcomes(outcomes: Iterable[tuple[str, int]], *, judge: str, opponent: str) -> dict[str, Any]:
    """The figures of `win_rates` from (user, 1 for a win, 0 for a tie, -1 for a loss)."""
    counts: dict[str, list[int]] = {}
    for user, outcome in outcomes:
        counts.setdefault(user, [0, 0, 0])[1 - outcome] += 1
    per_user = {user: _rate(*outcome) for user, outcome in counts.items()}
    total = [sum(column) for column in zip(*counts.values(), strict=True)]
    return {"judge": judge, "opponent": opponent, "rule": "a tie is half a win", **_rate(*total), "per_user": per_user}


def _rate(wins: int, ties: int, losses: int) -> dict[str, Any]:
    return {"wins": wins, "ties": ties, "losses": losses, "mean": (wins + ties / 2) / max(1, wins + ties + losses)}
