"""The configuration of a run: one schema, read strictly, every error at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from prlhf.config_checks import find_problems
from prlhf.errors import ConfigError
from prlhf.schema import Problem, join_keys, read_dataclass
from prlhf.yaml_strict import MAX_BYTES, dump_yaml, load_value, load_yaml


@dataclass(frozen=True)
class DataConfig:
    """Where the rows come from and how long they may be.

    `source` is `builtin:NAME`, a prepared directory, or one .jsonl file. `seed` draws a built-in world and the split
    of a single file; `eval_prompts` and `unseen_users` are that split's shares. The user tokens count in `max_tokens`.
    `user_text: prompt` puts what is known about a row's user in front of the prompt, for every term and the reference;
    `none` leaves it to user models that read it.
    """

    source: str = "builtin:psoups"
    max_tokens: int = 1024
    max_prompt_tokens: int = 512
    user_text: Literal["prompt", "none"] = "prompt"
    on_bad_row: Literal["error", "skip"] = "error"
    eval_prompts: float = 0.1
    unseen_users: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters; `targets: auto` is every linear layer inside the transformer blocks.

    `final_scale` multiplies what the adapters add after the last step: below 1 the weights are interpolated towards the
    reference's (Wortsman et al. 2022, arXiv:2109.01903), which gives up a little preference for better text.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    final_scale: float = 1.0
    targets: Literal["auto"] | tuple[str, ...] = "auto"


@dataclass(frozen=True)
class ModelConfig:
    """The backbone (`builtin:tiny`, a path or a hub id); `lora: null` trains all of it.

    `reference: precomputed` scores every training row once before the first step; `live` scores in each step (with
    LoRA the adapters are switched off, else a frozen copy is kept in memory). With `gradient_checkpointing` every n-th
    block (`gradient_checkpointing_every`) keeps no activations and is computed again in backward: less memory, slower.
    """

    backbone: str = "builtin:tiny"
    dtype: Literal["float32", "bfloat16"] = "float32"
    lora: LoraConfig | None = field(default_factory=LoraConfig)
    gradient_checkpointing: bool = False
    gradient_checkpointing_every: int = 1
    reference: Literal["precomputed", "live"] = "precomputed"


@dataclass(frozen=True)
class UserConfig:
    """The user model; `num_clusters` is read for `cluster`, `rank` for `low_rank`, `init_range` for `init: uniform`.

    Soft prompts start as random tokens (`vocabulary`), random numbers (`uniform`) or `init_texts`, which say in words
    how users may want their answers: each shared soft prompt starts as one of them, a single one as their mean. An
    encoder with texts makes users mixtures of as many shared soft prompts; without, offsets from the generic one.

    Of the encoders `text` reads `user_text`, and `history` up to `history_pairs` pairs that the user has judged; the
    width of either is `encoder_dim`, and a text or response is cut to `context_tokens`. `prior` is the precision of a
    Gaussian prior on what sets a user apart from the generic one (individual: o_i, low_rank: w_i).
    """

    kind: Literal["none", "uniform", "individual", "cluster", "low_rank", "text", "history"] = "individual"
    num_user_tokens: int = 10
    num_clusters: int = 6
    rank: int = 4
    encoder_dim: int = 64
    context_tokens: int = 256
    history_pairs: int = 8
    prior: float = 0.0
    init: Literal["vocabulary", "uniform", "texts"] = "vocabulary"
    init_range: float = 0.5
    init_texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class LossConfig:
    """The preference loss; `alpha` weighs the individual term, `sft_weight` the chosen response's NLL per token.

    `simpo` and `orpo` have no reference; `kto` takes unpaired rows, or both responses of a pair as two rows. `beta` is
    the inverse temperature, of mean log-probs for `simpo`; for `orpo` the weight of the odds-ratio term. `gamma` is
    SimPO's margin; the weights of liked and disliked rows are KTO's.
    """

    kind: Literal["sigmoid", "robust", "ipo", "hinge", "simpo", "orpo", "kto"] = "sigmoid"
    beta: float = 0.1
    alpha: float = 0.5
    label_smoothing: float = 0.0
    sft_weight: float = 0.0
    gamma: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


@dataclass(frozen=True)
class TrainConfig:
    """The optimisation; `batch_rows` is global, `microbatch_tokens` bounds the tokens of one rank's forward pass.

    With `packing` rows are laid out without padding and responses to one prompt share it, where the backbone allows it.
    `group_pairs` shows the judgments of one pair in one step, which then computes the generic user's part once.
    `separate_terms` runs the individual and the generic term of pdpo and prm one after the other: half the activations.
    `user_lr` is the rate of the user embeddings, `cluster_lr` that of the users' weights of shared soft prompts
    (cluster, low_rank), `encoder_lr` that of what reads a user (text, history). `max_steps: null` trains `epochs`
    epochs; the run stops after `max_skipped_steps` skipped steps in a row. A step is skipped when its loss or
    gradient is not finite, or its mean loss is above `skip_loss_above` times the usual one of late (null: no limit).
    `compile` lets torch.compile fuse the blocks' small operations in training steps: a minute at first, then faster.
    Under `parallel: ddp` every rank holds the whole model; `fsdp` splits backbone, gradients and moments over ranks.
    """

    epochs: int = 1
    max_steps: int | None = None
    batch_rows: int = 16
    microbatch_tokens: int = 8192
    packing: bool = True
    group_pairs: bool = False
    separate_terms: bool = False
    lr: float = 5e-5
    user_lr: float = 1e-3
    cluster_lr: float = 1e-2
    encoder_lr: float = 1e-3
    weight_decay: float = 0.0
    warmup_steps: int = 150
    max_grad_norm: float = 1.0
    max_skipped_steps: int = 10
    skip_loss_above: float | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    num_threads: int | None = None
    log_every: int = 10


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation; `every_steps: 0` leaves the final one, whose `generate` is held-out prompts a user (0: none).

    The final one, and every command that is given the run directory, is of the last step; with `select: dev` of the
    checkpoint with the best accuracy on dev rows. `rows` caps the dev rows of evaluations during training, which are
    drawn from as many users as can be. `few_shot` is the labelled pairs in that baseline's prompt (0: none). `neutral`
    is a file of texts that no user judges, one a line (or .jsonl with "text"), for the personalization tax; built-in
    data has its own.
    """

    every_steps: int = 0
    select: Literal["last", "dev"] = "last"
    rows: int | None = None
    generate: int = 0
    few_shot: int = 4
    temperature: float = 0.7
    top_p: float = 1.0
    max_new_tokens: int = 160
    batch_rows: int = 32
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    neutral: str | None = None


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints; the last step and those evaluated on dev rows are always saved, `every_steps: 0` saves no other.

    Besides the last `keep_last`, `keep_best` keeps the one with the best accuracy on dev rows, of those evaluated.
    """

    every_steps: int = 100
    keep_last: int = 2
    keep_best: bool = True


@dataclass(frozen=True)
class Config:
    """Everything that decides a run; `name` is the run directory's name."""

    name: str = "run"
    seed: int = 123
    method: Literal["sft", "dpo", "pdpo", "rm", "prm"] = "pdpo"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    user: UserConfig = field(default_factory=UserConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file with `key.path=value` overrides on top.

    Raises: ConfigError: one message for each wrong key, value or combination.
    """
    where = str(path)
    data = load_yaml(read_text(Path(path)), where)
    problems: list[Problem] = []
    origins: dict[str, str] = {}
    if isinstance(data, dict):
        for override in overrides:
            _apply_override_(data, override, origins, problems)
    return _build_config(data, where, origins, problems)


def config_from_dict(data: Any, where: str) -> Config:
    """The configuration in a nested dict; absent keys take their defaults.

    Args:
        where: what the dict is called in errors.
    Raises: ConfigError: one message for each wrong key, value or combination.
    """
    return _build_config(data, where, {}, [])


def config_to_dict(config: Config) -> dict[str, Any]:
    """The configuration as nested dicts, lists and scalars, fit for JSON; `config_from_dict` reads it back."""
    return {name: _plain(value) for name, value in dataclasses.asdict(config).items()}


def dump_config(config: Config) -> str:
    """The whole configuration as YAML, defaults included."""
    return dump_yaml(config_to_dict(config))


def changed_keys(old: Config, new: Config) -> list[str]:
    """Dotted keys whose values differ, in the schema's order; a section that appears or goes is one key."""
    return _changed(config_to_dict(old), config_to_dict(new), "")


def _changed(old: Any, new: Any, key: str) -> list[str]:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [key] if old != new else []
    return [name for part in old for name in _changed(old[part], new[part], join_keys(key, part))]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def read_text(path: Path) -> str:
    """The text of a YAML file, as much of it as any configuration needs.

    Raises: ConfigError: missing, unreadable, or not UTF-8.
    """
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1).decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; expected a YAML file such as experiments/psoups.yaml") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8 text") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _apply_override_(data: dict[str, Any], override: str, origins: dict[str, str], problems: list[Problem]) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    where = f"override {override!r}"
    if not equals or not all(key.split(".")):
        problems.append(Problem((where,), "expected key=value, such as train.lr=1e-4"))
        return
    if key in origins:
        problems.append(Problem((key,), f"given twice, as {origins[key]} and {where}; keep one of them"))
        return
    origins[key] = where
    *sections, name = key.split(".")
    holder: Any = data
    for section in sections:
        if holder.get(section) is None:
            holder[section] = {}
        holder = holder[section]
        if not isinstance(holder, dict):
            return
    try:
        holder[name] = load_value(text, where)
    except ConfigError as error:
        problems.extend(Problem((key,), message.removeprefix(f"{where}:").strip()) for message in error.messages)


def _build_config(data: Any, where: str, origins: dict[str, str], problems: list[Problem]) -> Config:
    config = read_dataclass(Config, data, problems)
    broken = {key for problem in problems for key in problem.keys}
    for problem in find_problems(config):
        if not any(key == bad or key.startswith(f"{bad}.") for key in problem.keys for bad in broken):
            problems.append(problem)
    if problems:
        raise ConfigError(*(_message(problem, where, origins) for problem in problems))
    return config


def _message(problem: Problem, where: str, origins: dict[str, str]) -> str:
    key = problem.keys[0]
    if key.startswith("override "):
        return f"{key}: {problem.text}"
    origin = next((origin for name, origin in origins.items() if key == name or key.startswith(f"{name}.")), where)
    return f"{origin}: {key}: {problem.text}" if key else f"{origin}: {problem.text}"
