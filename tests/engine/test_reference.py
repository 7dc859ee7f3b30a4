"""Reference log-probs: computed before the first step or in each step, they are the same numbers."""

from __future__ import annotations

import resource
import shutil
import tracemalloc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prlhf.data.collate import collate_pairs
from prlhf.data.tokenize import TokenizedPair
from prlhf.distributed import rank
from prlhf.engine import reference, trainer
from prlhf.engine.build import Job, build_job
from prlhf.engine.reference import LiveReference, ReferenceCache, ReferenceTable, compute_reference_table
from prlhf.engine.trainer import train
from prlhf.errors import RunDirError
from prlhf.evaluation.scoring import Scores, TokenSequence
from prlhf.models.packing import Pack
from prlhf.models.policy import PersonalizedPolicy
from tests.run_distributed import run_distributed_test
from tests.tiny_run import THINGS, Tiny, perturb_, perturbed_job, read_metrics, snapshot, write_model


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
    for kind in ("live", "precomputed"):
        train(tiny.config(model__reference=kind, train__max_steps=2), tmp_path / kind)
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


def scored_sequences(packs: list[Pack]) -> int:
    return sum(len(pack.last) for pack in packs)


def test_a_kept_table_is_read_bitwise_and_nothing_is_scored_again(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "PART_SEQUENCES", 4)
    job = build_job(tiny.config())
    packs = record_packs(monkeypatch)
    cache = ReferenceCache(tmp_path / "cache", {"weights": job.model.base_sha256})
    first = table_of(job, cache=cache)
    assert scored_sequences(packs) == 2 * len(THINGS)
    packs.clear()
    second = table_of(perturb_(job), cache=cache)
    assert not packs
    assert torch.equal(first.chosen, second.chosen) and torch.equal(first.rejected, second.rejected)


def test_other_weights_or_other_tokens_are_scored_anew(tiny: Tiny, tmp_path: Path) -> None:
    def kept() -> set[Path]:
        return set((tmp_path / ".reference").iterdir())

    config = tiny.config(train__max_steps=2)
    train(config, tmp_path / "run")
    before = kept()
    train(replace(config, user=replace(config.user, num_user_tokens=5)), tmp_path / "users")
    assert kept() == before, "the reference has no soft prompt"
    train(replace(config, train=replace(config.train, precision="bf16")), tmp_path / "bf16")
    assert len(kept()) == 2 * len(before)
    other = Tiny(write_model(tmp_path / "model", seed=1), tiny.data).config(train__max_steps=2)
    train(other, tmp_path / "other")
    assert len(kept()) == 3 * len(before)
    train(tiny.config(train__max_steps=2, data__max_prompt_tokens=8), tmp_path / "cut")
    assert len(kept()) == 4 * len(before)


@pytest.mark.parametrize("damage", ["empty", "half", "flipped bit", "of another part", "of another shape"])
def test_a_damaged_file_is_computed_again(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    job = build_job(tiny.config())
    cache = ReferenceCache(tmp_path, {})
    first = table_of(job, cache=cache)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[-40] ^= 1  # in the log-probs: the last 32 bytes are their hash
    if damage == "of another shape":
        table_of(job, job.rows[:2], cache=cache)
        (other,) = set(tmp_path.iterdir()) - {path}
        other.replace(path)
    elif damage == "of another part":
        save_file({"logps": torch.zeros(2 * len(THINGS)), "sha256": torch.zeros(32, dtype=torch.uint8)}, path)
    else:
        path.write_bytes({"empty": b"", "half": whole[: len(whole) // 2]}.get(damage, bytes(changed)))
    again = table_of(job, cache=cache)
    assert torch.equal(first.chosen, again.chosen) and torch.equal(first.rejected, again.rejected)
    assert "damaged" in caplog.text
    assert path.read_bytes() == whole


def test_a_pass_that_was_stopped_goes_on_where_it_was(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "PART_SEQUENCES", 4)
    job = build_job(tiny.config())
    cache = ReferenceCache(tmp_path, {})
    packs = record_packs(monkeypatch)

    def stop() -> None:
        if len(packs) == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        table_of(job, cache=cache, on_batch=stop)
    assert len(list(tmp_path.iterdir())) == 3
    stopped = table_of(job, cache=cache)
    assert scored_sequences(packs) == 2 * len(THINGS), "no part was scored twice"
    assert torch.equal(stopped.chosen, table_of(job).chosen)


def test_an_unwritable_cache_is_one_line(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError, match="cannot be written"):
        table_of(build_job(tiny.config()), cache=ReferenceCache(tmp_path / "file", {}))


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


class NoModel:
    """A reference that is never asked: `scored_by_sum` answers in its place."""

    device = torch.device("cpu")

    @contextmanager
    def active(self) -> Iterator[None]:
        yield


def sum_of(ids: Sequence[int]) -> float:
    return -float(sum(place * token for place, token in enumerate(ids, start=1)))


@pytest.fixture
def scored_by_sum(monkeypatch: pytest.MonkeyPatch) -> list[TokenSequence]:
    """A response's log-prob is a sum over its tokens and its prompt's; what was asked for, in order."""
    asked: list[TokenSequence] = []

    def score(policy: None, part: list[TokenSequence], users: None, **options: Any) -> Scores:
        asked.extend(part)
        values = torch.tensor([sum_of(sequence.prompt_ids + sequence.response_ids) for sequence in part])
        return Scores(values, torch.ones(len(part), dtype=torch.int64))

    monkeypatch.setattr(reference, "score_sequences", score)
    return asked


def pair_of(row: int, prompt: int) -> TokenizedPair:
    """The prompt has ids of its own, the responses have not, so that only both together tell sequences apart."""
    return TokenizedPair(row, 1, (1, prompt, prompt // 7), (prompt % 5, 3), (4, row % 2))


def sum_table(rows: list[TokenizedPair], cache: ReferenceCache | None = None) -> ReferenceTable:
    options: dict[str, Any] = {"pad_id": 0, "microbatch_tokens": 100, "autocast": nullcontext}
    return compute_reference_table(NoModel(), rows, cache=cache, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", ["none", "in front", "last", "in the middle", "gone"])
def test_a_changed_prompt_scores_only_the_part_it_falls_into(
    tmp_path: Path, scored_by_sum: list[TokenSequence], change: str
) -> None:
    cache = ReferenceCache(tmp_path, {})
    rows = [pair_of(row, prompt=row // 2) for row in range(8000)]
    sum_table(rows, cache)
    assert len(scored_by_sum) == len(set(scored_by_sum)) == len({
        (row.prompt_ids, response) for row in rows for response in row.responses
    })
    num_parts = len(list(tmp_path.iterdir()))
    assert num_parts > 20
    scored_by_sum.clear()
    places = {"in front": 0, "in the middle": 4000, "last": 8000}
    if change in places:
        rows.insert(places[change], pair_of(8001, prompt=10**6))
    elif change == "gone":
        del rows[4000:4002]
    table = sum_table(rows, cache)
    changed_parts = len(list(tmp_path.iterdir())) - num_parts
    assert (len(scored_by_sum), changed_parts) == (0, 0) if change == "none" else 0 < changed_parts <= 2
    assert len(scored_by_sum) <= 2 * reference.PART_SEQUENCES
    for row in rows[::97] + rows[:2] + rows[-2:]:
        expected = [sum_of(row.prompt_ids + response) for response in row.responses]
        assert [table.chosen[row.row].item(), table.rejected[row.row].item()] == expected


def test_no_part_is_larger_than_what_may_be_lost(scored_by_sum: list[TokenSequence]) -> None:
    """Even of one prompt with very many responses."""
    rows = [TokenizedPair(row, 1, (1, 2), (3, row), (4, row)) for row in range(1000)]
    sizes = [stop - start for start, stop in reference._parts(reference._find_distinct(rows).prompts)]
    assert sum(sizes) == 2000 and max(sizes) == reference.PART_SEQUENCES
    assert sum_table(rows).rejected[999].item() == sum_of((1, 2, 4, 999))


def test_the_look_up_takes_a_few_bytes_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is made 24 for the hashes of each sequence and some numbers; then 8, mapped from a file."""
    zeros = Scores(torch.zeros(1), torch.ones(1, dtype=torch.int64))
    monkeypatch.setattr(reference, "score_sequences", lambda *args, **options: zeros)
    rows = [pair_of(row, prompt=row) for row in range(50_000)]
    tracemalloc.start()
    table = sum_table(rows)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200 * len(rows)
    maps = Path("/proc/self/maps")
    if maps.exists():
        spans = [line.split() for line in maps.read_text().splitlines() if line.endswith("(deleted)")]
        bounds = [tuple(int(end, 16) for end in span[0].split("-")) for span in spans]
        assert any(low <= table.chosen.data_ptr() < high for low, high in bounds)


def score_on_this_rank(tiny: Tiny, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "PART_SEQUENCES", 4)
        packs = record_packs(patch)
        table = table_of(build_job(tiny.config()), cache=ReferenceCache(folder / "cache", {}))
        scored = torch.tensor(scored_sequences(packs))
        save_file({"chosen": table.chosen.clone(), "rejected": table.rejected.clone(), "scored": scored},
                  folder / f"rank-{rank()}.safetensors")


def test_each_of_two_ranks_scores_parts_and_both_have_the_table_of_one(tiny: Tiny, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    score_on_this_rank(tiny, tmp_path / "one")
    run_distributed_test(score_on_this_rank, 2, tiny, tmp_path / "two")
    alone = load_file(tmp_path / "one" / "rank-0.safetensors")
    ranks = [load_file(tmp_path / "two" / f"rank-{number}.safetensors") for number in range(2)]
    assert all(tensors["scored"] > 0 for tensors in ranks)
    assert sum(int(tensors["scored"]) for tensors in ranks) == int(alone["scored"]) == 2 * len(THINGS)
    for tensors in ranks:
        assert torch.equal(tensors["chosen"], alone["chosen"]) and torch.equal(tensors["rejected"], alone["rejected"])
    one, two = (snapshot(tmp_path / name / "cache") for name in ("one", "two"))
    assert one.keys() == two.keys() and len(one) > 2
    assert all(one[name][1] == two[name][1] for name in one)


def test_a_full_disk_is_one_line(tiny: Tiny, tmp_path: Path) -> None:
    """A limit on file sizes stands in for the disk."""
    cache = ReferenceCache(tmp_path / "cache", {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(RunDirError, match="cannot be written .*; free space") as caught:
            cache.put([TokenSequence((1,), (2,))] * 999, torch.zeros(999))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(caught.value.messages) == 1 and list((tmp_path / "cache").iterdir()) == []


def test_a_table_that_the_folder_for_temporary_files_has_no_room_for_is_refused(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = build_job(tiny.config())
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=100))
    with pytest.raises(RunDirError, match="0 MiB free for temporary files, about 1 MiB needed.*TMPDIR"):
        table_of(job)
