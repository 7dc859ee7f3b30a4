"""The built-in world: what it promises of its text, its splits and its labels, for any seed."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import cache

import pytest
from transformers import AutoTokenizer

from prlhf.data.records import PreferenceData, PreferenceRow, ResponseRow
from prlhf.data.world.authored import (
    TOPIC_FILES,
    Topic,
    Wording,
    load_general_text,
    load_heldout_topics,
    load_instructions,
    load_prompt_templates,
    load_tone,
    load_topic_file,
    load_topics,
    load_training_topics,
)
from prlhf.data.world.psoups import CLOSERS, OPENERS, build_psoups
from prlhf.data.world.render import AXES, STYLES, Style, make_requests
from prlhf.data.world.text import INSTRUCTED_SHARE, INSTRUCTED_SHARE_SECOND, build_text, heldout_prompts
from prlhf.data.world.tokenizer import train_tokenizer
from prlhf.evaluation.judges import RuleJudge

SEEDS = (0, 1, 20_260_801)
USERS = ["P1A", "P1B", "P2A", "P2B", "P3A", "P3B"]
TONES = {friendly: load_tone(friendly=friendly) for friendly in (False, True)}


@cache
def psoups(seed: int) -> PreferenceData:
    return build_psoups(seed)


@cache
def first_text() -> tuple[list[ResponseRow], list[ResponseRow]]:
    return build_text(0)


@cache
def second_text() -> tuple[list[ResponseRow], list[ResponseRow]]:
    return build_text(1, second_stage=True)


def split_sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?]) ", text)


def words_of(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def letters_a_word(sentence: str) -> float:
    return sum(letter.isalpha() for letter in sentence) / len(sentence.split())


def topic_wordings() -> list[Wording]:
    return [wording for topic in load_topics() for wording in wordings_of(topic)]


def wordings_of(topic: Topic) -> list[Wording]:
    return [topic.background, *(fact.wording for fact in topic.facts)]


def general_wordings() -> list[Wording]:
    return [*load_general_text().answers, *load_general_text().backgrounds]


def both_registers(wordings: list[Wording]) -> list[str]:
    return [wording.text(expert=expert) for wording in wordings for expert in (False, True)]


def general_asking() -> list[str]:
    """The questions of general.json, as shapes, and its topics."""
    return [*(shape for shape, _ in load_general_text().questions), *load_general_text().topics]


def every_instruction() -> list[str]:
    return [sentence for axis in AXES for side in (False, True) for sentence in load_instructions(axis, side=side)]


@cache
def sides() -> tuple[dict[str, bool], dict[str, bool], dict[str, bool]]:
    """The side of each authored sentence: openers (friendly), facts and general sentences (expert), closers."""
    wordings = topic_wordings() + general_wordings()
    return (
        {opener: friendly for friendly, tone in TONES.items() for opener in tone.openers},
        {wording.text(expert=expert): expert for wording in wordings for expert in (False, True)},
        {closer: friendly for friendly, tone in TONES.items() for closer in tone.closers},
    )


def read_style(response: str) -> Style:
    """The style, read from which authored sentences the response is made of; fails if they do not agree."""
    openers, facts, closers = sides()
    opener, *rest = split_sentences(response)
    tones = {openers[opener]}
    if len(rest) > 1:
        tones.add(closers[rest.pop()])
    registers = {facts[sentence] for sentence in rest}
    assert len(tones) == len(registers) == 1 and len(set(rest)) == len(rest) in (1, 3), response
    return Style(expert=registers.pop(), informative=len(rest) == 3, friendly=tones.pop())


def wins_of_longer(rows: list[PreferenceRow]) -> float:
    """Share of rows whose chosen response has more words than the rejected one; equal lengths count half."""
    gaps = [len(row.chosen.split()) - len(row.rejected.split()) for row in rows]
    return sum(1.0 if gap > 0 else 0.5 if gap == 0 else 0.0 for gap in gaps) / len(gaps)


def test_the_world_has_at_least_120_topics_to_train_on_and_six_held_out_in_each_file() -> None:
    assert len({topic.name for topic in load_training_topics()}) == len(load_training_topics()) >= 120
    heldout = set(load_heldout_topics())
    assert [len(heldout & set(load_topic_file(name))) for name in TOPIC_FILES] == [6, 6, 6, 6]
    assert not heldout & set(load_training_topics())


def test_no_authored_sentence_occurs_twice() -> None:
    counts = Counter(sentence for topic in load_topics() for sentence in topic.sentences())
    counts += Counter(sentence for tone in TONES.values() for sentence in (*tone.openers, *tone.closers))
    counts += Counter(both_registers(general_wordings()) + general_asking() + every_instruction())
    assert [sentence for sentence, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("wordings", [topic_wordings, general_wordings])
def test_sentences_keep_to_their_register_in_8_to_13_words(wordings: Callable[[], list[Wording]]) -> None:
    """At most 4.3 letters a word if simple, at least 6.6 if expert: the openers and closers cannot blur that."""
    for wording in wordings():
        for sentence in (wording.simple, wording.expert):
            assert sentence.isascii() and re.fullmatch(r"[A-Z][^.!?]+[.]", sentence), sentence
            assert 8 <= len(sentence.split()) <= 13, sentence
        assert letters_a_word(wording.simple) <= 4.3, wording.simple
        assert letters_a_word(wording.expert) >= 6.6, wording.expert


def test_phrases_are_varied_neutral_in_register_and_of_one_tone_only() -> None:
    openings = Counter(tuple(opener.lower().split()[:2]) for tone in TONES.values() for opener in tone.openers)
    assert max(openings.values()) <= 6
    for friendly, tone in TONES.items():
        assert len(tone.openers) >= 48 and len(tone.closers) >= 32
        for phrase in (*tone.openers, *tone.closers):
            words = re.findall(r"[a-z]+", phrase.lower())
            assert phrase.isascii() and re.fullmatch(r"[A-Z][A-Za-z, ]+[.!]", phrase), phrase
            assert 4 <= len(words) <= 9 and 3.1 <= sum(map(len, words)) / len(words) <= 4.9, phrase
            assert set(words) & tone.words and not set(words) & TONES[not friendly].words, phrase


def test_openers_and_closers_alone_hold_warm_or_cold_words() -> None:
    """Instructions aside: they stand in prompts, and what they ask for may be named."""
    templates = load_prompt_templates()
    neutral = [*templates.question, *templates.topic, *general_asking(), *both_registers(general_wordings())]
    neutral += [sentence for topic in load_topics() for sentence in topic.sentences()]
    toned = TONES[True].words | TONES[False].words
    assert [sentence for sentence in neutral if toned & words_of(sentence)] == []


def test_general_text_and_instructions_name_no_heldout_topic_not_even_one_of_it() -> None:
    """Neither 'maps' nor 'map', 'compasses' nor 'compass'."""
    texts = both_registers(general_wordings()) + general_asking() + every_instruction()
    names = [topic.name for topic in load_heldout_topics()]
    forms = {form for name in names for form in (name, name.removesuffix("s"), name.removesuffix("es"))}
    named = re.compile(rf"\b({'|'.join(sorted(forms))})\b", re.IGNORECASE)
    assert [text for text in texts if named.search(text)] == []


def test_general_topics_are_not_among_the_topics_with_facts() -> None:
    def stem(name: str) -> str:
        return name.lower().removeprefix("the ").removesuffix("s")

    general = [stem(name) for name in load_general_text().topics]
    assert len(general) >= 250 and not set(general) & {stem(topic.name) for topic in load_topics()}


def test_instructions_are_single_sentences_that_ask_for_one_side_and_no_prompt_holds_them_otherwise() -> None:
    templates = load_prompt_templates()
    prompts = set(split_sentences(" ".join(templates.question + templates.topic)))
    for axis in AXES:
        opposed = [set(load_instructions(axis, side=side)) for side in (False, True)]
        assert len(opposed[0]) == len(opposed[1]) == 12 and not opposed[0] & opposed[1]
        for sentence in opposed[0] | opposed[1]:
            assert re.fullmatch(r"[A-Z][^.!?{]+[.]", sentence) and sentence not in prompts, sentence


def test_all_prompts_about_the_topics_differ() -> None:
    prompts = [request.prompt for request in make_requests(load_topics())]
    assert len(prompts) == len(set(prompts)) == 144 * (16 + 4 * 12)


def test_pretraining_text_has_all_eight_styles_equally_often_also_where_none_is_asked_for() -> None:
    """Every prompt is answered in all styles; which answers are asked for their style is drawn: 4 sd of a binomial."""
    train, dev = first_text()
    instructions = set(every_instruction())
    counts: Counter[Style] = Counter()
    uninstructed: Counter[Style] = Counter()
    for row in train:
        style = read_style(row.response)
        counts[style] += 1
        uninstructed[style] += split_sentences(row.prompt)[0] not in instructions
    assert dict.fromkeys(STYLES, len(train) / 8) == counts
    share = (1 - INSTRUCTED_SHARE) ** 3
    for count in uninstructed.values():
        assert abs(count - share * len(train) / 8) < 4 * (share * (1 - share) * len(train) / 8) ** 0.5
    assert len(train) >= 100_000 and 480 <= len(dev) <= 520
    assert not {row.prompt for row in train} & {row.prompt for row in dev}


@pytest.mark.parametrize(("text", "share"), [(first_text, INSTRUCTED_SHARE), (second_text, INSTRUCTED_SHARE_SECOND)])
def test_an_instruction_in_a_prompt_agrees_with_the_side_that_the_judge_finds_in_the_response(
    text: Callable[[], tuple[list[ResponseRow], list[ResponseRow]]], share: float
) -> None:
    """In 4,000 rows; each axis is asked for once at most, and in the stated share of rows (0.04 is 5 sd)."""
    judge = RuleJudge()
    asks = {
        instruction: (axis, 1 if side else -1)
        for axis in AXES
        for side in (False, True)
        for instruction in load_instructions(axis, side=side)
    }
    counts: Counter[str] = Counter()
    for row in text()[0][:4000]:
        asked = [asks[sentence] for sentence in split_sentences(row.prompt) if sentence in asks]
        axes = Counter(axis for axis, _ in asked)
        assert all(judge.side(row.response, axis) == side for axis, side in asked), row
        assert max(axes.values(), default=0) <= 1, row
        counts += axes
    assert all(abs(counts[axis] / 4000 - share) < 0.04 for axis in AXES)


@cache
def text_sentences() -> frozenset[str]:
    """The distinct sentences of every prompt and response, train and dev, of both stages."""
    rows = [row for part in (*first_text(), *second_text()) for row in part]
    return frozenset(split_sentences(" ".join(f"{row.prompt} {row.response}" for row in rows)))


def test_pretraining_text_names_no_heldout_topic_and_holds_none_of_its_sentences() -> None:
    """As phrases: 'maps', not 'map'."""
    everything = "\n".join(sorted(text_sentences()))
    for topic in load_heldout_topics():
        assert re.search(rf"\b{topic.name.lower()}\b", everything.lower()) is None, topic.name
        assert not any(sentence in everything for sentence in topic.sentences()), topic.name


def test_pretraining_text_covers_every_training_fact_general_sentence_topic_and_instruction() -> None:
    wordings = general_wordings()
    for topic in load_training_topics():
        wordings += wordings_of(topic)
    assert {*both_registers(wordings), *every_instruction()} <= text_sentences()
    everything = "\n".join(text_sentences())
    assert [topic for topic in load_general_text().topics if topic not in everything] == []


@pytest.mark.parametrize("seed", SEEDS)
def test_opposed_users_judge_the_same_pair_with_opposite_labels(seed: int) -> None:
    data = psoups(seed)
    for rows in (data.train, data.dev, data.eval_seen):
        judged = defaultdict(list)
        for row in rows:
            judged[row.pair_id].append(row)
        for first, second in judged.values():
            assert (first.user_id, second.user_id) in [("P1A", "P1B"), ("P2A", "P2B"), ("P3A", "P3B")]
            assert (first.prompt, first.chosen, first.rejected) == (second.prompt, second.rejected, second.chosen)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_user_prefers_one_side_of_one_axis_and_the_other_axes_are_equal(seed: int) -> None:
    """The sides are the paper's preference prompts: simple, expert, concise, informative, friendly, unfriendly."""
    taste = {
        "P1A": ("expert", False), "P1B": ("expert", True), "P2A": ("informative", False),
        "P2B": ("informative", True), "P3A": ("friendly", True), "P3B": ("friendly", False),
    }  # fmt: skip
    data = psoups(seed)
    other_axes = defaultdict(Counter)
    for row in data.train + data.dev + data.eval_seen:
        chosen, rejected = vars(read_style(row.chosen)), vars(read_style(row.rejected))
        axis, side = taste[row.user_id]
        assert (chosen.pop(axis), rejected.pop(axis)) == (side, not side)
        assert chosen == rejected
        other_axes[axis][tuple(chosen.values())] += 1
    for counts in other_axes.values():
        assert len(counts) == 4 and min(counts.values()) > 0.18 * sum(counts.values())


@pytest.mark.parametrize("seed", SEEDS)
def test_splits_share_no_prompt_and_evaluation_is_about_heldout_topics_alone(seed: int) -> None:
    data = psoups(seed)
    train, dev, evaluation = ({row.prompt for row in rows} for rows in (data.train, data.dev, data.eval_seen))
    assert not train & dev and not (train | dev) & evaluation
    assert evaluation <= {request.prompt for request in make_requests(load_heldout_topics())}
    known = {row.prompt for row in data.train if not row.pair_id.startswith("general-")}
    assert known | dev <= {request.prompt for request in make_requests(load_training_topics())}
    assert data.eval_unseen == []


@pytest.mark.parametrize("seed", SEEDS)
def test_half_of_training_is_about_topics_without_facts_in_sentences_of_any_topic(seed: int) -> None:
    general = load_general_text()
    answers = {text for wording in general.answers for text in (wording.simple, wording.expert)}
    pairs = [row for row in psoups(seed).train if row.pair_id.startswith("general-")]
    assert Counter(row.user_id for row in pairs) == dict.fromkeys(USERS, 400)
    for row in pairs:
        assert any(text in row.chosen for text in answers) and any(text in row.rejected for text in answers), row
        assert any(topic in str(row.prompt) for topic in general.topics), row


@pytest.mark.parametrize("seed", SEEDS)
def test_every_user_has_800_rows_to_train_on_and_200_to_be_evaluated_on(seed: int) -> None:
    data = psoups(seed)
    assert Counter(row.user_id for row in data.train) == dict.fromkeys(USERS, 800)
    assert Counter(row.user_id for row in data.eval_seen) == dict.fromkeys(USERS, 200)
    assert 0.04 < len(data.dev) / (len(data.train) + len(data.dev)) < 0.06
    assert data.user_ids() == USERS


def test_a_world_of_preferences_uses_some_phrases_of_each_tone_and_another_world_others() -> None:
    used = []
    for seed in SEEDS:
        data = psoups(seed)
        rows = data.train + data.dev + data.eval_seen
        sentences = {sentence for row in rows for sentence in split_sentences(f"{row.chosen} {row.rejected}")}
        for tone in TONES.values():
            phrases = sentences & set(tone.openers), sentences & set(tone.closers)
            assert [len(part) for part in phrases] == [OPENERS, CLOSERS]
            used.append(frozenset().union(*phrases))
    assert len(set(used)) == len(SEEDS) * 2


@pytest.mark.parametrize("seed", SEEDS)
def test_length_is_at_chance_on_register_and_tone_without_knowing_the_user(seed: int) -> None:
    """Choosing the longer one is right for half of an axis' rows, whatever the world.

    Who knows the user can use length on the register axis: expert words are long, by definition, and expert sentences
    have a word less on average (simple ones have more words in about 0.77 of the pairs). On the tone axis a world's
    phrases are drawn until their mean lengths match, so 200 pairs stay within chance: 3.4 sd of a share are 0.12.
    """
    rows = defaultdict(list)
    for row in psoups(seed).eval_seen:
        rows[row.user_id].append(row)
    assert wins_of_longer(rows["P1A"] + rows["P1B"]) == wins_of_longer(rows["P3A"] + rows["P3B"]) == 0.5
    assert abs(wins_of_longer(rows["P3A"]) - 0.5) < 0.12
    assert wins_of_longer(rows["P1A"]) < 0.85
    assert wins_of_longer(rows["P2B"]) == 1.0


def test_the_same_seed_gives_the_same_world_and_another_seed_another() -> None:
    assert build_psoups(0) == psoups(0) and build_text(0) == first_text()
    for rows in ("train", "dev", "eval_seen"):
        pairs = [{(row.prompt, row.chosen) for row in getattr(psoups(seed), rows)} for seed in (0, 1)]
        assert len(pairs[0] & pairs[1]) < 0.05 * len(pairs[0])
    responses = [{row.response for row in dev} for _, dev in (first_text(), second_text())]
    assert len(responses[0] & responses[1]) < 0.05 * len(responses[0])


def test_generation_prompts_ask_about_every_heldout_topic_early() -> None:
    prompts = heldout_prompts()
    names = {topic.name for topic in load_heldout_topics()}
    assert len(prompts) == len(set(prompts)) == 24 * 5
    assert set(prompts) <= {request.prompt for request in make_requests(load_heldout_topics())}
    request_topic = {request.prompt: request.topic.name for request in make_requests(load_heldout_topics())}
    assert {request_topic[prompt] for prompt in prompts[:24]} == names


@pytest.fixture(scope="module")
def tokenizer():  # noqa: ANN201
    return train_tokenizer([f"{row.prompt}\n{row.response}" for row in first_text()[1]], vocab_size=600)


def test_any_text_survives_the_tokenizer(tokenizer) -> None:  # noqa: ANN001
    every_byte = "".join(map(chr, range(1, 0x250))) + "漢字 😀 \x00 \r\n\t  <eos> <bos> \U0010ffff"
    ids = tokenizer(every_byte, add_special_tokens=False, split_special_tokens=True).input_ids
    assert tokenizer.decode(ids) == every_byte
    assert not set(ids) & set(tokenizer.all_special_ids)


def test_the_tokenizer_has_three_special_tokens_and_adds_none(tokenizer) -> None:  # noqa: ANN001
    assert len(tokenizer) == 600 and tokenizer.chat_template is None
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert tokenizer("Tell me.").input_ids == tokenizer("Tell me.", add_special_tokens=False).input_ids


def test_the_tokenizer_is_deterministic_and_survives_the_disk(tokenizer, tmp_path) -> None:  # noqa: ANN001
    texts = [f"{row.prompt}\n{row.response}" for row in first_text()[1]]
    assert train_tokenizer(texts, vocab_size=600).get_vocab() == tokenizer.get_vocab()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert all(loaded(line).input_ids == tokenizer(line).input_ids for line in texts[:20])
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<bos>", "<eos>", "<pad>")
