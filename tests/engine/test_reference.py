"""Reference log-probs: computed before the first step or in each step, they are the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prlhf.data.collate import collate_pairs
from prlhf.data.tokenize import TokenizedPair
from prlhf.engine import trainer
from prlhf.engine.build import Job, build_job
from prlhf.engine.reference import LiveReference, ReferenceTable, compute_reference_table
from prlhf.engine.trainer import train
from prlhf.models.packing import Pack
from prlhf.models.policy import PersonalizedPolicy
from tests.tiny_run import THINGS, Tiny, perturbed_job, read_metrics


def table_of(job: Job, rows: Any = None, **options: Any) -> ReferenceTable:
    return compute_reference_table(
        job.model.reference, job.rows if rows is None else rows, pad_id=job.pad_id, microbatch_tokens=300,
        autocast=job.autocast, **options,
    )


@pytest.mark.parametrize("settings", [{}, {"model__lora": None}, {"model__lora__dropout": 0.3}, {"method": "dpo"}])
def test_precomputed_equals_live(tiny: Tiny, settings: dict[str, Any]) -> None:
    """After the policy has moved: neither may see it. 1e-4 nats of about 100: padding changes float32 sums."""
    job = perturbed_job(tiny.config(**settings))
    batch = collate_pairs(job.rows, job.pad_id)
    precomputed, live = table_of(job)(batch), LiveReference(job.model.reference)(batch)
    torch.testing.assert_close(precomputed.chosen, live.chosen, rtol=0, atol=1e-4)
    torch.testing.assert_close(precomputed.rejected, live.rejected, rtol=0, atol=1e-4)
    assert not precomputed.chosen.requires_grad and not live.chosen.requires_grad
    policy = job.model.logps(batch, None).chosen
    assert not torch.allclose(policy, live.chosen, atol=1e-2), "the policy was not moved: nothing was tested"


def test_live_and_precomputed_runs_train_alike(tiny: Tiny, tmp_path: Path) -> None:
    for reference in ("live", "precomputed"):
        train(tiny.config(model__reference=reference, train__max_steps=2), tmp_path / reference)
    for live, table in zip(read_metrics(tmp_path / "live"), read_metrics(tmp_path / "precomputed"), strict=True):
        for name in ("loss", "grad_norm", "rewards/chosen", "generic/rewards/rejected"):
            assert live[name] == pytest.approx(table[name], abs=1e-5), name


def record_packs(monkeypatch: pytest.MonkeyPatch) -> list[Pack]:
    """The packs that policies read from now on."""
    packs = []
    packed_values = PersonalizedPolicy.packed_values

    def recording(self: PersonalizedPolicy, pack: Pack, *args: Any) -> Tensor:
        packs.append(pack)
        return packed_values(self, pack, *args)

    monkeypatch.setattr(PersonalizedPolicy, "packed_values", recording)
    return packs


def test_each_distinct_response_is_scored_once(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """ann and bob judge the same two answers about each thing."""
    job = build_job(tiny.config())
    packs = record_packs(monkeypatch)
    table_of(job)
    assert sum(len(pack.last) for pack in packs) == 2 * len(THINGS)


def test_rows_are_found_by_their_id_not_their_place(tiny: Tiny) -> None:
    """Row ids have gaps where rows were dropped, and a batch may be in any order."""
    job = build_job(tiny.config())
    kept = [row for row in job.rows if row.row not in (0, 3)]
    table, full = table_of(job, kept), table_of(job)
    batch = collate_pairs([kept[5], kept[0], kept[2]], job.pad_id)
    torch.testing.assert_close(table(batch).chosen, full(batch).chosen, rtol=0, atol=1e-4)
    torch.testing.assert_close(table(batch).rejected, full(batch).rejected, rtol=0, atol=1e-4)


def test_only_rows_that_steps_will_show_are_scored(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scored = []
    compute = trainer.compute_reference_table

    def counting(reference: Any, rows: list[TokenizedPair], **options: Any) -> Any:
        scored.append({row.row for row in rows})
        return compute(reference, rows, **options)

    monkeypatch.setattr(trainer, "compute_reference_table", counting)
    config = tiny.config(train__max_steps=2)
    sampler = build_job(config).sampler
    train(config, tmp_path / "run")
    shown = {*sampler.rows_of_step(0), *sampler.rows_of_step(1)}
    assert scored == [shown] and len(shown) < sampler.num_rows
    train(tiny.config(train__max_steps=40), tmp_path / "run")
    assert scored[1] == set(range(sampler.num_rows))


def test_a_table_of_no_rows_is_empty(tiny: Tiny) -> None:
    assert table_of(build_job(tiny.config()), []).chosen.shape == (0,)


def test_a_dropped_row_has_no_log_prob(tiny: Tiny) -> None:
    job = build_job(tiny.config())
    table = table_of(job, [row for row in job.rows if row.row != 0])
    missing = TokenizedPair(0, 1, (1,), (2,), (3,))
    assert table(collate_pairs([missing], job.pad_id)).chosen.isnan().all()


def test_the_stop_flag_is_looked_at_between_batches(tiny: Tiny) -> None:
    class Stop(Exception):
        pass

    def stop() -> None:
        raise Stop

    with pytest.raises(Stop):
        table_of(build_job(tiny.config()), on_batch=stop)


def test_a_pair_and_its_prompt_are_computed_once_for_all_its_users(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    job = build_job(tiny.config())
    packs = record_packs(monkeypatch)
    table_of(job)
    prompts = {row.prompt_ids for row in job.rows}
    responses = {(row.prompt_ids, ids) for row in job.rows for ids in (row.chosen_ids, row.rejected_ids)}
    assert sum(len(pack.order) for pack in packs) == sum(map(len, prompts)) + sum(len(ids) for _, ids in responses)
