"""`prlhf data check`: the report on the data of a configuration, or of a source by itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prlhf.config import Config, config_from_dict, load_config
from prlhf.data.check import make_report
from prlhf.engine.build import load_job_data
from prlhf.errors import ConfigError
from prlhf.models.backbone import load_tokenizer, resolve_backbone


def check_data(target: str, overrides: Sequence[str] = ()) -> str:
    """Text report on preference data.

    Args:
        target: a YAML file, whose source, tokenizer and limits apply; or a source, seen by the built-in tokenizer.
    Raises: ConfigError, DataError, ModelError: what cannot be read.
    """
    config = _config(target, overrides)
    data, _, _ = load_job_data(config)
    if data is None:
        raise ConfigError(f"{target}: method sft has no preferences to check; give a preference experiment or its data")
    return make_report(
        data,
        load_tokenizer(resolve_backbone(config.model.backbone), config.model.backbone),
        max_tokens=config.data.max_tokens,
        max_prompt_tokens=config.data.max_prompt_tokens,
        num_user_tokens=0 if config.user.kind == "none" else config.user.num_user_tokens,
        with_user_text=config.data.user_text == "prompt",
    )


def _config(target: str, overrides: Sequence[str]) -> Config:
    if Path(target).suffix in (".yaml", ".yml"):
        return load_config(target, overrides)
    if overrides:
        raise ConfigError(f"{target}: key=value goes with a YAML file; give one, or leave {' '.join(overrides)} out")
    return config_from_dict({"data": {"source": target}}, target)
