"""Rows of a batch -> one line of tokens without padding, on which sequences with a common prefix share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from prlhf.data.collate import PairBatch, ResponseBatch
from prlhf.data.context import ContextBatch
from prlhf.models.backbone import decoder
from prlhf.models.shared_prefix import ATTENTION
from prlhf.models.trees import Trees

# Settings under which a query sees only so many positions back: packs with longer paths are left to padded rows.
WINDOW_KEYS = ("sliding_window", "attention_chunk_size")
# Settings under which attention depends on a token's place on the line, which in a pack is not its place in its row.
PLACE_KEYS = ("attn_temperature_tuning",)
# Few tokens, and many trees of other lengths in another order; paths within the shortest windows.
PROBES = (
    Trees((9, 6), ((5, 7), (4, 3))),
    Trees((4, 10, 2, 4, 10, 2, 7), ((3, 6), (1, 6, 2), (9,), (3, 6), (1, 6, 2), (9,), (9, 8, 2, 9))),
)
PROBE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # relative L2: rounding is far below
# Relative L2 of a position when others change, far below that of a convolution or a state; experts alone round by it.
LEAK_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-3}


class Term(NamedTuple):
    """One way to read a batch: as its users, as the generic user, or without soft prompt.

    Args:
        user_ids: (B,) int64, or None for no soft prompt.
        context: what an encoder reads about the B users; None for the generic user.
        shared: all rows have the same user or none, so rows with the same prompt may share it.
    """

    user_ids: Tensor | None
    context: ContextBatch | None
    shared: bool


@dataclass(frozen=True)
class Pack:
    """N tokens of all trees of all terms, in order.

    Args:
        trees: lengths of the trees.
        token_ids: (M,) int64, the tokens that are text.
        order: (N,) int64, where each position's embedding lies among M text embeddings and then the soft prompts.
        position_ids: (1, N) int64, from 0 in each tree; a response goes on where the prefix ended.
        scored: (S,) int64, positions whose next token is a response's, response after response.
        targets: (S,) int64, those next tokens.
        num_scored: entries of `scored` of each distinct response.
        last: (R,) int64, position of each distinct response's last token.
        members: for each term, (sequences of the batch,) int64, their number among the R distinct responses.
        tokens: for each term, (sequences of the batch,) int64, scored tokens.
    """

    trees: Trees
    token_ids: Tensor
    order: Tensor
    position_ids: Tensor
    scored: Tensor
    targets: Tensor
    num_scored: list[int]
    last: Tensor
    members: list[Tensor]
    tokens: list[Tensor]


class _Line:
    """A growing pack: tokens as offsets into the batch's padded ids, soft-prompt positions as negative numbers."""

    def __init__(self) -> None:
        self.sources: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.scored: list[np.ndarray] = []
        self.targets: list[np.ndarray] = []
        self.num_scored: list[int] = []
        self.last: list[int] = []
        self.prefixes: list[int] = []
        self.responses: list[tuple[int, ...]] = []
        self.length = 0
        self.prefix_end = 0

    def add_prefix(self, tokens: np.ndarray) -> None:
        self._add(tokens, 0)
        self.prefixes.append(len(tokens))
        self.prefix_end = self.length

    def add_response(self, tokens: np.ndarray) -> int:
        """Number of the response among all so far."""
        prefix, start = self.prefixes[-1], self.length
        before = np.arange(start - 1, start + len(tokens) - 1)
        if prefix:
            before[0] = self.prefix_end - 1
        # Without anything in front the first token of a response has no probability.
        kept = slice(0 if prefix else 1, None)
        self._add(tokens, prefix)
        self.scored.append(before[kept])
        self.targets.append(tokens[kept])
        self.num_scored.append(len(tokens[kept]))
        self.last.append(self.length - 1)
        return len(self.last) - 1

    def _add(self, tokens: np.ndarray, position: int) -> None:
        self.sources.append(tokens)
        self.positions.append(np.arange(position, position + len(tokens)))
        self.length += len(tokens)


def make_pack(batch: PairBatch | ResponseBatch, terms: Sequence[Term], *, num_soft: int, num_bos: int) -> Pack:
    """Lay out every sequence of a batch under every term.

    Sequences of one row share their prefix; under a shared term those of all rows with the same prompt do, and a
    response that recurs there is computed once.

    Args:
        num_soft: positions T of a soft prompt; it stands behind the first `num_bos` tokens of the prefix.
    Returns: Pack on the batch's device.
    """
    line, members = _Line(), []
    num_soft_before = 0
    for term in terms:
        soft = 0 if term.user_ids is None else num_soft
        numbers = [0] * len(batch.sequence_rows)
        for group in _groups(batch, shared=term.shared):
            numbers_of_group = _add_tree(line, batch, group, soft, num_bos, num_soft_before)
            for sequence, number in zip(group, numbers_of_group, strict=True):
                numbers[sequence] = number
        members.append(numbers)
        num_soft_before += soft * batch.num_rows
    return _finish(line, batch, members)


def _groups(batch: PairBatch | ResponseBatch, *, shared: bool) -> list[list[int]]:
    """Sequences of each tree."""
    groups: dict[int, list[int]] = {}
    for sequence, row in enumerate(batch.sequence_rows):
        groups.setdefault(batch.prompt_keys[row] if shared else row, []).append(sequence)
    return list(groups.values())


def _add_tree(
    line: _Line, batch: PairBatch | ResponseBatch, group: list[int], soft: int, num_bos: int, num_soft_before: int
) -> list[int]:
    """Put one tree on the line; returns the number of each sequence's response."""
    width = batch.input_ids.shape[1]
    first = group[0]
    prompt = first * width + np.arange(batch.lengths[first][0])
    row_start = num_soft_before + batch.sequence_rows[first] * soft
    line.add_prefix(np.concatenate([prompt[:num_bos], -1 - row_start - np.arange(soft), prompt[num_bos:]]))
    known: dict[int, int] = {}
    lengths = []
    for sequence in group:
        if batch.response_keys[sequence] not in known:
            start, length = batch.lengths[sequence]
            tokens = sequence * width + start + np.arange(length)
            known[batch.response_keys[sequence]] = line.add_response(tokens)
            lengths.append(length)
    line.responses.append(tuple(lengths))
    return [known[batch.response_keys[sequence]] for sequence in group]


def _finish(line: _Line, batch: PairBatch | ResponseBatch, members: list[list[int]]) -> Pack:
    device = batch.input_ids.device
    padded_ids = batch.input_ids.flatten()

    def tensor(values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=torch.int64).to(device, non_blocking=True)

    sources = np.concatenate(line.sources)
    is_text = sources >= 0
    order = np.empty(len(sources), dtype=np.int64)
    num_text = int(is_text.sum())
    order[is_text] = np.arange(num_text)
    order[~is_text] = num_text - 1 - sources[~is_text]
    num_scored = np.array(line.num_scored)
    return Pack(
        trees=Trees(tuple(line.prefixes), tuple(line.responses)),
        token_ids=padded_ids[tensor(sources[is_text])],
        order=tensor(order),
        position_ids=tensor(np.concatenate(line.positions))[None],
        scored=tensor(np.concatenate(line.scored)),
        targets=padded_ids[tensor(np.concatenate(line.targets))],
        num_scored=line.num_scored,
        last=tensor(line.last),
        members=[tensor(numbers) for numbers in members],
        tokens=[tensor(num_scored[numbers]) for numbers in members],
    )


@dataclass(frozen=True)
class Packing:
    """What a backbone allows.

    Args:
        window: longest path of a tree, None for any.
    """

    window: int | None

    def fits(self, num_tokens: int) -> bool:
        """Whether a sequence of so many tokens, soft prompt included, is short enough."""
        return self.window is None or num_tokens <= self.window


def packed_call(backbone: nn.Module, embeds: Tensor, trees: Trees, position_ids: Tensor, **options: Any) -> Any:
    """The backbone, or its decoder, over a pack's embeddings (1, N, D)."""
    # A mask of four dimensions is handed through as it is; the attention function looks at the trees alone.
    mask = torch.zeros(1, 1, 1, 1, device=embeds.device)
    return backbone(
        inputs_embeds=embeds, position_ids=position_ids, attention_mask=mask, use_cache=False, trees=trees, **options
    )


def reads_trees(backbone: nn.Module) -> bool:
    """Whether `set_up_packing_` has let the backbone read packs."""
    return cast(Any, backbone).config._attn_implementation == ATTENTION


def set_up_packing_(backbone: nn.Module) -> Packing | str:
    """Let a backbone read packs, if it computes over them what it computes over padded rows.

    Tried on random input, because no list of families stays true. A backbone that cannot is left as it was.

    Returns: Packing, or what stands in the way.
    """
    model = cast(Any, backbone)
    config = model.config.get_text_config()
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(ATTENTION)
        error = _probe_error(model, config)
    except Exception as problem:  # a family may refuse the attention function, the mask or the positions in any way
        error = f"{type(problem).__name__}: {problem}".splitlines()[0]
    if error is not None:
        model.set_attn_implementation(before)
        return error
    windows = [getattr(config, key, None) for key in WINDOW_KEYS]
    return Packing(min((w for w in windows if w), default=None))


def _probe_error(model: Any, config: Any) -> str | None:
    """What differs between packs and their sequences as padded rows; None if they agree."""
    placed = [key for key in PLACE_KEYS if getattr(config, key, None)]
    if placed:
        return f"its attention depends on a token's place ({', '.join(placed)})"
    dtype = next(model.get_input_embeddings().parameters()).dtype
    differences = [_difference(model, trees) for trees in PROBES]
    if not all(value < PROBE_TOLERANCE[dtype] for value in differences):
        return f"its hidden states over packed rows are off by {max(differences):.1e}"
    leak = _leak(model, PROBES[0])
    if not leak < LEAK_TOLERANCE[dtype]:
        return f"its hidden states over packed rows move by {leak:.1e} with tokens that they must not see"
    return None


@torch.no_grad()
def _leak(model: Any, trees: Trees) -> float:
    """How far a position moves at most, in relative L2, when tokens before it change that are not on its path."""
    ids, positions = _draw_tokens(model, trees)
    first, responses = trees.spans[0]
    moved = []

    def states(token_ids: Tensor) -> Tensor:
        embeds = model.get_input_embeddings()(token_ids)
        return packed_call(decoder(model), embeds, trees, positions).last_hidden_state[0].float()

    expected = states(ids)
    for start, end in (responses[0], (first[0], responses[-1][1])):  # a response, and a whole tree
        changed = ids.clone()
        changed[0, start:end] = ids[0, start:end].flip(0)
        distances = (states(changed) - expected)[end:].norm(dim=-1) / expected[end:].norm(dim=-1)
        moved.append(float(distances.max()))
    return max(moved)


def _draw_tokens(model: Any, trees: Trees) -> tuple[Tensor, Tensor]:
    """Random ids (1, N) of a pack, and the positions of its tokens."""
    embedding = next(model.get_input_embeddings().parameters())
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(embedding.shape[0], (1, trees.num_tokens), generator=generator).to(embedding.device)
    positions = torch.empty_like(ids)
    for (start, end), responses in trees.spans:
        positions[0, start:end] = torch.arange(end - start)
        for span in responses:
            positions[0, slice(*span)] = torch.arange(end - start, end - start + span[1] - span[0])
    return ids, positions


@torch.no_grad()
def _difference(model: Any, trees: Trees) -> float:
    """Relative L2 between a pack's hidden states and those of its sequences in one batch, padded on the right."""
    ids, positions = _draw_tokens(model, trees)
    embeds = model.get_input_embeddings()(ids)
    paths = [[*range(*prefix), *range(*span)] for prefix, responses in trees.spans for span in responses]
    padded = torch.tensor([path + [0] * (trees.longest_path - len(path)) for path in paths])
    packed = packed_call(decoder(model), embeds, trees, positions).last_hidden_state[0].float()
    plain = decoder(model)(inputs_embeds=embeds[0, padded], use_cache=False).last_hidden_state.float()
    expected = torch.cat([row[: len(path)] for row, path in zip(plain, paths, strict=True)])
    return float((packed[torch.tensor([i for path in paths for i in path])] - expected).norm() / expected.norm())
