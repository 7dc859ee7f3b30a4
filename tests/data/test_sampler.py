"""The order of rows: every row once an epoch, the same whatever the world size or the step one starts from."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from prlhf.data.sampler import Sampler, cut_microbatches, cut_packs, cut_rows, shard

BATCH_ROWS = st.integers(1, 12)
GROUPS = st.lists(st.integers(0, 9), min_size=1, max_size=40)


@given(groups=GROUPS, batch_rows=BATCH_ROWS, seed=st.integers(0, 2**32), epoch=st.integers(0, 3))
def test_an_epoch_shows_every_row_once_and_only_its_last_step_is_smaller(
    groups: list[int], batch_rows: int, seed: int, epoch: int
) -> None:
    sampler = Sampler(groups, batch_rows=batch_rows, seed=seed)
    steps = sampler.steps_per_epoch
    batches = [sampler.rows_of_step(step) for step in range(epoch * steps, (epoch + 1) * steps)]
    rows = [row for batch in batches for row in batch]
    assert sorted(rows) == list(range(len(groups)))
    assert all(len(batch) == batch_rows for batch in batches[:-1]) and 1 <= len(batches[-1]) <= batch_rows
    changes = sum(groups[before] != groups[after] for before, after in zip(rows, rows[1:], strict=False))
    assert changes == len(set(groups)) - 1


def test_epochs_and_seeds_have_orders_of_their_own_and_a_step_is_a_pure_function() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return Sampler(range(100), batch_rows=100, seed=seed).rows_of_step(epoch)

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(rows) for rows in orders}) == 4
    assert orders[3] == order(1, 1)
    assert all(rows != sorted(rows) for rows in orders)
    sampler = Sampler(range(100), batch_rows=100, seed=1)
    assert [sampler.rows_of_step(epoch) for epoch in (1, 0, 1)] == [orders[3], orders[2], orders[3]]


def test_groups_and_rows_within_them_come_in_an_order_of_their_own() -> None:
    groups = ["a", "b"] * 50
    sampler = Sampler(groups, batch_rows=100, seed=0)
    orders = [sampler.rows_of_step(epoch) for epoch in range(20)]
    assert {groups[rows[0]] for rows in orders} == {"a", "b"}
    assert all(sorted(rows[:50]) != rows[:50] for rows in orders)


@given(num_rows=st.integers(0, 40), world_size=st.integers(1, 9))
def test_shards_are_contiguous_cover_the_batch_and_differ_by_at_most_one_row(num_rows: int, world_size: int) -> None:
    batch = list(range(100, 100 + num_rows))
    shards = [shard(batch, rank, world_size) for rank in range(world_size)]
    assert [row for rows in shards for row in rows] == batch
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@given(st.lists(st.integers(1, 30), max_size=25), st.integers(1, 60))
def test_microbatches_hold_every_row_once_within_the_padded_budget(lengths: list[int], budget: int) -> None:
    microbatches = cut_microbatches(range(len(lengths)), lengths.__getitem__, budget)
    assert sorted(row for rows in microbatches for row in rows) == list(range(len(lengths)))
    for rows in microbatches:
        assert len(rows) == 1 or len(rows) * max(lengths[row] for row in rows) <= budget
    flat = [lengths[row] for rows in microbatches for row in rows]
    assert flat == sorted(lengths, reverse=True)


def test_microbatches_are_as_full_as_the_budget_allows() -> None:
    lengths = {3: 30, 4: 40, 5: 50, 6: 10, 7: 10}
    assert cut_microbatches([3, 4, 5, 6, 7], lengths.__getitem__, 80) == [[5], [4, 3], [6, 7]]


@given(groups=GROUPS, batch_rows=BATCH_ROWS, seed=st.integers(0, 2**32), steps=st.lists(st.integers(0, 60), max_size=6))
def test_a_step_shows_the_same_rows_whichever_steps_came_before_it(
    groups: list[int], batch_rows: int, seed: int, steps: list[int]
) -> None:
    used = Sampler(groups, batch_rows=batch_rows, seed=seed)
    for step in steps:
        assert used.rows_of_step(step) == Sampler(groups, batch_rows=batch_rows, seed=seed).rows_of_step(step)


@given(lengths=st.lists(st.integers(1, 30), max_size=25), budget=st.integers(1, 60))
def test_packs_hold_every_row_once_in_order_and_are_as_full_as_the_budget_allows(
    lengths: list[int], budget: int
) -> None:
    packs = cut_packs(range(len(lengths)), lengths.__getitem__, budget)
    assert [row for rows in packs for row in rows] == list(range(len(lengths)))
    totals = [sum(lengths[row] for row in rows) for rows in packs]
    assert all(total <= budget or len(rows) == 1 for total, rows in zip(totals, packs, strict=True))
    assert all(total + lengths[rows[0]] > budget for total, rows in zip(totals, packs[1:], strict=False))


def test_packs_are_filled_in_order_up_to_the_limit():
    lengths = {3: 4, 4: 6, 5: 1, 6: 30, 7: 9, 8: 1}
    assert cut_packs([3, 4, 5, 6, 7, 8], lengths.__getitem__, 10) == [[3, 4], [5], [6], [7, 8]]
    assert cut_packs([], lengths.__getitem__, 10) == []


def test_rows_of_a_group_are_side_by_side_and_cut_apart_only_where_no_micro_batch_holds_them():
    lengths, group = {3: 4, 4: 6, 5: 1, 6: 4, 7: 9, 8: 1}, {3: "a", 4: "b", 5: "a", 6: "b", 7: "c", 8: "c"}
    cut = cut_packs([3, 4, 5, 6, 7, 8], lengths.__getitem__, 10, group.__getitem__)
    assert cut == [[3, 5], [4, 6], [7, 8]]
    assert cut_packs([3, 4, 5, 6, 7, 8], lengths.__getitem__, 10, lambda row: 0) == [[3, 4], [5, 6], [7, 8]]
    assert cut_packs([3, 4, 5, 6, 7, 8], lengths.__getitem__, 99, group.__getitem__) == [[3, 5, 4, 6, 7, 8]]


@given(
    rows=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 4)), max_size=25), budget=st.integers(1, 60)
)
def test_packs_of_groups_hold_every_row_once_within_the_budget(rows: list[tuple[int, int]], budget: int) -> None:
    packs = cut_packs(range(len(rows)), lambda i: rows[i][0], budget, lambda i: rows[i][1])
    assert sorted(row for pack in packs for row in pack) == list(range(len(rows)))
    assert all(pack for pack in packs)
    assert all(sum(rows[row][0] for row in pack) <= budget or len(pack) == 1 for pack in packs)
    for key in {key for _, key in rows}:
        if sum(length for length, own in rows if own == key) <= budget:
            assert sum(any(rows[row][1] == key for row in pack) for pack in packs) == 1


def test_rows_that_cannot_be_packed_are_padded_apart_from_those_that_can():
    lengths = {3: 4, 4: 30, 5: 6, 6: 1, 7: 20, 8: 9}
    options = {"num_packed": lengths.__getitem__, "num_padded": lambda row: 2 * lengths[row], "microbatch_tokens": 80}
    assert cut_rows([3, 4, 5, 6, 7, 8], packs=lambda row: lengths[row] < 10, **options) == [[3, 5, 6, 8], [4], [7]]
    assert cut_rows([3, 4, 5, 6, 7, 8], packs=lambda row: False, **options) == [[4], [7, 8], [5, 3, 6]]
    assert cut_rows([], packs=lambda row: True, **options) == []


@given(groups=GROUPS, batch_rows=BATCH_ROWS, num_steps=st.integers(0, 50))
def test_rows_of_first_steps_are_those_of_each_step(groups: list[int], batch_rows: int, num_steps: int) -> None:
    sampler = Sampler(groups, batch_rows=batch_rows, seed=5)
    one_by_one = {row for step in range(num_steps) for row in sampler.rows_of_step(step)}
    assert sampler.rows_of_first_steps(num_steps) == one_by_one
