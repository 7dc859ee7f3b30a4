"""`prlhf data check`: the report on the data of a configuration, or of a source by itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prlhf.config import Config, config_from_dict, load_config
from prlhf.data.check import make_report
from prlhf.data.check_labelled import make_labelled_report
from prlhf.data.load import load_judged_data, load_preference_data
from prlhf.data.records import LabelledData
from prlhf.engine.build import source_options
from prlhf.errors import ConfigError
from prlhf.models.backbone import load_tokenizer, resolve_backbone


def check_data(target: str, overrides: Sequence[str] = ()) -> str:
    """Text report on preference data, pairs or unpaired rows.

    Args:
        target: a YAML file, whose source, tokenizer and limits apply; or a source, seen by the built-in tokenizer.
    Raises: ConfigError, DataError, ModelError: what cannot be read.
    """
    config = _config(target, overrides)
    if config.method == "sft":
        raise ConfigError(f"{target}: method sft has no preferences to check; give a preference experiment or its data")
    takes_any = config.loss.kind == "kto" or not _is_config(target)
    load = load_judged_data if takes_any else load_preference_data
    data = load(config.data.source, **source_options(config))
    tokenizer = load_tokenizer(resolve_backbone(config.model.backbone), config.model.backbone)
    limits: dict[str, Any] = {
        "max_tokens": config.data.max_tokens,
        "max_prompt_tokens": config.data.max_prompt_tokens,
        "num_user_tokens": 0 if config.user.kind == "none" else config.user.num_user_tokens,
        "with_user_text": config.data.user_text == "prompt",
    }
    if isinstance(data, LabelledData):
        return make_labelled_report(data, tokenizer, **limits)
    return make_report(data, tokenizer, **limits)


def _config(target: str, overrides: Sequence[str]) -> Config:
    if _is_config(target):
        return load_config(target, overrides)
    if overrides:
        raise ConfigError(f"{target}: key=value goes with a YAML file; give one, or leave {' '.join(overrides)} out")
    return config_from_dict({"data": {"source": target}}, target)


def _is_config(target: str) -> bool:
    return Path(target).suffix in (".yaml", ".yml")
