"""Conversion of llama2.c files: the model still tells stories, the tokens are llama2.c's, bad files are refused."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from examples.convert_llama2c import load_checkpoint, main
from prlhf.models.backbone import load_backbone

SENTENCE = "Tom had a red car. He was sad, but his mom was very kind and said they could play in the park."
SHUFFLED = "park. in He very they a sad, Tom said the was could mom and car. his play red had but kind was"
TEXTS = [SENTENCE, SHUFFLED, '"Hi!" said the cat.\nIt  ran away...', "naïve 日本 <s> </s> it's 3$", " a ", ""]


@pytest.fixture(scope="module")
def stories(shared_data, tmp_path_factory) -> tuple[Any, Any]:
    out = tmp_path_factory.mktemp("stories") / "converted"
    main([*_sources(shared_data), str(out)])
    return load_backbone(str(out))


def _sources(shared_data: Path) -> list[str]:
    folder = shared_data / "stories260k"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    return [str(folder / "stories260K.bin"), str(folder / "tok512.bin")]


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


@torch.no_grad()
def _nll(model: Any, tokenizer: Any, text: str) -> float:
    ids = torch.tensor([[tokenizer.bos_token_id, *_encode(tokenizer, text)]])
    return model(input_ids=ids, labels=ids).loss.item()


def test_a_story_is_far_likelier_than_its_shuffled_words(stories):
    # A uniform guess costs ln 512 = 6.2 nats; without the permutation of q and k the sentence costs 3.3.
    assert _nll(*stories, SENTENCE) < 2.5
    assert _nll(*stories, SHUFFLED) > _nll(*stories, SENTENCE) + 1.5


def test_greedy_text_is_the_start_of_a_story(stories):
    model, tokenizer = stories
    ids = torch.tensor([[tokenizer.bos_token_id, *_encode(tokenizer, "Once upon a time")]])
    text = tokenizer.decode(model.generate(ids, do_sample=False, max_new_tokens=40)[0], skip_special_tokens=True)
    # What llama2.c itself writes at temperature 0, by its doc/stories260K.md.
    assert text.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw"
    )


def _merge_like_llama2c(text: str, pieces: list[tuple[float, str]]) -> list[int]:
    """Characters, or bytes where there is no such token; then the best-scored neighbours, leftmost first."""
    ids = {piece: i for i, (_, piece) in enumerate(pieces)}
    tokens = []
    for char in " " * bool(text) + text:
        tokens += [ids[char]] if char in ids else [3 + byte for byte in char.encode()]
    while True:
        joined = [pieces[a][1] + pieces[b][1] for a, b in zip(tokens, tokens[1:], strict=False)]
        known = [(pieces[ids[piece]][0], -i) for i, piece in enumerate(joined) if piece in ids]
        if not known:
            return tokens
        i = -max(known)[1]
        tokens[i : i + 2] = [ids[joined[i]]]


def test_tokens_are_those_of_llama2c(stories, shared_data):
    content, offset, pieces = Path(_sources(shared_data)[1]).read_bytes(), 4, []
    while offset < len(content):
        score, length = struct.unpack_from("<fi", content, offset)
        pieces.append((score, content[offset + 8 : offset + 8 + length].decode()))
        offset += 8 + length
    for text in TEXTS:
        assert _encode(stories[1], text) == _merge_like_llama2c(text, pieces), text


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_encoding_and_decoding(stories, text):
    assert stories[1].decode(_encode(stories[1], text)) == text


def test_special_tokens_are_added_only_on_request(stories):
    tokenizer = stories[1]
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.encode(SENTENCE) == [1, *_encode(tokenizer, SENTENCE)]
    assert not {0, 1, 2} & set(_encode(tokenizer, SENTENCE))


def _write_random_checkpoint(path: Path, *, theta: float = 10000.0) -> np.ndarray:
    """Dim 8, hidden 12, 2 layers, 2 heads, 1 kv head, 5 tokens, 3 positions, a classifier of its own; returns that."""
    rng = np.random.default_rng(0)
    num_before_rope = 5 * 8 + 2 * (8 + 64 + 32 + 32 + 64 + 8 + 3 * 96) + 8
    angles = np.outer(np.arange(3), [1.0, theta**-0.5])
    classifier = rng.standard_normal((5, 8))
    parts = [rng.standard_normal(num_before_rope), np.cos(angles), np.sin(angles), classifier]
    floats = np.concatenate([part.ravel() for part in parts]).astype("<f4")
    path.write_bytes(struct.pack("<7i", 8, 12, 2, 2, 1, -5, 3) + floats.tobytes())
    return classifier


def test_a_negative_vocabulary_size_means_a_classifier_of_its_own(tmp_path):
    classifier = _write_random_checkpoint(tmp_path / "model.bin")
    model = load_checkpoint(tmp_path / "model.bin")
    np.testing.assert_array_equal(model.lm_head.weight.detach().numpy(), classifier.astype(np.float32))
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("theta", "change", "message"),
    [
        (10000.0, lambda content: content[:-4], "bytes, expected"),
        (10000.0, lambda content: content[:9], "describes no model"),
        (10000.0, lambda content: struct.pack("<2i", 0x616B3432, 2) + content, "format version 2, expected 0"),
        (500.0, lambda content: content, "RoPE base is not 10000"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(theta, change, message, tmp_path, capsys):
    path = tmp_path / "model.bin"
    _write_random_checkpoint(path, theta=theta)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(SystemExit):
        main([str(path), str(path), str(tmp_path / "out")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (struct.pack("<ifi", 3, 0.0, 3) + b"abc", "1 tokens, expected 5"),
        (struct.pack("<ifi", 3, 0.0, 9), "token 0 cannot be read"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(content, message, tmp_path, capsys):
    _write_random_checkpoint(tmp_path / "model.bin")
    (tmp_path / "tok.bin").write_bytes(content)
    with pytest.raises(SystemExit):
        main([str(tmp_path / "model.bin"), str(tmp_path / "tok.bin"), str(tmp_path / "out")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
