"""Answers of many rows at a time: finished rows leave the batch, waiting ones take their places."""

from __future__ import annotations

import contextlib
import inspect
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from prlhf.data.context import Context, collate_contexts
from prlhf.generation.choose import Answer, choose_tokens
from prlhf.generation.options import SamplingOptions
from prlhf.generation.slots import SlotCache
from prlhf.models.backbone import input_embedding, pad_token_id
from prlhf.models.packing import PROBE_TOLERANCE, reads_trees
from prlhf.models.policy import PersonalizedPolicy

logger = logging.getLogger(__name__)

SPARE_COLUMNS = 64
PREFILL_TOKENS = 512  # at a time: larger calls leave the cache of the CPU, and a longest row pads the others
# A prompt read alone costs as much as a step of all rows, so prompts wait until this share of the batch is free.
JOIN_SHARE = 1 / 8
# Users' soft prompts are read once, ahead of their prompts, where that spares this share of all positions: attention to
# what was read before costs more than plain causal attention, on the CPU as much as a share of 1/25 gains.
HEAD_SHARE = 1 / 8
MAX_HEADS = 256  # at a time: their keys and values stay in memory
WINDOW_ROWS = 8  # attended to at a time, so that short rows do not read the long ones' length in pads
# Why a backbone is answered from one row at a time; None: it need not be.
_REFUSALS: weakref.WeakKeyDictionary[nn.Module, str | None] = weakref.WeakKeyDictionary()


class Request(NamedTuple):
    """What one row is answered; equal requests are read once where they join together.

    Args:
        prompt_ids: BOS first where the tokenizer has one.
        user_id: 0 is generic, None no soft prompt.
        context: what an encoder reads about the user; None for the generic user.
    """

    prompt_ids: tuple[int, ...]
    user_id: int | None
    context: Context | None


def decode(
    policy: PersonalizedPolicy,
    requests: Sequence[Request],
    answers: Sequence[Answer],
    options: SamplingOptions,
    *,
    batch_rows: int,
    on_batch: Callable[[], None],
) -> None:
    """Fill the answers to the requests; needs an evaluating policy.

    Args:
        requests: N, the longest first.
        batch_rows: rows at the same time.
        on_batch: called before prompts are read; may raise to stop.
    """
    refusal = _refusal(policy.backbone)
    if refusal is not None:
        logger.warning(
            "generation: %s is answered from one row at a time: %s", type(policy.backbone).__name__, refusal
        )
        for request, answer in zip(requests, answers, strict=True):
            on_batch()
            _decode_alone(policy, request, answer)
        return
    num_slots = min(batch_rows, len(requests))
    longest = max((len(request.prompt_ids) for request in requests), default=0) + policy.soft_prompt.num_user_tokens
    spare = SPARE_COLUMNS if len(requests) > num_slots else 0
    batch = _Batch(policy, SlotCache(num_slots, longest + options.max_new_tokens + spare))
    readers = _shared_heads(policy, requests)
    if readers:
        on_batch()
        batch.read_heads_(readers)
    joined = 0
    while batch.answers or joined < len(requests):
        waiting, free = len(requests) - joined, num_slots - len(batch.answers)
        if not batch.answers or free >= min(waiting, JOIN_SHARE * num_slots):
            end = min(len(requests), joined + free)
            while joined < end:
                on_batch()
                # The longest comes first, so it says how wide the call is.
                most = max(1, PREFILL_TOKENS // len(requests[joined].prompt_ids))
                new = slice(joined, min(end, joined + most))
                batch.join_(requests[new], answers[new])
                joined = new.stop
        batch.step_(options)


class _Batch:
    """The rows that are being answered.

    The backbone reads a prompt but for its last position, and that one in the row's first step: there are no logits
    of prompts.
    """

    def __init__(self, policy: PersonalizedPolicy, cache: SlotCache) -> None:
        self.policy = policy
        self.cache = cache
        self.answers: list[Answer] = []
        self.embeds: list[Tensor] = []  # (D,) each, what the rows read next
        self.heads: dict[_Reader, int] = {}  # places of BOS and soft prompt in the cache; of nobody, or of every reader

    def read_heads_(self, readers: Sequence[_Reader]) -> None:
        """Read BOS and soft prompt of each user once, whatever number of prompts goes on from there."""
        self.heads = {reader: place for place, reader in enumerate(readers)}
        most = max(1, PREFILL_TOKENS // self.policy.soft_prompt.num_head)
        for start in range(0, len(readers), most):
            heads = [Request(*reader) for reader in readers[start : start + most]]
            with self.cache.reading_heads():
                _read(self.policy.backbone, _embed(self.policy, heads)[0], self.cache)

    def join_(self, requests: Sequence[Request], answers: Sequence[Answer]) -> None:
        """Read prompts, equal ones once, and let their rows take part."""
        places = {request: place for place, request in enumerate(dict.fromkeys(requests))}
        sources = [places[request] for request in requests]
        read, heads, num_head = list(places), None, 0
        if self.heads:
            heads = [self.heads[_reader(self.policy, request)] for request in read]
            num_head = self.policy.soft_prompt.num_head
            read = [Request(request.prompt_ids[self.policy.soft_prompt.num_bos :], None, None) for request in read]
        embeds, lengths = _embed(self.policy, read)
        with self.cache.joining(sources, [num_head + lengths[source] - 1 for source in sources], heads):
            if self.heads or embeds.shape[1] > 1:
                _read(self.policy.backbone, embeds[:, : max(1, embeds.shape[1] - 1)], self.cache)
        self.embeds += [embeds[source, lengths[source] - 1] for source in sources]
        self.answers += answers

    def step_(self, options: SamplingOptions) -> None:
        """Give every row a token; rows that end leave, and the last ones take their slots."""
        logits = read_next_(self.policy.backbone, self.cache, torch.stack(self.embeds)[:, None])
        tokens = choose_tokens(self.answers, logits, options)
        ended = [answer.add(token) for answer, token in zip(self.answers, tokens, strict=True)]
        if any(ended):
            kept = [row for row, has_ended in enumerate(ended) if not has_ended]
            movers = [row for row in kept if row >= len(kept)]
            rows = [movers.pop() if ended[row] else row for row in range(len(kept))]
            self.cache.keep_(rows)
            self.answers = [self.answers[row] for row in rows]
            tokens = [tokens[row] for row in rows]
        read_next = torch.tensor(tokens, dtype=torch.int64, device=self.policy.device)
        self.embeds = list(input_embedding(self.policy.backbone)(read_next))


_Reader = tuple[tuple[int, ...], int | None, Context | None]  # what a head depends on


def _reader(policy: PersonalizedPolicy, request: Request) -> _Reader:
    return request.prompt_ids[: policy.soft_prompt.num_bos], request.user_id, request.context


def _shared_heads(policy: PersonalizedPolicy, requests: Sequence[Request]) -> list[_Reader]:
    """Whose BOS and soft prompt are read ahead of the prompts: everybody's where that spares much of the reading."""
    readers = list(dict.fromkeys(_reader(policy, request) for request in requests))
    if len(readers) > MAX_HEADS or any(user is None for _, user, _ in readers):
        return []
    soft_prompt = policy.soft_prompt
    lengths = [len(request.prompt_ids) for request in set(requests)]
    spared = (len(lengths) - len(readers)) * soft_prompt.num_head
    pays = spared >= HEAD_SHARE * (sum(lengths) + len(lengths) * soft_prompt.num_user_tokens)
    return readers if pays and min(lengths, default=0) > soft_prompt.num_bos else []


def read_next_(backbone: nn.Module, cache: SlotCache, embeds: Tensor) -> Tensor:
    """Logits (N, V) after one position more of every row of the cache.

    Args:
        embeds: (N, 1, D).
    """
    cache.make_room_()
    lengths = torch.tensor(cache.lengths, device=embeds.device)[:, None]
    options: dict[str, Any] = {}
    if len(set(cache.lengths)) > 1:
        width = max(cache.lengths)
        mask = torch.arange(width + 1, device=embeds.device) >= width - lengths
        options["attention_mask"] = mask.long()
        if reads_trees(backbone):
            starts = range(0, len(cache.lengths), WINDOW_ROWS)
            windows = [slice(start, start + WINDOW_ROWS) for start in starts]
            options["windows"] = [(rows, width - max(cache.lengths[rows])) for rows in windows]
    logits = _read(backbone, embeds, cache, position_ids=lengths, **options)
    cache.grow_()
    return logits[:, -1]


def _read(backbone: nn.Module, embeds: Tensor, cache: SlotCache, **options: Any) -> Tensor:
    return backbone(inputs_embeds=embeds, past_key_values=cache, use_cache=True, logits_to_keep=1, **options).logits


def _embed(policy: PersonalizedPolicy, requests: Sequence[Request]) -> tuple[Tensor, list[int]]:
    """Embeddings (N, L, D) of BOS soft prompt text, padded on the right, and their lengths."""
    pad_id = pad_token_id(policy.tokenizer)
    longest = max(len(request.prompt_ids) for request in requests)
    padded = torch.tensor(
        [[*request.prompt_ids, *[pad_id] * (longest - len(request.prompt_ids))] for request in requests],
        dtype=torch.int64,
        device=policy.device,
    )
    users = [request.user_id for request in requests if request.user_id is not None]
    contexts = [request.context for request in requests if request.context is not None]
    embeds = policy.input_embeds(
        padded,
        torch.tensor(users, device=policy.device) if users else None,
        collate_contexts(contexts, pad_id).to(policy.device) if contexts else None,
    )
    num_soft = embeds.shape[1] - longest
    return embeds, [len(request.prompt_ids) + num_soft for request in requests]


def _refusal(backbone: nn.Module) -> str | None:
    """Why a backbone cannot be answered from in slots; tried once, because no list of families stays true."""
    if backbone not in _REFUSALS:
        try:
            with torch.autocast(next(backbone.parameters()).device.type, enabled=False):
                _REFUSALS[backbone] = _probe(backbone)
        except Exception as problem:  # a family may refuse the cache, the mask or the positions in any way
            _REFUSALS[backbone] = f"{type(problem).__name__}: {problem}".splitlines()[0]
    return _REFUSALS[backbone]


def _probe(backbone: nn.Module) -> str | None:
    """What differs between rows in slots and the same rows whole; None if they agree."""
    embedding = input_embedding(backbone)
    weight = next(embedding.parameters())
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(weight.shape[0], (3, 8), generator=generator).to(weight.device)
    embeds, cache = embedding(ids), SlotCache(2, 7)
    rows: list[int] = []
    differences = []

    def join(row: int, length: int, num_head: int = 0) -> None:
        """Read the first tokens of a row, or those after a head that was read before."""
        with cache.joining([0], [length], [0] if num_head else None):
            _read(backbone, embeds[row : row + 1, num_head:length], cache)
        rows.append(row)

    def step() -> None:
        """Read one token more of every row, and compare."""
        ends = [length + 1 for length in cache.lengths]
        new = torch.stack([embeds[row, end - 1 : end] for row, end in zip(rows, ends, strict=True)])
        logits = read_next_(backbone, cache, new)
        whole = [embeds[row : row + 1, :end] for row, end in zip(rows, ends, strict=True)]
        expected = torch.cat([backbone(inputs_embeds=x, use_cache=False).logits[:, -1] for x in whole])
        differences.append(float((logits - expected).float().norm() / expected.float().norm()))

    join(0, 5)
    join(1, 3)
    step()
    step()
    cache.keep_([rows.index(1)])
    rows.remove(0)
    with cache.reading_heads():
        _read(backbone, embeds[2:, :2], cache)
    join(2, 4, num_head=2)
    step()  # in the last column: the rows move first
    if not all(difference < PROBE_TOLERANCE[weight.dtype] for difference in differences):
        return f"its logits over rows in slots are off by {max(differences):.1e}"
    return None


def _decode_alone(policy: PersonalizedPolicy, request: Request, answer: Answer) -> None:
    """Through transformers' own generation, which knows every family's cache, where it takes embeddings."""
    embeds, _ = _embed(policy, [request])
    backbone: Any = policy.backbone
    if "inputs_embeds" not in inspect.signature(backbone.prepare_inputs_for_generation).parameters:
        _decode_whole(policy, embeds, answer)
        return
    settings = GenerationConfig(
        max_new_tokens=answer.options.max_new_tokens,
        do_sample=False,  # `_Choice` draws
        eos_token_id=sorted(answer.stop_ids),
        pad_token_id=pad_token_id(policy.tokenizer),
    )
    stops = StoppingCriteriaList([_Ended(answer)])
    choice = LogitsProcessorList([_Choice(answer)])
    with _no_defaults(policy.backbone):
        backbone.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.int64, device=embeds.device),
            generation_config=settings,
            logits_processor=choice,
            stopping_criteria=stops,
        )


def _decode_whole(policy: PersonalizedPolicy, embeds: Tensor, answer: Answer) -> None:
    """All that stands before a token is read again for it: slow, and right for any family.

    Args:
        embeds: (1, L, D) of the prompt.
    """
    embedding, ended = input_embedding(policy.backbone), False
    while not ended:
        logits = policy.backbone(inputs_embeds=embeds, use_cache=False).logits[:, -1]
        (token,) = choose_tokens([answer], logits, answer.options)
        ended = answer.add(token)
        embeds = torch.cat([embeds, embedding(torch.tensor([[token]], device=embeds.device))], dim=1)


class _Choice(LogitsProcessor):
    """Leaves the answer's next token alone."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = choose_tokens([self.answer], scores, self.answer.options)
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor(token, device=scores.device), 0.0)


class _Ended(StoppingCriteria):
    """Hands each token to the answer, which says when it has ended."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        ended = self.answer.add(int(input_ids[0, -1]))
        return torch.tensor([ended], device=input_ids.device)


@contextlib.contextmanager
def _no_defaults(backbone: nn.Module) -> Iterator[None]:
    """Sets aside the sampling defaults of the model's folder, which `generate` would add to ours."""
    model = cast(Any, backbone)
    theirs = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = theirs
