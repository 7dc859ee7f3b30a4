"""Groups of parameters and their rates, the schedule, the clip."""

from __future__ import annotations

import math
import resource
import shutil

import pytest
import torch
from torch import nn

from benchmarks.memory import memory_kib
from prlhf.distributed import rank, world_size
from prlhf.engine.build import build_job
from prlhf.engine.optim import (
    all_reduce_gradients_,
    check_room_of_rows,
    clip_gradients_,
    make_optimizer,
    set_learning_rate_,
    warmup_cosine,
)
from prlhf.errors import RunDirError
from prlhf.usermodel import IndividualUserModel, LowRankUserModel, row_table
from tests.run_distributed import run_distributed_test
from tests.tiny_run import Tiny


def groups_of(optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float, int]]:
    return {
        group["name"]: (group["lr"], group["weight_decay"], len(group["params"])) for group in optimizer.param_groups
    }


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # 7 linear layers in each of 2 blocks, A and B each
        ("individual", {"model": (0.01, 0.2, 28), "users": (0.02, 0.0, 1), "user_rows": (0.02, 0.0, 1)}),
        ("uniform", {"model": (0.01, 0.2, 28), "users": (0.02, 0.0, 1)}),
        ("cluster", {"model": (0.01, 0.2, 28), "users": (0.02, 0.0, 1), "cluster_weights": (0.03, 0.0, 1)}),
        ("history", {"model": (0.01, 0.2, 28), "users": (0.02, 0.0, 1), "encoder": (0.04, 0.2, 4)}),
    ],
)
def test_each_part_has_its_rate_and_only_model_and_encoder_decay(
    tiny: Tiny, kind: str, expected: dict[str, tuple[float, float, int]]
) -> None:
    config = tiny.config(
        user__kind=kind,
        train__lr=0.01,
        train__user_lr=0.02,
        train__cluster_lr=0.03,
        train__encoder_lr=0.04,
        train__weight_decay=0.2,
    )
    job = build_job(config)
    assert groups_of(job.optimizer) == expected
    in_groups = {id(parameter) for group in job.optimizer.param_groups for parameter in group["params"]}
    assert in_groups == {id(parameter) for parameter in job.model.parameters() if parameter.requires_grad}


@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_full_fine_tuning_without_users_is_one_group_of_the_whole_backbone(tiny: Tiny, method: str) -> None:
    job = build_job(tiny.config(method=method, model__lora=None))
    assert groups_of(job.optimizer) == {"model": (0.01, 0.0, len(list(job.model.backbone.parameters())))}


def _table_optimizer(num_users: int = 3) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    table = nn.Parameter(torch.arange(num_users * 4.0).view(num_users, 2, 2))
    parameters = {"user_encoder.offsets": table, "w": nn.Parameter(torch.ones(2))}
    optimizer = make_optimizer(parameters, lr=0.1, user_lr=0.1, cluster_lr=0.1, encoder_lr=0.1, weight_decay=0.0)
    return table, optimizer


def _gradient(step: int, rows: list[int]) -> torch.Tensor:
    gradient = torch.zeros(3, 2, 2)
    for row in rows:
        gradient[row] = torch.randn(2, 2, generator=torch.Generator().manual_seed(10 * step + row))
    return gradient


def test_users_without_a_row_in_the_step_stay_bitwise_where_they_were() -> None:
    table, optimizer = _table_optimizer()
    table.grad = _gradient(0, [0, 1, 2])
    optimizer.step()
    before = table.detach().clone()
    moments = {slot: value.clone() for slot, value in optimizer.state[table].items()}
    for step in range(1, 6):
        table.grad = _gradient(step, [1])
        optimizer.step()
    for tensor, start in [(table, before), *((optimizer.state[table][slot], moments[slot]) for slot in moments)]:
        assert torch.equal(tensor[[0, 2]], start[[0, 2]])
        assert not torch.equal(tensor[1], start[1])


def test_a_user_in_every_step_moves_as_under_plain_adamw() -> None:
    table, optimizer = _table_optimizer()
    plain = nn.Parameter(table.detach().clone())
    expected = torch.optim.AdamW([plain], lr=0.1, weight_decay=0.0)
    for step in range(7):
        table.grad = _gradient(step, [0, 1] if step % 2 else [0])
        plain.grad = _gradient(step, [0])
        optimizer.step()
        expected.step()
    torch.testing.assert_close(table[0], plain[0], rtol=1e-5, atol=1e-5)  # fused float32 steps of 0.1


def test_a_late_users_first_step_is_as_long_as_an_early_ones() -> None:
    """Adam's first step is the rate times the gradient's sign."""
    table, optimizer = _table_optimizer()
    before = table.detach().clone()
    for step in range(20):
        table.grad = _gradient(step, [0])
        optimizer.step()
    table.grad = _gradient(20, [2])
    optimizer.step()
    expected = before[2] - 0.1 * _gradient(20, [2])[2].sign()
    torch.testing.assert_close(table.detach()[2], expected, rtol=0, atol=1e-6)


def test_schedule_moves_every_group_by_the_same_factor() -> None:
    names = ("w", "user_encoder.generic", "user_encoder.weights", "user_encoder.encoder.heads")
    parameters = {name: nn.Parameter(torch.zeros(1)) for name in names}
    optimizer = make_optimizer(
        parameters, lr=1.0, user_lr=10.0, cluster_lr=100.0, encoder_lr=1000.0, weight_decay=0.0
    )
    for factor in (0.5, 0.25):  # of the base rate, not of the last one
        set_learning_rate_(optimizer, factor)
        assert [group["lr"] for group in optimizer.param_groups] == [factor * rate for rate in (1, 10, 100, 1000)]


def test_warmup_cosine_follows_the_formula() -> None:
    """Warm-up (step + 1) / 4; then (1 + cos(pi * (step - 4) / 8)) / 2: 1 at step 4, 1/2 at 8, 0 at 12."""
    factors = [warmup_cosine(step, warmup_steps=4, max_steps=12) for step in range(13)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[6] == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert factors[8] == pytest.approx(0.5)
    assert factors[10] == pytest.approx((1 - math.sqrt(0.5)) / 2)
    assert factors[12] == pytest.approx(0.0)


def test_no_warmup_starts_at_the_full_rate() -> None:
    assert warmup_cosine(0, warmup_steps=0, max_steps=10) == 1.0


def test_a_run_shorter_than_its_warmup_is_all_warmup() -> None:
    assert [warmup_cosine(step, warmup_steps=4, max_steps=2) for step in range(2)] == [0.25, 0.5]


def test_clip_scales_all_gradients_by_the_global_norm() -> None:
    parameters = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    for parameter, gradient in zip(parameters, (3.0, 4.0), strict=True):
        parameter.grad = torch.tensor([gradient])
    assert float(clip_gradients_(parameters, 1.0)) == pytest.approx(5.0)
    assert [parameter.grad.item() for parameter in parameters] == pytest.approx([0.6, 0.8], abs=1e-5)


def test_clip_leaves_a_small_gradient_alone() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([0.3, 0.4])
    assert float(clip_gradients_([parameter], 1.0)) == pytest.approx(0.5)
    assert parameter.grad.tolist() == pytest.approx([0.3, 0.4])


def _train_users(steps: int = 5) -> dict[str, torch.Tensor]:
    """Parameters and moments of a user model after steps of two micro-batches, on this rank's rows of them."""
    model = IndividualUserModel(num_users=6, num_user_tokens=2, dim=3)
    parameters = {f"user_encoder.{name}": parameter for name, parameter in model.named_parameters()}
    optimizer = make_optimizer(parameters, lr=0.1, user_lr=0.1, cluster_lr=0.1, encoder_lr=0.1, weight_decay=0.0)
    targets = torch.randn(steps, 6, 2, 3, generator=torch.Generator().manual_seed(0))
    for step in range(steps):
        for user_ids in ([0, 3, 3, 5], [1 + step % 2, 0, 3, 0]):
            mine = torch.tensor(user_ids)[rank() :: world_size()]
            (model(mine) - targets[step][mine]).square().sum().backward()
        all_reduce_gradients_(parameters.values())
        clip_gradients_(list(parameters.values()), 5.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    moments = optimizer.state[model.offsets]
    return {name: value.detach().clone() for name, value in {**parameters, **moments}.items()}


def _assert_trained_like(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5)  # sums in another order, then Adam


def test_a_large_table_trains_as_a_small_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    small = _train_users()
    assert small["step"].tolist() == [3.0, 2.0, 5.0, 0.0, 5.0, 0.0]  # users 1 to 6, counted by hand
    monkeypatch.setattr(row_table, "LARGE_TABLE_BYTES", 0)
    large = _train_users()
    _assert_trained_like(large, small)
    assert torch.equal(large["user_encoder.offsets"][[3, 5]], torch.zeros(2, 2, 3))


def _train_users_of_a_large_table(expected: dict[str, torch.Tensor]) -> None:
    row_table.LARGE_TABLE_BYTES = 0
    _assert_trained_like(_train_users(), expected)


@pytest.mark.slow
def test_ranks_sum_the_rows_of_a_large_table() -> None:
    """User 5 and users 1 and 2 are on one rank only."""
    run_distributed_test(_train_users_of_a_large_table, 2, _train_users())


def test_rows_that_will_not_find_room_on_the_disk_are_refused_before_they_are_written(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=64 * 2**20))
    large = IndividualUserModel(num_users=1_000_000, num_user_tokens=10, dim=384)  # 15 KiB a row, thrice, and a page
    check_room_of_rows(large.parameters(), 1000)
    with pytest.raises(RunDirError, match="64 MiB free for temporary files, about 96 MiB needed; make room.*TMPDIR"):
        check_room_of_rows(large.parameters(), 2000)
    small = IndividualUserModel(num_users=2000, num_user_tokens=1, dim=384)
    check_room_of_rows(small.parameters(), 2000)


def test_a_large_table_costs_what_its_rows_cost() -> None:
    """A million users of 15 KiB are 46 GB with their moments; eight of them are read and trained."""
    model = IndividualUserModel(num_users=1_000_000, num_user_tokens=10, dim=384)
    model.init_(torch.ones(10, 384))
    parameters = {f"user_encoder.{name}": parameter for name, parameter in model.named_parameters()}
    optimizer = make_optimizer(parameters, lr=0.1, user_lr=0.1, cluster_lr=0.1, encoder_lr=0.1, weight_decay=0.0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model(torch.arange(1, 1_000_000, 125_000)).square().sum().backward()
    all_reduce_gradients_(parameters.values())
    clip_gradients_(list(parameters.values()), 1.0)
    optimizer.step()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20 * 1024  # KiB
    assert model.offsets[125_000].abs().min() > 0 and not model.offsets[125_001].any()


@pytest.mark.parametrize("kind", ["individual", "low-rank"])
def test_rows_that_were_trained_do_not_stay_in_memory(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps touch 160 MB of rows and moments, of which small rows take whole pages; what is let go is not lost."""
    sizes = {"num_users": 1_000_000, "num_user_tokens": 10, "dim": 384}
    model = IndividualUserModel(**sizes) if kind == "individual" else LowRankUserModel(rank=16, **sizes)
    initial = torch.arange(1.0, model.num_initial + 1)[:, None, None].expand(-1, 10, 384)  # B w has a slope in every w
    model.init_(initial if kind == "low-rank" else initial[0])
    parameters = {f"user_encoder.{name}": parameter for name, parameter in model.named_parameters()}
    optimizer = make_optimizer(parameters, lr=0.1, user_lr=0.1, cluster_lr=0.1, encoder_lr=0.1, weight_decay=0.0)
    monkeypatch.setattr("prlhf.engine.optim.RESIDENT_BYTES", 8 * 2**20)
    users = torch.arange(1, 10_001).view(-1, 100) * (1 if kind == "individual" else 97)
    for step, some in enumerate(users[:33] if kind == "individual" else users):
        model(some).sum().backward()
        all_reduce_gradients_(parameters.values())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not step:  # what comes with the first step is taken
            before = memory_kib()["VmRSS"]
    assert memory_kib()["VmRSS"] - before < 40 * 1024
    if kind == "individual":
        trained = model.offsets[:3300]
        # Every gradient is 1 and every step a first one: a rate each.
        torch.testing.assert_close(trained, torch.full_like(trained, -0.1), rtol=0, atol=1e-6)
        assert not model.offsets[3300].any()
    else:
        assert model.table[users.flatten() - 1].abs().sum(1).min() > 0
        assert not model.table[1].any()
