"""Tokenizers for the data tests: a toy one made here, and real ones where the folder of public data is there."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from tests.data.toy import CHATML, make_toy_tokenizer


@pytest.fixture(scope="session")
def shared_data() -> Path:
    default = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(os.environ.get("PRLHF_SHARED_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; set PRLHF_SHARED_DATA to the folder of public data")
    return folder


@pytest.fixture(scope="session")
def toy() -> Any:
    """Toy tokenizer with BOS, without a chat template."""
    return make_toy_tokenizer()


@pytest.fixture(scope="session")
def chat_toy() -> Any:
    """Toy tokenizer with BOS and a ChatML template that does not write it."""
    return make_toy_tokenizer(template=CHATML)


@pytest.fixture(scope="session", params=["toy", "toy_without_bos", "gpt2", "neox", "llama2"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    """Every kind: toy and real, with and without BOS, BOS == EOS, byte-level and sentencepiece."""
    if request.param.startswith("toy"):
        return make_toy_tokenizer(bos=request.param == "toy")
    folder = request.getfixturevalue("shared_data") / "tokenizers"
    if request.param == "gpt2":
        return _gpt2(folder / "gpt2")
    if request.param == "neox":
        end = "<|endoftext|>"
        path = folder / "neox" / "tokenizer.json"
        return PreTrainedTokenizerFast(tokenizer_file=str(path), bos_token=end, eos_token=end)
    return _llama2(folder / "llama2" / "tokenizer.model")


def _gpt2(folder: Path) -> Any:
    vocab = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    lines = (folder / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:]
    tokenizer = Tokenizer(models.BPE(vocab, [tuple(line.split(" ")) for line in lines if line]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def _llama2(path: Path) -> Any:
    """The sentencepiece model as BPE: a merge of two pieces ranks as the piece that it makes."""
    pieces = list(_sentencepieces(path.read_bytes()))
    vocab = {piece: index for index, (piece, _, _) in enumerate(pieces)}
    merges = [
        (-score, vocab[piece[:cut]], vocab[piece[cut:]], piece[:cut], piece[cut:])
        for piece, score, kind in pieces
        if kind == 1
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    return LlamaTokenizer(vocab=vocab, merges=[(left, right) for *_, left, right in sorted(merges)])


def _sentencepieces(data: bytes) -> Iterator[tuple[str, float, int]]:
    """(piece, score, type) of a serialized sentencepiece.ModelProto: field 1, with the fields 1, 2 and 3."""
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(value))
            yield piece[1].decode(), piece.get(2, 0.0), piece.get(3, 1)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        if tag & 7 == 0:
            value, position = _varint(data, position)
            yield tag >> 3, value
        elif tag & 7 == 2:
            length, position = _varint(data, position)
            yield tag >> 3, data[position : position + length]
            position += length
        else:
            yield tag >> 3, struct.unpack_from("<f", data, position)[0]
            position += 4


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
