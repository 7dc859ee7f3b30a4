"""`builtin:tldr`: posts with shorter and longer summaries, judged by workers who look at length alone."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from prlhf.data.records import PreferenceData, ResponseRow
from prlhf.data.tldr import TASTE_SEED, Comparison, draw_tastes, make_preferences, rank_workers
from prlhf.data.world.authored import load_posts
from prlhf.data.world.posts import PLANS, draw_posts

TRAIN_POSTS, EVAL_POSTS = 1700, 200
TEXT_POSTS, TEXT_DEV_POSTS = 6000, 240
NUM_USERS, NUM_UNSEEN = 10, 10
JUDGES = 3  # workers a training post; a held-out post is judged by all
MOST_ACTIVE = 1.6  # how much more often the most active worker judges than the least active one
MINORITY = range(2, 5)  # how many of ten workers may prefer the shorter summary


def build_tldr(seed: int) -> PreferenceData:
    """Preference data of ten workers, with the protocol of the paper's experiment on TL;DR.

    The ten most active of twenty workers are the users; the other ten judge held-out posts alone. Tastes are drawn by
    the paper's rule from its legacy seed plus `seed`, so in world 0 the workers 4, 5 and 6 by activity prefer the
    shorter summary, as in the paper. Where fewer than two or more than four of either ten do, all are drawn again: both
    tastes occur and the longer summary has the majority in every world. train and dev share no post; eval_seen and
    eval_unseen are about situations that no training post tells of.
    """
    rng = random.Random(f"tldr {seed}")
    workers = [f"W{number:02d}" for number in range(1, NUM_USERS + NUM_UNSEEN + 1)]
    rng.shuffle(workers)
    active = workers[:NUM_USERS]
    train, validation = [], []
    for post in draw_posts(load_posts().training, TRAIN_POSTS, rng, reserved=False):
        pair = post.summary_pair(rng)
        train += [Comparison(post.prompt, pair, worker) for worker in _draw_judges(active, rng)]
    for post in draw_posts(load_posts().heldout, EVAL_POSTS, rng, reserved=True):
        pair = post.summary_pair(rng)
        validation += [Comparison(post.prompt, pair, worker) for worker in workers]
    ranked = rank_workers(train, validation)
    users, unseen = ranked[:NUM_USERS], ranked[NUM_USERS:]
    generator = np.random.RandomState(TASTE_SEED + seed)
    tastes = draw_tastes(ranked, generator)
    while not all(sum(not tastes[worker] for worker in group) in MINORITY for group in (users, unseen)):
        tastes = draw_tastes(ranked, generator)
    data, _ = make_preferences(train, validation, tastes, users=users, seed=seed, source="builtin:tldr")
    return data


def build_tldr_text(seed: int) -> tuple[list[ResponseRow], list[ResponseRow]]:
    """(train, dev): posts with a summary as running text, for the model that preference training starts from.

    All situations, those that preference training holds out too, and summaries of one to four sentences alike; none of
    the posts that are reserved for evaluation.
    """
    rng = random.Random(f"tldr text {seed}")
    situations = (*load_posts().training, *load_posts().heldout)
    posts = draw_posts(situations, TEXT_POSTS + TEXT_DEV_POSTS, rng, reserved=False)
    rows = [ResponseRow("", f"{post.prompt}\n{post.summarize(rng.choice(list(PLANS)), rng)}") for post in posts]
    dev, train = rows[:TEXT_DEV_POSTS], rows[TEXT_DEV_POSTS:]
    rng.shuffle(train)
    return train, dev


def _draw_judges(workers: Sequence[str], rng: random.Random) -> list[str]:
    """Some of the workers, the first MOST_ACTIVE times as often as the last."""
    step = (MOST_ACTIVE - 1) / (len(workers) - 1)
    keys = {worker: rng.random() ** (1 / (MOST_ACTIVE - step * rank)) for rank, worker in enumerate(workers)}
    return sorted(workers, key=keys.__getitem__)[-JUDGES:]
