"""The personalization tax, recomputed token by token from the model's own logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prlhf.data import load
from prlhf.data.load import load_neutral_texts, load_response_rows
from prlhf.data.records import PreferenceData, PreferenceRow, ResponseRow
from prlhf.data.tokenize import TokenizedResponse
from prlhf.errors import DataError
from prlhf.evaluation.tax import MAX_USERS, personalization_tax
from tests.policies import plain_logps, randomize_, tiny_policy

TEXTS = [TokenizedResponse(0, 0, (0, 5, 9), (4, 17, 1)), TokenizedResponse(1, 0, (0,), (33, 8, 8, 21, 1))]
OPTIONS = {"pad_id": 2, "microbatch_tokens": 64}


def by_hand(policy, user: int | None) -> float:
    """Mean over all 8 tokens, the soft prompt put right behind BOS by hand."""
    total = 0.0
    for text in TEXTS:
        ids = torch.tensor([[*text.prompt_ids, *text.response_ids]])
        embeds = policy.backbone.get_input_embeddings()(ids)
        prompt = policy.user_encoder(torch.tensor([user])) if user is not None else embeds[:, :0]
        embeds = torch.cat([embeds[:, :1], prompt, embeds[:, 1:]], dim=1)
        logps = policy.backbone(inputs_embeds=embeds).logits[0].double().log_softmax(-1)
        first = prompt.shape[1] + len(text.prompt_ids) - 1
        total += sum(float(logps[first + i, token]) for i, token in enumerate(text.response_ids))
    return -total / 8


@torch.no_grad()
def test_the_figures_are_those_of_the_reference_the_generic_user_and_the_users() -> None:
    policy = tiny_policy(num_users=2, lora=True)
    randomize_(policy.backbone, scale=0.3)
    with policy.reference.active() as frozen:
        reference = -sum(float(plain_logps(frozen.backbone, t.prompt_ids, t.response_ids).sum()) for t in TEXTS) / 8
    tax = personalization_tax(policy, TEXTS, **OPTIONS)
    assert (tax["num_texts"], tax["num_tokens"], tax["num_users"]) == (2, 8, 2)
    nll = tax["nll_per_token"]
    assert nll["reference"] == pytest.approx(reference, rel=1e-5)
    assert nll["generic"] == pytest.approx(by_hand(policy, 0), rel=1e-5)
    assert nll["users_mean"] == pytest.approx((by_hand(policy, 1) + by_hand(policy, 2)) / 2, rel=1e-5)
    assert len({round(value, 4) for value in nll.values()}) == 3


def test_a_policy_without_users_has_no_mean_over_them() -> None:
    tax = personalization_tax(tiny_policy(num_users=0), TEXTS, **OPTIONS)
    assert tax["num_users"] == 0
    assert tax["nll_per_token"]["users_mean"] is None
    assert tax["nll_per_token"]["generic"] == tax["nll_per_token"]["reference"], "untrained"


def test_of_many_users_some_stand_for_all() -> None:
    assert personalization_tax(tiny_policy(num_users=50), TEXTS, **OPTIONS)["num_users"] == MAX_USERS


def data_of(source: str, *rows: tuple[str, str]) -> PreferenceData:
    judged = [PreferenceRow(str(i), "ann", prompt, chosen, "other") for i, (prompt, chosen) in enumerate(rows)]
    return PreferenceData(judged, [], [], [], source=source)


def test_neutral_text_of_a_file_leaves_out_what_was_judged(tmp_path: Path) -> None:
    data = data_of("data/x", ("Why?", "So it is."))
    assert load_neutral_texts(None, data) == []
    (tmp_path / "texts.txt").write_text("One.\n\n So it is. \nTwo, then.\n")
    texts = load_neutral_texts(str(tmp_path / "texts.txt"), data)
    assert texts == [ResponseRow("", "One."), ResponseRow("", "Two, then.")]
    (tmp_path / "texts.jsonl").write_text('{"text": "One."}\n{"prompt": "Why?", "response": "No."}\n')
    assert load_neutral_texts(str(tmp_path / "texts.jsonl"), data) == [ResponseRow("", "One.")]
    (tmp_path / "texts.json").write_text('[{"text": "One."},\n {"prompt": "Why?", "response": "No."}]')
    assert load_neutral_texts(str(tmp_path / "texts.json"), data) == [ResponseRow("", "One.")]
    (tmp_path / "texts.txt").write_text("\ufeffOne.\r\nTwo\u2028then.\r\n", encoding="utf-8", newline="")
    texts = load_neutral_texts(str(tmp_path / "texts.txt"), data)
    assert texts == [ResponseRow("", "One."), ResponseRow("", "Two\u2028then.")]
    (tmp_path / "texts.txt").write_text("So it is.\n")
    with pytest.raises(DataError, match="texts.txt: holds no text"):
        load_neutral_texts(str(tmp_path / "texts.txt"), data)
    with pytest.raises(DataError, match="none.txt: cannot be read"):
        load_neutral_texts(str(tmp_path / "none.txt"), data)


def test_built_in_neutral_text_is_held_out_pretraining_text_with_no_judged_prompt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train, dev = load_response_rows("builtin:text", seed=0, eval_prompts=0.0)
    made = {("builtin:text", 0): (train, dev)}
    monkeypatch.setattr(load, "load_response_rows", lambda source, *, seed, **_: made[source, seed])
    texts = load_neutral_texts(None, data_of("builtin:psoups", (dev[0].prompt, "x"), ("y", dev[1].response)))
    assert texts == dev[2:98]
    assert not {text.prompt for text in texts} & {row.prompt for row in train}
