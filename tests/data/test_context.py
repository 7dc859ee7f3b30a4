"""What an encoder reads: a row's answer never stands in it, and draws are functions of their key alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from prlhf.data.context import (
    NO_CONTEXT,
    UserContexts,
    UserFacts,
    collate_contexts,
    collect_facts,
    facts_from_record,
    facts_record,
)
from prlhf.data.records import Message, PreferenceRow
from prlhf.data.render import encode_text
from tests.tokenizers import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
ROWS = [
    PreferenceRow(f"p{i}", user, f"Tell me about {i}", f"good {i}", f"bad {i}", user_text=f"I am {user}.")
    for user in ("ann", "bob")
    for i in range(12)
]
ANN = ROWS[0]


def _contexts(kind: str = "history", rows: list[PreferenceRow] = ROWS, **limits: int) -> UserContexts:
    limits = {"max_tokens": 50, "max_pairs": 4, **limits}
    return UserContexts(kind, TOKENIZER, facts=collect_facts(rows), **limits)  # type: ignore[arg-type]


def _ids(text: str) -> tuple[int, ...]:
    return tuple(encode_text(TOKENIZER, text))


def test_a_text_context_is_the_rows_own_text_and_a_user_s_the_kept_one():
    contexts = _contexts("text")
    assert contexts.of_row(ANN, (0, 0)) == (_ids("I am ann."),)
    assert contexts.of_row(replace(ANN, user_text="I changed."), (0, 0)) == (_ids("I changed."),)
    assert contexts.of_user("bob", "anything") == (_ids("I am bob."),)
    assert contexts.of_row(replace(ANN, user_text=""), (0, 0)) == contexts.of_user("nobody", "x") == NO_CONTEXT


def test_texts_and_responses_are_cut():
    assert _contexts("text", max_tokens=3).read_text("I am ann.") == (_ids("I am ann.")[:3],)
    assert all(len(ids) == 2 for ids in _contexts(max_tokens=2).of_row(ANN, (0, 0)))


def test_a_history_holds_other_pairs_of_the_same_user():
    context = _contexts(max_pairs=11).of_row(ANN, (0, 0))
    pairs = set(zip(context[0::2], context[1::2], strict=True))
    assert pairs == {(_ids(f"good {i}"), _ids(f"bad {i}")) for i in range(1, 12)}
    assert _contexts().of_row(replace(ANN, user_id="eve"), (0, 0)) == NO_CONTEXT


@pytest.mark.parametrize(
    "other",
    [
        PreferenceRow("x", "ann", "tell me  about 0", "new", "newer"),
        PreferenceRow("x", "ann", (Message("user", "Tell me about 0"), Message("assistant", "good 0")), "new", "newer"),
        PreferenceRow("x", "ann", "What?", "good 0", "newer"),
        PreferenceRow("x", "ann", "What?", "Good  0", "newer"),
        PreferenceRow("x", "ann", "What?", "newer", "good 0"),
        PreferenceRow("x", "ann", "What?", "bad 0", "newer"),
        PreferenceRow("x", "ann", "What?", "newer", "bad 0"),
    ],
)
def test_no_pair_with_the_prompt_or_a_response_of_the_row_is_read(other):
    contexts = _contexts(rows=[other, *ROWS[1:3]], max_pairs=3)
    for key in range(5):
        assert len(contexts.of_row(ANN, (key, 0))) == 4, "the two pairs that share nothing"
    assert len(contexts.of_user("ann", ANN.prompt, (ANN.chosen, ANN.rejected))) == 4
    assert len(contexts.of_row(ROWS[5], (0, 0))) == 6, "other rows may read it"


def test_the_own_label_changes_nothing_and_another_pair_s_does():
    flipped = replace(ANN, chosen=ANN.rejected, rejected=ANN.chosen)
    other = replace(ROWS[1], chosen=ROWS[1].rejected, rejected=ROWS[1].chosen)
    for key in range(20):
        for training in (False, True):
            expected = _contexts(max_pairs=11).of_row(ANN, (1, key), training=training)
            own = _contexts(rows=[flipped, *ROWS[1:]], max_pairs=11).of_row(flipped, (1, key), training=training)
            assert own == expected
    changed = _contexts(rows=[ANN, other, *ROWS[2:]], max_pairs=11).of_row(ANN, (1, 0))
    assert changed != _contexts(max_pairs=11).of_row(ANN, (1, 0))


def test_training_draws_every_number_of_pairs_and_evaluation_the_most():
    contexts = _contexts()
    numbers = [len(contexts.of_row(ANN, (1, step, 0), training=True)) // 2 for step in range(60)]
    assert set(numbers) == {0, 1, 2, 3, 4}
    assert {len(contexts.of_row(ANN, (1, step))) for step in range(20)} == {8}


def test_a_draw_is_a_function_of_its_key():
    first, again = _contexts(), _contexts()
    again.of_row(ROWS[3], (9, 9))
    drawn = [first.of_row(ANN, (1, step, 0), training=True) for step in range(10)]
    assert drawn == [again.of_row(ANN, (1, step, 0), training=True) for step in range(10)]
    assert len(set(drawn)) > 5


def test_a_checkpoint_keeps_texts_or_a_few_pairs():
    texts = _contexts("text").to_keep(seed=1)
    assert texts == {"ann": UserFacts("I am ann."), "bob": UserFacts("I am bob.")}
    kept = _contexts().to_keep(seed=1)
    assert [len(facts.pairs) for facts in kept.values()] == [4, 4]
    assert all(pair.user_id == user for user, facts in kept.items() for pair in facts.pairs)
    assert facts_from_record(facts_record(kept), "contexts.json") == kept
    assert kept != _contexts().to_keep(seed=2)


def test_rows_without_a_judgment_are_no_facts():
    blank = [replace(ANN, chosen=" "), replace(ANN, rejected=ANN.chosen)]
    assert collect_facts(blank) == {"ann": UserFacts("I am ann.")}


def test_the_last_text_of_a_user_counts():
    rows = [replace(ANN, user_text="old"), replace(ANN, user_text="new"), replace(ANN, user_text="")]
    assert collect_facts(rows)["ann"].text == "new"


def test_contexts_are_padded_on_the_right_with_lengths():
    batch = collate_contexts([((5, 6, 7), (8,)), NO_CONTEXT, ((9,), (3, 4), (5,), (6,))], pad_id=2)
    assert batch.input_ids.shape == (3, 4, 3)
    assert batch.lengths.tolist() == [[3, 1, 0, 0], [0, 0, 0, 0], [1, 2, 1, 1]]
    assert batch.input_ids[0].tolist() == [[5, 6, 7], [8, 2, 2], [2, 2, 2], [2, 2, 2]]
    empty = collate_contexts([NO_CONTEXT, NO_CONTEXT], pad_id=2)
    assert empty.input_ids.shape == (2, 2, 1) and not empty.lengths.any()
