"""Runs to forget a user of, what is left in them, and a process that dies at a chosen moment."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from prlhf.data.context import collate_contexts
from prlhf.files import seal_directory
from prlhf.models import PersonalizedModel
from tests.evaluation.test_report import final_of
from tests.saved_policies import checkpoint_of, save_policy
from tests.tiny_run import Crash, preference_record, write_jsonl

CANARY_TEXT = "My parrot is called Zebedee-4711."


def make_run(run_dir: Path, user: str, *, with_texts: bool = False, **settings: Any) -> tuple[list[str], Path]:
    """A run of three users with all that a run may hold, and its data; the user stands in the middle.

    Args:
        with_texts: users' texts stand in front of their prompts.
    """
    users = ["ann", user, "bob"]
    save_policy(run_dir, user_ids=users, **settings)
    contexts = checkpoint_of(run_dir) / "contexts.json"
    if contexts.exists():
        known = json.loads(contexts.read_text())
        known[user]["text"] = CANARY_TEXT
        contexts.write_text(json.dumps(known))
        seal_directory(checkpoint_of(run_dir))
    if with_texts:
        texts = {name: CANARY_TEXT if name == user else f"I am {name}." for name in users}
        (checkpoint_of(run_dir) / "user_texts.json").write_text(json.dumps(texts))
        seal_directory(checkpoint_of(run_dir))
    (run_dir / "config.yaml").write_text("name: tiny\n")
    for folder in ("eval", "samples"):
        (run_dir / folder).mkdir()
    scores = {name: {"accuracy": 0.5, "num_rows": 2} for name in users}
    words, data = {"per_user": dict.fromkeys(users, 9.0)}, {"source": "somewhere", "train_rows": 12}
    figures = final_of(step=7, per_user=scores, words=words, data=data, accuracy={"mean": 1})
    for name in ("final", "step-00000003"):
        (run_dir / "eval" / f"{name}.json").write_text(json.dumps(figures))
    asked = [(name, prompt) for name in users for prompt in ("Tea?", CANARY_TEXT)]
    samples = [{"user_id": name, "prompt": prompt, "response": "Yes."} for name, prompt in asked]
    for name in ("policy", "reference"):
        write_jsonl(run_dir / "samples" / f"{name}.jsonl", samples)
    write_jsonl(run_dir / "metrics.jsonl", [{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.6, "user_id": user}])
    (run_dir / "STATUS.json").write_text(json.dumps({"status": "failed", "error": f"user '{user}' is odd"}))
    (run_dir / "report.html").write_text(f"<td>{user}</td>")
    data = run_dir.parent / "data"
    data.mkdir()
    write_jsonl(data / "train.jsonl", [
        {**preference_record("tea", name, prefers_short=True), "prompt": CANARY_TEXT if name == user else "Tea?"}
        for name in users
    ])
    (data / "users.json").write_text(json.dumps({name: {"split": "seen"} for name in users}))
    return users, data


def bytes_of(root: Path) -> bytes:
    return b"\n".join(path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file())


@torch.no_grad()
def logits_of(model: PersonalizedModel, user_id: str | None) -> Tensor:
    index = 0 if user_id is None else model.users.index(user_id)
    context = None
    if model.contexts is not None and user_id is not None:
        context = collate_contexts([model.contexts.of_user(user_id, "")], 0)
    embeds = model.input_embeds(torch.tensor([[0, 9, 40, 7]]), torch.tensor([index]), context)
    return model.backbone(inputs_embeds=embeds, use_cache=False).logits


@contextmanager
def killed_at(point: int) -> Iterator[list[int]]:
    """Inside, the `point`-th write of a row, flush, link, rename or removal does not happen, nor anything after it."""
    count = [0]

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def maybe(*args: Any, **options: Any) -> Any:
            count[0] += 1
            if count[0] > point:
                raise Crash
            return call(*args, **options)

        return maybe

    calls = [(Path, "rename"), (Path, "replace"), (Path, "unlink"), (shutil, "rmtree"), (os, "link"), (os, "pwrite")]
    with ExitStack() as patches:
        patches.enter_context(mock.patch("os.fsync", counted(lambda descriptor: None)))  # a real one takes long
        for owner, name in calls:
            patches.enter_context(mock.patch.object(owner, name, counted(getattr(owner, name))))
        yield count


def contents(root: Path) -> dict[str, bytes]:
    """Files by name; tombstones and receipts, whose key is random, left out."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not path.name.startswith(("tombstones", "forgotten", ".lock"))
    }
