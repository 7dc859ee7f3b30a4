"""The model card of an export: base, data, figures, use, licence, privacy."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prlhf.evaluation.run_files import base_figures, kept_figures
from prlhf.models import PersonalizedPolicy

USES = {
    "peft": """Needs peft (`pip install peft`), and so does `answer.py`.
`adapter_config.json` and `adapter_model.safetensors` are a PEFT LoRA adapter:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}, dtype={dtype!r}), "THIS FOLDER")
```""",
    "merged": '`AutoModelForCausalLM.from_pretrained("THIS FOLDER", dtype={dtype!r})` reads the folder.',
    "vllm": """Needs vllm, where the model is served, and nothing of it where `answer.py` asks the server. Without
`--server`, `answer.py` answers here and needs peft (`pip install peft`).

```
vllm serve "{base}" --dtype {dtype} --enable-lora --max-lora-rank {rank} --enable-prompt-embeds \\
    --lora-modules {name}="THIS FOLDER"
python answer.py --prompt "..." --user ID --server http://127.0.0.1:8000 --model {name}
```

The server gets whole prompts as `prompt_embeds` (base64 of `torch.save` of (L, D)) through `/v1/completions` and knows
no user. It unpickles what clients send: let none but your own reach it.""",
}
ROWS = {"reference_logps": "the base alone, by its log-probs"}  # other names say what they are
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes


BUILTIN_LICENCE = (
    "The built-in base model and its text are Apache-2.0, like prlhf. "
    "The terms of other data hold for what was learned from it."
)
OTHER_LICENCE = (
    "That of the base model, and the terms of the data; prlhf adds none. State them here before you pass this on."
)


def model_card(
    checkpoint: Path, state: Mapping[str, Any], policy: PersonalizedPolicy, kind: str, *, base: str
) -> str:
    """The README.md of an export, for a stranger.

    Args:
        state: the checkpoint's state.json.
        kind: peft, merged or vllm.
        base: where transformers finds the base model, from inside the export where that holds it; unused for merged.
    """
    spec = state["policy"]
    is_builtin = spec["backbone"].startswith("builtin:")
    run = checkpoint.resolve().parents[1] if checkpoint.resolve().parent.name == "checkpoints" else checkpoint
    rank = next((size for size in VLLM_RANKS if size >= (spec["lora_rank"] or 0)), VLLM_RANKS[-1])
    where = f"THIS FOLDER/{base}" if is_builtin else base
    use = USES[kind].format(base=where, dtype=spec["dtype"], rank=rank, name=run.name)
    place = _place(base, kind, is_builtin=is_builtin)
    final, added = base_figures(checkpoint), kept_figures(checkpoint).get("added", [])
    front = {
        "license": "apache-2.0" if is_builtin else "other",
        **({} if is_builtin else {"base_model": json.dumps(spec["backbone"])}),
        "library_name": "transformers" if kind == "merged" else "peft",
        "tags": "[prlhf, personalized]",
    }
    return f"""---
{chr(10).join(f"{key}: {value}" for key, value in front.items())}
---

# {run.name}

A language model that answers each of its users in that user's way, trained with prlhf (P-RLHF, arXiv:2402.05133).

## Base

`{spec["backbone"]}`, weights sha256 `{state["base_sha256"]}`, in {spec["dtype"]}; {_trained(spec)}.{place}

## Data

{_data(final)}

## Figures

{_figures(state, final)}{_added(added)}

## Use

{use}

{_layout(policy)}

## Licence

{BUILTIN_LICENCE if is_builtin else OTHER_LICENCE}

## Privacy

{_privacy(policy)}
"""


def _place(base: str, kind: str, *, is_builtin: bool) -> str:
    """What to do about the base where this folder is taken elsewhere."""
    if kind == "merged":
        return ""
    if is_builtin:
        return f"""
It lies in `{base}/`. `adapter_config.json` names it by that relative path, which PEFT reads from where Python runs:
`AutoPeftModelForCausalLM.from_pretrained(".")` works inside this folder, the lines below anywhere."""
    if Path(base).is_absolute():
        return """
It is a folder of the machine that wrote this one and is not in here. Elsewhere, bring it along and put its new path
into `adapter_config.json` (`base_model_name_or_path`) and into the lines below."""
    return ""


def _trained(spec: Mapping[str, Any]) -> str:
    users = "no user model" if spec["user_kind"] == "none" else f"user model {spec['user_kind']}"
    how = "all weights trained" if spec["lora_rank"] is None else f"LoRA of rank {spec['lora_rank']}"
    return f"{how}; {users}"


def _data(final: Mapping[str, Any] | None) -> str:
    if final is None or "data" not in final:
        return "Not known: no final evaluation of this step lies beside the checkpoint."
    data = final["data"]
    of_base = f" of the run {final['run']}, to which users were added later" if "run" in final else ""
    return f"`{data['source']}`, {data['train_rows']} training rows{of_base}."


def _figures(state: Mapping[str, Any], final: Mapping[str, Any] | None) -> str:
    about = f"Method {state['method']}, step {state['step']}, {state['rows_seen']} rows seen."
    if final is None:
        return f"{about} No evaluation of this step lies beside the checkpoint."
    base = f" The table is of the run {final['run']}, before users were added." if "run" in final else ""
    lines = [
        about + base,
        "",
        "| reward accuracy | mean | 95% interval | worst user | rows | users |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for who, block in final["accuracy"].items():
        if block:
            low, high = block["ci95"]
            lines.append(
                f"| {ROWS.get(who, who)} | {block['mean']:.3f} | {low:.3f} to {high:.3f} | {block['worst_user']:.3f} | "
                f"{block['num_rows']} | {block['num_users']} |"
            )
    return "\n".join(lines)


def _added(added: Sequence[Mapping[str, Any]]) -> str:
    """How well users are served who were added after training, all of them together."""
    if not added:
        return ""
    rates = [own["leave_one_out"] for own in added if own.get("leave_one_out") is not None]
    fits = f"""
The share of a user's judgments that the fit without them answers right (leave-one-out) is {sum(rates) / len(rates):.3f}
on average and {min(rates):.3f} at worst.""" if rates else ""
    return f"""

prlhf adapt added {len(added)} of the users after training, from {sum(own["judgments"] for own in added)} judgments in
all; shared weights stayed as they were.{fits}"""


def _layout(policy: PersonalizedPolicy) -> str:
    if policy.user_encoder is None:
        return 'The model has no users and answers everybody alike: `python answer.py --prompt "..."`.'
    num = policy.soft_prompt.num_user_tokens
    place = "first, before the text" if policy.tokenizer.bos_token_id is None else "right after BOS, before the text"
    return f"""The weights alone are nobody's model: every user, the generic one too, is these weights and a soft
prompt of {num} embeddings. `user_prompts.safetensors` holds `generic`, and `users` in the order of `user_ids`
in `export.json`. A soft prompt stands {place}. PEFT's own prompt
tuning puts it before BOS and cannot be combined with LoRA, so build `inputs_embeds` as `answer.py` does:
`python answer.py --prompt "..." --user ID`. For somebody who is not in the
list leave `--user` out, which gives `generic`."""


def _privacy(policy: PersonalizedPolicy) -> str:
    shared = "The shared weights were trained on people's judgments and may give away what those say."
    if policy.user_encoder is None:
        return shared
    texts = " and what they say of themselves, which stands in front of their prompts" if policy.user_texts else ""
    return f"""`export.json` holds the users' ids{texts}, and
`user_prompts.safetensors` what was learned of each one's taste: personal data. Whoever has this folder can
answer as any of them. {shared}
`prlhf forget` does not reach copies like this one: after it, export again and delete this folder."""
