"""What values a configuration may hold, alone and together; `config.py` imports it, so its types are not named here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from prlhf.data.splits import MAX_SEED
from prlhf.schema import Problem, show

_Limit = tuple[Callable[[Any], bool], str]
_ABOVE_ZERO: _Limit = (lambda value: value > 0, "a number above 0")
_NOT_NEGATIVE: _Limit = (lambda value: value >= 0, "0 or more")
_AT_LEAST_ONE: _Limit = (lambda value: value >= 1, "1 or more")
_SHARE: _Limit = (lambda value: 0 <= value <= 1, "a number from 0 to 1")
_SHARE_BELOW_ONE: _Limit = (lambda value: 0 <= value < 1, "a number from 0 to below 1")
_SEED: _Limit = (lambda value: 0 <= value <= MAX_SEED, f"a number from 0 to {MAX_SEED}")
MAX_THREADS = 1024
PERSONAL_METHODS = ("pdpo", "prm")
USER_KINDS = ("uniform", "individual", "cluster", "low_rank", "text", "history")
SHRUNK_KINDS = ("individual", "low_rank")
MIXED_KINDS = ("cluster", "low_rank", "text", "history")  # with texts: each starts one of several shared soft prompts
REFERENCE_FREE_KINDS = ("simpo", "orpo")
# Settings of the loss that some kinds alone read; with any other kind they keep their defaults.
_KINDS_OF_SETTING = {
    "label_smoothing": ("sigmoid", "robust"),
    "sft_weight": ("sigmoid", "robust", "ipo", "hinge", "simpo"),
    "gamma": ("simpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
}
# Settings that some methods alone read, likewise.
_METHODS_OF_SETTING = {
    "loss.alpha": PERSONAL_METHODS,
    "loss.beta": ("dpo", "pdpo"),
    "loss.label_smoothing": ("dpo", "pdpo"),
    "loss.sft_weight": ("dpo", "pdpo"),
    "model.reference": ("dpo", "pdpo"),
    "eval.generate": ("dpo", "pdpo"),
    "eval.select": ("dpo", "pdpo", "rm", "prm"),
    "train.separate_terms": PERSONAL_METHODS,
}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
NAME_RULE = "up to 100 letters, digits, '.', '_' or '-', no '.' first"

_LIMITS: dict[str, _Limit] = {
    "name": (lambda value: bool(NAME.fullmatch(value)), NAME_RULE),
    "seed": _SEED,
    "data.source": (bool, "builtin:NAME, a directory or a .jsonl file"),
    "data.max_tokens": _AT_LEAST_ONE,
    "data.max_prompt_tokens": _AT_LEAST_ONE,
    "data.eval_prompts": _SHARE_BELOW_ONE,
    "data.unseen_users": _SHARE_BELOW_ONE,
    "data.seed": _SEED,
    "model.backbone": (bool, "builtin:tiny, a path or a hub id"),
    "model.lora.rank": _AT_LEAST_ONE,
    "model.lora.alpha": _ABOVE_ZERO,
    "model.lora.dropout": _SHARE_BELOW_ONE,
    "model.lora.final_scale": (lambda value: 0 < value <= 1, "a number above 0, at most 1"),
    "model.lora.targets": (lambda value: len(value) > 0 and all(value), "auto or a list of layer names"),
    "model.gradient_checkpointing_every": _AT_LEAST_ONE,
    "user.num_user_tokens": _AT_LEAST_ONE,
    "user.num_clusters": (lambda value: value >= 2, "2 or more"),
    "user.rank": _AT_LEAST_ONE,
    "user.encoder_dim": _AT_LEAST_ONE,
    "user.context_tokens": _AT_LEAST_ONE,
    "user.history_pairs": _AT_LEAST_ONE,
    "user.prior": _NOT_NEGATIVE,
    "user.init_range": _ABOVE_ZERO,
    "loss.beta": _ABOVE_ZERO,
    "loss.alpha": _SHARE,
    "loss.label_smoothing": (lambda value: 0 <= value < 0.5, "a number from 0 to below 0.5"),
    "loss.sft_weight": _NOT_NEGATIVE,
    "loss.gamma": _NOT_NEGATIVE,
    "loss.desirable_weight": _NOT_NEGATIVE,
    "loss.undesirable_weight": _NOT_NEGATIVE,
    "train.epochs": _AT_LEAST_ONE,
    "train.max_steps": _AT_LEAST_ONE,
    "train.batch_rows": _AT_LEAST_ONE,
    "train.microbatch_tokens": _AT_LEAST_ONE,
    "train.lr": _NOT_NEGATIVE,
    "train.user_lr": _NOT_NEGATIVE,
    "train.cluster_lr": _NOT_NEGATIVE,
    "train.encoder_lr": _NOT_NEGATIVE,
    "train.weight_decay": _NOT_NEGATIVE,
    "train.warmup_steps": _NOT_NEGATIVE,
    "train.max_grad_norm": _ABOVE_ZERO,
    "train.max_skipped_steps": _AT_LEAST_ONE,
    "train.skip_loss_above": (lambda value: value > 1, "a number above 1"),
    "train.num_threads": (lambda value: 1 <= value <= MAX_THREADS, f"a number from 1 to {MAX_THREADS}"),
    "train.log_every": _AT_LEAST_ONE,
    "eval.every_steps": _NOT_NEGATIVE,
    "eval.rows": _AT_LEAST_ONE,
    "eval.generate": _NOT_NEGATIVE,
    "eval.few_shot": _NOT_NEGATIVE,
    "eval.temperature": _NOT_NEGATIVE,
    "eval.top_p": (lambda value: 0 < value <= 1, "a number above 0, at most 1"),
    "eval.max_new_tokens": _AT_LEAST_ONE,
    "eval.batch_rows": _AT_LEAST_ONE,
    "eval.repetition_penalty": _ABOVE_ZERO,
    "eval.no_repeat_ngram_size": _NOT_NEGATIVE,
    "eval.neutral": (bool, "a file of texts"),
    "checkpoint.every_steps": _NOT_NEGATIVE,
    "checkpoint.keep_last": _AT_LEAST_ONE,
}


def find_problems(config: Any) -> list[Problem]:
    """Values of a `Config` out of range, and settings that contradict each other."""
    return [*_out_of_range(config), *_contradictions(config)]


def _out_of_range(config: Any) -> Iterator[Problem]:
    for key, (holds, expected) in _LIMITS.items():
        value: Any = config
        for name in key.split("."):
            value = getattr(value, name, None)
        if value is not None and not holds(value):
            yield Problem((key,), f"got {show(value)}, expected {expected}")


def _contradictions(config: Any) -> Iterator[Problem]:
    """Settings that are fine alone and not together; the first key is the one to change."""
    data, user, loss = config.data, config.user, config.loss
    if config.method in PERSONAL_METHODS and user.kind == "none":
        text = f"got none with method {config.method}, expected one of {', '.join(USER_KINDS)}"
        yield Problem(("user.kind", "method"), text)
    if config.method not in PERSONAL_METHODS and user.kind != "none":
        yield Problem(("user.kind", "method"), f"got {user.kind} with method {config.method}, expected none")
    if config.method not in ("dpo", "pdpo") and loss.kind != "sigmoid":
        yield Problem(("loss.kind", "method"), f"got {loss.kind} with method {config.method}, expected sigmoid")
    if config.method == "sft" and config.train.group_pairs:
        yield Problem(("train.group_pairs", "method"), "got true with method sft, which has no pairs, expected false")
    if loss.kind == "kto" and config.train.group_pairs:
        text = "got true with loss.kind kto, which reads responses one by one, expected false"
        yield Problem(("train.group_pairs", "loss.kind"), text)
    if user.prior > 0 and user.kind not in SHRUNK_KINDS:
        text = f"got {user.prior} with user.kind {user.kind}, expected 0: only {' and '.join(SHRUNK_KINDS)} have one"
        yield Problem(("user.prior", "user.kind"), text)
    yield from _misfits_of_texts(user)
    yield from _misfits_of_selection(config)
    for key, methods in _METHODS_OF_SETTING.items():
        section, name = key.split(".")
        value, default = getattr(getattr(config, section), name), getattr(type(getattr(config, section)), name)
        if config.method not in methods and value != default:
            text = f"got {value} with method {config.method}, expected {default}: it is for {', '.join(methods)}"
            yield Problem((key, "method"), text)
    for name, kinds in _KINDS_OF_SETTING.items():
        value, default = getattr(loss, name), getattr(type(loss), name)
        if loss.kind not in kinds and value != default:
            text = f"got {value} with loss.kind {loss.kind}, expected {default}: it is for {', '.join(kinds)}"
            yield Problem((f"loss.{name}", "loss.kind"), text)
    if loss.kind == "robust" and config.train.skip_loss_above is not None:
        text = f"got {config.train.skip_loss_above} with loss.kind robust, whose loss falls below 0, expected null"
        yield Problem(("train.skip_loss_above", "loss.kind"), text)
    if loss.kind in REFERENCE_FREE_KINDS and config.model.reference == "live":
        text = f"got live with loss.kind {loss.kind}, which compares with no reference, expected precomputed"
        yield Problem(("model.reference", "loss.kind"), text)
    if config.eval.temperature == 0 and config.eval.top_p < 1:
        text = f"got {config.eval.top_p} with eval.temperature 0, which takes the likeliest token, expected 1"
        yield Problem(("eval.top_p", "eval.temperature"), text)
    user_tokens = 0 if user.kind == "none" else user.num_user_tokens
    if data.max_prompt_tokens + user_tokens >= data.max_tokens:
        text = f"got {data.max_prompt_tokens} and {user_tokens} user tokens, expected room for a response in "
        text += f"data.max_tokens, which is {data.max_tokens}"
        yield Problem(("data.max_prompt_tokens", "data.max_tokens", "user.num_user_tokens", "user.kind"), text)


def _misfits_of_selection(config: Any) -> Iterator[Problem]:
    """What keeps a run from ending with the checkpoint that is best on dev rows."""
    lora, evaluation, checkpoint = config.model.lora, config.eval, config.checkpoint
    if evaluation.select != "dev":
        return
    if evaluation.every_steps == 0:
        text = "got 0 with eval.select dev, expected after how many steps the dev rows are looked at"
        yield Problem(("eval.every_steps", "eval.select"), text)
    if not checkpoint.keep_best:
        yield Problem(("checkpoint.keep_best", "eval.select"), "got false with eval.select dev, expected true")
    if lora is not None and lora.final_scale != 1:
        text = f"got {lora.final_scale} with eval.select dev, expected 1: the last step's adapters alone are multiplied"
        yield Problem(("model.lora.final_scale", "eval.select"), text)


def _misfits_of_texts(user: Any) -> Iterator[Problem]:
    """What keeps the soft prompts from starting as `init_texts`."""
    count = len(user.init_texts)
    if (user.init == "texts") != (count > 0):
        text = f"got {user.init} with {count} user.init_texts, expected texts with one or more, or none with another"
        yield Problem(("user.init", "user.init_texts"), text)
    elif count == 1 and user.kind in MIXED_KINDS:
        text = f"got 1 with user.kind {user.kind}, expected 2 or more: users differ in what sets the texts apart"
        yield Problem(("user.init_texts", "user.kind"), text)
    elif count:
        repeated = [text for i, text in enumerate(user.init_texts) if text in user.init_texts[:i]]
        if repeated and user.kind in MIXED_KINDS:
            text = f"got {show(repeated[0])} twice with user.kind {user.kind}, expected texts that all differ"
            yield Problem(("user.init_texts", "user.kind"), text)
        for key, kind, number in (("num_clusters", "cluster", user.num_clusters), ("rank", "low_rank", user.rank)):
            if user.kind == kind and number != count:
                text = f"got {number} with {count} user.init_texts, expected {count}: each starts one soft prompt"
                yield Problem((f"user.{key}", "user.init_texts"), text)
