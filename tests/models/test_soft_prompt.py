"""Where the soft prompt stands, and what it is made of at first."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prlhf.errors import ConfigError
from prlhf.models.soft_prompt import SoftPromptAdapter, draw_vocabulary_prompts, embed_texts


def _numbers(start: int, *shape: int) -> torch.Tensor:
    """(..., 1) embeddings that are consecutive numbers."""
    count = torch.Size(shape).numel()
    return torch.arange(start, start + count, dtype=torch.float32).view(*shape, 1)


@pytest.mark.parametrize(
    ("has_bos", "expected"), [(True, [0.0, 100.0, 101.0, 1.0, 2.0]), (False, [100.0, 101.0, 0.0, 1.0, 2.0])]
)
def test_the_soft_prompt_follows_bos_or_comes_first(has_bos, expected):
    adapter = SoftPromptAdapter(has_bos=has_bos, num_user_tokens=2)
    assert adapter(_numbers(0, 1, 3), _numbers(100, 1, 2)).flatten().tolist() == expected


def test_rows_without_a_soft_prompt_of_their_own_are_refused():
    adapter = SoftPromptAdapter(has_bos=False, num_user_tokens=1)
    with pytest.raises(RuntimeError):
        adapter(_numbers(0, 6, 1), _numbers(100, 3, 1))


def test_the_soft_prompt_takes_the_type_of_the_text():
    adapter = SoftPromptAdapter(has_bos=True, num_user_tokens=2)
    assert adapter(_numbers(0, 1, 3).bfloat16(), _numbers(100, 1, 2)).dtype == torch.bfloat16


class _Scaled(nn.Embedding):
    """As in Gemma: what it returns is not its weight."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return 10 * super().forward(ids)


def _draw(seed: int, **settings) -> torch.Tensor:
    embedding = _Scaled.from_pretrained(torch.arange(8.0)[:, None], freeze=True)
    return draw_vocabulary_prompts(
        embedding,
        **{
            "count": 50,
            "num_user_tokens": 4,
            "vocab_size": 8,
            "forbidden": {0, 3},
            "generator": torch.Generator().manual_seed(seed),
            **settings,
        },
    )


def test_drawn_prompts_are_what_the_embedding_returns_for_every_allowed_token():
    prompts = _draw(0)
    assert prompts.shape == (50, 4, 1) and not prompts.requires_grad
    assert set(prompts.flatten().tolist()) == {10.0, 20.0, 40.0, 50.0, 60.0, 70.0}


def test_tokens_beyond_the_embedding_or_the_tokenizer_are_never_drawn():
    assert _draw(0, vocab_size=100).max() == 70 and _draw(0, vocab_size=5).max() == 40


def test_the_draw_depends_on_the_generator_alone():
    before = torch.random.get_rng_state()
    assert torch.equal(_draw(1), _draw(1)) and not torch.equal(_draw(1), _draw(2))
    assert torch.equal(torch.random.get_rng_state(), before)


class _Letters:
    """A tokenizer with a token for each letter of the alphabet."""

    def encode(self, text: str, add_special_tokens: bool, **settings: bool) -> list[int]:
        assert not add_special_tokens
        return [ord(letter) - ord("a") for letter in text]


def test_a_text_is_repeated_until_the_soft_prompt_is_full():
    embedding = _Scaled.from_pretrained(torch.arange(8.0)[:, None], freeze=True)
    prompts = embed_texts(embedding, _Letters(), ["bc", "defg"], num_user_tokens=4)
    assert prompts[..., 0].tolist() == [[10.0, 20.0, 10.0, 20.0], [30.0, 40.0, 50.0, 60.0]]


def test_texts_without_tokens_or_with_too_many_are_named():
    embedding = _Scaled.from_pretrained(torch.arange(8.0)[:, None], freeze=True)
    with pytest.raises(ConfigError) as caught:
        embed_texts(embedding, _Letters(), ["", "abc", "abcd"], num_user_tokens=3)
    assert str(caught.value).splitlines() == [
        "user.init_texts: '' has 0 tokens, expected 1 to user.num_user_tokens (3)",
        "user.init_texts: 'abcd' has 4 tokens, expected 1 to user.num_user_tokens (3)",
    ]
