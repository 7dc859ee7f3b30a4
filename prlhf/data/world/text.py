"""`builtin:text`: prompts and responses about the training topics, all styles alike, to pretrain the built-in model."""

from __future__ import annotations

import random

from prlhf.data.records import ResponseRow
from prlhf.data.world.authored import load_heldout_topics, load_training_topics
from prlhf.data.world.render import (
    STYLES,
    draw_general_prompt,
    draw_instructions,
    make_requests,
    render,
    render_general,
)

GENERAL_SHARE = 0.8  # prompts about topics without known facts, for each one about a training topic
INSTRUCTED_SHARE = 0.35  # prompts that ask for a side of an axis, for each axis alone
INSTRUCTED_SHARE_SECOND = 0.6  # the same in the second stage, where instructions also stand behind the question
DEV_PROMPTS = 63  # times eight styles: about 500 rows


def build_text(seed: int, *, second_stage: bool = False) -> tuple[list[ResponseRow], list[ResponseRow]]:
    """(train, dev): each prompt about a training topic answered once in each of the eight styles, in random order.

    Among them, prompts about topics without known facts, answered in general: so the model stays fluent on topics it
    never met. Many prompts start by asking for a style, as users of an instructed model do, and get it.
    The second stage asks for styles more often, before or behind the question: what is asked far in front of a response
    is learned late by a small model.
    Dev has prompts of its own; the topics are the same. Nothing in either mentions a held-out topic.
    """
    rng = random.Random(f"text {seed}")
    requests = make_requests(load_training_topics())
    rng.shuffle(requests)
    answers = [(request.prompt, style, render(request, style, rng)) for request in requests for style in STYLES]
    for _ in range(int(GENERAL_SHARE * len(requests))):
        prompt = draw_general_prompt(rng)
        answers += [(prompt, style, render_general(style, rng)) for style in STYLES]
    rows = []
    for prompt, style, response in answers:
        share = INSTRUCTED_SHARE_SECOND if second_stage else INSTRUCTED_SHARE
        parts = [draw_instructions(style, rng, share=share), prompt]
        if second_stage and rng.random() < 0.5:
            parts.reverse()
        rows.append(ResponseRow(" ".join(parts).strip(), response))
    num_dev = DEV_PROMPTS * len(STYLES)
    dev, train = rows[:num_dev], rows[num_dev:]
    rng.shuffle(train)
    return train, dev


def heldout_prompts() -> list[str]:
    """Prompts about the held-out topics to generate from: every question, then every topic.

    Neighbours are about different topics, so that the first few prompts already span all of them.
    """
    topics = load_heldout_topics()
    questions = [topic.facts[index].question for index in range(len(topics[0].facts)) for topic in topics]
    return questions + [f"Tell me about {topic.name}." for topic in topics]
