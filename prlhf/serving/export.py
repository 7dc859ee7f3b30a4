"""A trained policy as files that PEFT, transformers and vLLM read, without prlhf."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, cast

from safetensors.torch import save_file

from prlhf.errors import ConfigError
from prlhf.files import (
    check_can_appear,
    fsync_path,
    publish_directory,
    read_json,
    write_json_atomic,
    write_text_atomic,
    writing_directory,
    writing_tensors,
)
from prlhf.models import PersonalizedPolicy, load_policy
from prlhf.models.assemble import PolicySpec, spec_from_dict
from prlhf.models.backbone import BUILTIN_SCRATCH, BUILTIN_TINY, DTYPES, builtin_model_dir, resolve_backbone
from prlhf.models.lora import adapter_targets, lora_state_dict, merge_lora_
from prlhf.models.run_folder import STATE, resolve_checkpoint
from prlhf.serving.answer import ABOUT, TABLE
from prlhf.serving.model_card import model_card

SCRIPT = "answer.py"
BASE = "base"


def export_checkpoint(checkpoint: Path, kind: str, out: Path) -> None:
    """Write a policy for other programs; the directory appears when it is complete.

    Beside the model: `user_prompts.safetensors`, the soft prompts "generic" (T, D) and "users" (U, T, D) in the
    model's type; `export.json`, their ids in that order, and what stands in front of their prompts; `answer.py`, which
    answers a user from these files alone; the tokenizer; a model card; and beside an adapter of the built-in model that
    model, in `base/`.

    Args:
        kind: "peft", "merged" or "vllm" (the adapter and how to serve it).
    Raises: ConfigError: the output exists, or there is no adapter to export. CheckpointError: as `load_policy`.
    """
    check_can_appear(out)
    if out.exists():
        raise ConfigError(f"--out {out}: exists already; choose another folder")
    directory = resolve_checkpoint(checkpoint)
    state = read_json(directory / STATE)
    spec = spec_from_dict(state["policy"])
    _refuse_missing_adapter(directory, spec, kind)
    policy = load_policy(directory)
    with writing_directory(out) as temporary:
        with writing_tensors(out):
            _write_users(policy, spec, temporary)
            if kind == "merged":
                merge_lora_(policy.backbone)
                cast(Any, policy.backbone).save_pretrained(temporary)
            else:
                _write_adapter(policy, spec, temporary)
        policy.tokenizer.save_pretrained(temporary)
        shutil.copyfile(Path(__file__).with_name(SCRIPT), temporary / SCRIPT)
        write_text_atomic(temporary / "README.md", model_card(directory, state, policy, kind, base=base_location(spec)))
        for path in temporary.rglob("*"):
            fsync_path(path)
        publish_directory(temporary, out)


def _refuse_missing_adapter(directory: Path, spec: PolicySpec, kind: str) -> None:
    if kind == "merged":
        return
    if spec.lora_rank is None:
        raise ConfigError(f"{directory}: all weights were trained, so there is no adapter; use --format merged")
    if spec.backbone == BUILTIN_SCRATCH:
        raise ConfigError(f"{directory}: the base model, random weights, is no folder; use --format merged")


def _write_users(policy: PersonalizedPolicy, spec: PolicySpec, folder: Path) -> None:
    users: list[str] = []
    if policy.user_encoder is not None and policy.users is not None:
        users = list(policy.users.user_ids)
        prompts = policy.known_prompts().to(DTYPES[spec.dtype])
        save_file({"generic": prompts[0].clone(), "users": prompts[1:].clone()}, folder / TABLE)
    layout = ["soft prompt", "text"] if policy.tokenizer.bos_token_id is None else ["BOS", "soft prompt", "text"]
    write_json_atomic(
        folder / ABOUT,
        {
            "user_ids": users,
            "user_texts": {user: policy.user_texts[user] for user in users if user in policy.user_texts},
            "num_user_tokens": policy.soft_prompt.num_user_tokens,
            "layout": layout,
            "dtype": spec.dtype,
            "base_sha256": policy.base_sha256,
        },
    )


def _write_adapter(policy: PersonalizedPolicy, spec: PolicySpec, folder: Path) -> None:
    """A PEFT LoRA directory. PEFT loads wrong key names as the bare base, with a warning alone."""
    write_json_atomic(
        folder / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_location(spec),
            "r": spec.lora_rank,
            "lora_alpha": spec.lora_alpha,
            "lora_dropout": spec.lora_dropout,
            "target_modules": adapter_targets(policy.backbone),
            "bias": "none",
            "inference_mode": True,
        },
    )
    tensors = {name: tensor.contiguous() for name, tensor in lora_state_dict(policy.backbone).items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    if spec.backbone == BUILTIN_TINY:
        shutil.copytree(builtin_model_dir(), folder / BASE, copy_function=shutil.copyfile)


def base_location(spec: PolicySpec) -> str:
    """Where transformers finds the base model: a hub id, a folder's whole path, or `base`, which the export holds.

    PEFT and transformers read a relative path from where they are called, so `base` is found from inside the export.
    """
    if spec.backbone == BUILTIN_TINY:
        return BASE
    folder = resolve_backbone(spec.backbone)
    return str(folder.resolve()) if isinstance(folder, Path) else folder
