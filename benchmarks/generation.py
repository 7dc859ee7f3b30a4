"""Greedy answers on this machine: a batch of users against the authors' way, one prompt at a time without a cache.

    python -m benchmarks.generation --repeats 5 --out generation.json --document docs/benchmarks.md

The model is `builtin:tiny`, every prompt has a user of its own and 10 soft tokens, lengths are log-normal, and every
answer is 64 tokens long (EOS is made unlikely). The authors' way is transformers' `generate` on ids with
`use_cache=False`; it answers only some of the prompts in each repeat, evenly spread over their lengths. Both run in one
process, in random order within a repeat; what is reported is the median over repeats of the ratio of tokens/s. On one
thread seconds are the processor's, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from benchmarks.document import describe_run, write_section
from prlhf.data.user_index import UserIndex
from prlhf.evaluation.report import make_table
from prlhf.generation import SamplingOptions, generate_ids
from prlhf.models.backbone import BUILTIN_TINY, embedding_dim, input_embedding, load_backbone
from prlhf.models.packing import set_up_packing_
from prlhf.models.policy import PersonalizedPolicy
from prlhf.usermodel import IndividualUserModel

NUM_NEW_TOKENS = 64
NUM_USER_TOKENS = 10
MEAN_PROMPT_TOKENS, SPREAD = 250, 0.35
NUM_PROMPTS = (8, 32)
NEAR_TIE = 1e-4  # rounding may decide between the two best tokens when their logits are closer
FIRST_ORDINARY_TOKEN = 3


class Row(NamedTuple):
    """A prompt, BOS first, and its user."""

    prompt: list[int]
    user_id: int


def make_policy(num_users: int) -> PersonalizedPolicy:
    """The built-in model with random users, whose answers do not end."""
    backbone, tokenizer = load_backbone(BUILTIN_TINY)
    set_up_packing_(backbone)
    eos = torch.tensor([tokenizer.eos_token_id])
    backbone.get_output_embeddings().register_forward_hook(lambda module, args, logits: logits.index_fill(-1, eos, -99))
    dim = embedding_dim(backbone)
    encoder = IndividualUserModel(num_users=num_users, num_user_tokens=NUM_USER_TOKENS, dim=dim)
    generator = torch.Generator().manual_seed(0)
    encoder.init_(0.05 * torch.randn(NUM_USER_TOKENS, dim, generator=generator))
    with torch.no_grad():
        encoder.offsets.copy_(0.05 * torch.randn(encoder.offsets.shape, generator=generator))
    users = UserIndex([f"u{i}" for i in range(num_users)])
    return PersonalizedPolicy(backbone, tokenizer, user_encoder=encoder, users=users).eval()


def draw_rows(policy: PersonalizedPolicy, count: int, rng: np.random.Generator) -> list[Row]:
    """Random prompts of users 1, 2, ..."""
    lengths = rng.lognormal(np.log(MEAN_PROMPT_TOKENS) - SPREAD**2 / 2, SPREAD, count).round().astype(int)
    vocab_size, bos = len(policy.tokenizer), policy.tokenizer.bos_token_id
    return [
        Row([bos, *rng.integers(FIRST_ORDINARY_TOKEN, vocab_size, max(1, length)).tolist()], user)
        for user, length in enumerate(lengths.tolist(), 1)
    ]


def prlhf_answers(policy: PersonalizedPolicy, rows: Sequence[Row], *, batch_rows: int) -> list[list[int]]:
    """All rows in one batch."""
    options = SamplingOptions(max_new_tokens=NUM_NEW_TOKENS, temperature=0)
    return generate_ids(
        policy, [row.prompt for row in rows], [row.user_id for row in rows], options=options, batch_rows=batch_rows
    )


@torch.no_grad()
def authors_answers(policy: PersonalizedPolicy, rows: Sequence[Row]) -> list[list[int]]:
    """One row at a time, everything before a token read again for it."""
    settings = GenerationConfig(
        max_new_tokens=NUM_NEW_TOKENS, do_sample=False, use_cache=False, pad_token_id=policy.tokenizer.pad_token_id
    )
    answers, embedding = [], input_embedding(policy.backbone)
    backbone: Any = policy.backbone
    assert policy.user_encoder is not None
    for row in rows:
        soft_prompt = policy.user_encoder(torch.tensor([row.user_id]))
        # Ordinary tokens reserve the soft prompt's places, as in the authors' code.
        ids = torch.tensor([[row.prompt[0], *[FIRST_ORDINARY_TOKEN] * NUM_USER_TOKENS, *row.prompt[1:]]])
        hook = embedding.register_forward_hook(_in_reserved_places(soft_prompt))
        out = backbone.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        hook.remove()
        answers.append(out[0, ids.shape[1] :].tolist())
    return answers


def _in_reserved_places(soft_prompt: Tensor) -> Callable[..., Tensor]:
    def hook(module: Any, args: Any, embeds: Tensor) -> Tensor:
        return torch.cat([embeds[:, :1], soft_prompt, embeds[:, 1 + NUM_USER_TOKENS :]], dim=1)

    return hook


@torch.no_grad()
def is_near_tie(policy: PersonalizedPolicy, row: Row, answer: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two different answers part where the two best logits are within `NEAR_TIE`."""
    step = next(i for i, (ours, theirs) in enumerate(zip(answer, other, strict=True)) if ours != theirs)
    ids = torch.tensor([[*row.prompt, *answer[:step]]])
    embeds = policy.input_embeds(ids, torch.tensor([row.user_id]))
    best = policy.backbone(inputs_embeds=embeds, use_cache=False).logits[0, -1].topk(2).values
    return bool(best[0] - best[1] < NEAR_TIE)


def measure(
    num_prompts: int, *, repeats: int, authors_rows: int, seed: int, clock: Callable[[], float]
) -> dict[str, Any]:
    """Medians over repeats, the ratios of all, and how many of the compared answers agree."""
    policy, rng = make_policy(num_prompts), np.random.default_rng(seed)
    ratios, rates, parted, ties, compared = [], [], 0, 0, 0
    stride = max(1, num_prompts // authors_rows)
    for repeat in range(repeats + 1):
        rows = sorted(draw_rows(policy, num_prompts, rng), key=lambda row: len(row.prompt))
        some = range(int(rng.integers(stride)), num_prompts, stride)
        ways: dict[str, Callable[[], list[list[int]]]] = {
            "prlhf": lambda rows=rows: prlhf_answers(policy, rows, batch_rows=num_prompts),
            "authors": lambda rows=rows, some=some: authors_answers(policy, [rows[i] for i in some]),
        }
        if not repeat:  # the first one warms up
            ways["authors"] = lambda rows=rows: authors_answers(policy, rows[:1])
        answers, speeds = {}, {}
        for way in rng.permutation(list(ways)).tolist():
            began = clock()
            answers[way] = ways[way]()
            speeds[way] = sum(map(len, answers[way])) / (clock() - began)
        if not repeat:
            continue
        ratios.append(speeds["prlhf"] / speeds["authors"])
        rates.append((speeds["prlhf"], speeds["authors"]))
        sys.stderr.write(f"{num_prompts} prompts: {ratios[-1]:.1f}\n")
        for i, theirs in zip(some, answers["authors"], strict=True):
            ours, compared = answers["prlhf"][i], compared + 1
            if ours != theirs:
                parted += 1
                ties += is_near_tie(policy, rows[i], ours, theirs)
    ours, theirs = (statistics.median(speeds) for speeds in zip(*rates, strict=True))
    return {
        "prompts": num_prompts,
        "authors_tokens_per_s": theirs,
        "prlhf_tokens_per_s": ours,
        "ratios": ratios,
        "answers_compared": compared,
        "answers_equal": compared - parted,
        "answers_parted_at_a_near_tie": ties,
    }


def format_results(results: Sequence[dict[str, Any]]) -> str:
    """A row a number of prompts."""
    header = ["prompts", "authors' way, tokens/s", "prlhf, tokens/s", "ratio", "range", "answers that agree"]
    rows = [
        [
            str(result["prompts"]),
            f"{result['authors_tokens_per_s']:.0f}",
            f"{result['prlhf_tokens_per_s']:.0f}",
            f"{statistics.median(result['ratios']):.1f}",
            f"{min(result['ratios']):.1f} to {max(result['ratios']):.1f}",
            f"{result['answers_equal']} of {result['answers_compared']}, "
            f"{result['answers_parted_at_a_near_tie']} after a near tie",
        ]
        for result in results
    ]
    return make_table(header, rows)


def main() -> None:
    """Measure 8 and 32 prompts; print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=int, nargs="+", default=list(NUM_PROMPTS))
    parser.add_argument("--authors-rows", type=int, default=4, help="prompts that the authors' way answers a repeat")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    parser.add_argument("--document", type=Path, help="also put the table into this Markdown file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    settings = {"repeats": args.repeats, "authors_rows": args.authors_rows, "seed": args.seed, "clock": clock}
    results = [measure(count, **settings) for count in args.prompts]
    table = format_results(results)
    sys.stdout.write(table + "\n")
    setting = {"torch": torch.__version__, "threads": args.threads, "repeats": args.repeats, "seed": args.seed}
    if args.out:
        args.out.write_text(json.dumps({"setting": setting, "results": results}, indent=2) + "\n", encoding="utf-8")
    if args.document:
        about = describe_run("python -m benchmarks.generation", **setting)
        write_section(args.document, "generation", f"{about}\n\n{table}")


if __name__ == "__main__":
    main()
