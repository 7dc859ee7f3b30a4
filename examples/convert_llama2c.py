"""Convert a llama2.c checkpoint and its tokenizer to a transformers folder (formats: github.com/karpathy/llama2.c).

python examples/convert_llama2c.py stories260K.bin tok512.bin OUT; the .bin is the legacy export, version 0.
"""

from __future__ import annotations

import argparse
import math
import struct
import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prlhf.errors import ModelError

HEADER = struct.Struct("<7i")
VERSIONED_MAGIC = 0x616B3432  # "ak42" opens version 1 and later
ROPE_THETA = 10000.0
BOS_ID, EOS_ID = 1, 2
NUM_SPECIAL = 3 + 256  # unk, BOS, EOS, then the bytes
SPACE = "▁"  # stands for a space inside sentencepiece tokens


def load_checkpoint(path: Path) -> LlamaForCausalLM:
    """The model of a version 0 `.bin` file, in float32.

    Raises: ModelError: another version, a size that does not fit the header, or another RoPE base.
    """
    content = path.read_bytes()
    header = HEADER.unpack(content[: HEADER.size].ljust(HEADER.size, b"\0"))
    dim, hidden_dim, num_layers, num_heads, num_kv_heads, vocab_size, max_positions = header
    if dim == VERSIONED_MAGIC:
        raise ModelError(f"{path}: format version {hidden_dim}, expected 0; export it with --version 0")
    if min(*header[:5], abs(vocab_size), max_positions) < 1 or dim % (2 * num_heads) or num_heads % num_kv_heads:
        raise ModelError(f"{path}: header {header} describes no model; give a llama2.c .bin file")
    config = LlamaConfig(
        hidden_size=dim, intermediate_size=hidden_dim, num_hidden_layers=num_layers,
        num_attention_heads=num_heads, num_key_value_heads=num_kv_heads, max_position_embeddings=max_positions,
        vocab_size=abs(vocab_size), tie_word_embeddings=vocab_size > 0,  # the sign is the format's flag
        rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        bos_token_id=BOS_ID, eos_token_id=EOS_ID,
    )
    layout = make_layout(config)
    expected = HEADER.size + 4 * sum(map(math.prod, layout.values()))
    if len(content) != expected:
        raise ModelError(f"{path}: {len(content)} bytes, expected {expected} by its header; restore the file")
    values = torch.from_numpy(np.frombuffer(content, "<f4", offset=HEADER.size).astype(np.float32))
    blocks = values.split(list(map(math.prod, layout.values())))
    stacked = {name: block.view(layout[name]) for name, block in zip(layout, blocks, strict=True)}
    second_position = ROPE_THETA ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
    if not torch.allclose(stacked["rope_sin"][1:2], second_position.sin(), atol=1e-5):
        raise ModelError(f"{path}: its RoPE base is not {ROPE_THETA:g}; give a model made by llama2.c")
    model = LlamaForCausalLM(config)
    model.load_state_dict(_make_state(stacked, config.head_dim))
    # llama2.c trains with BOS between stories and never EOS: BOS is what ends one.
    model.generation_config = GenerationConfig(bos_token_id=BOS_ID, eos_token_id=[EOS_ID, BOS_ID])
    return model


def make_layout(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each block of floats, in the order of the file; `{}` stands for the layers, which are stacked."""
    layers, dim, hidden_dim = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    kv_dim, rope = config.num_key_value_heads * config.head_dim, (config.max_position_embeddings, config.head_dim // 2)
    return {
        "model.embed_tokens.weight": (config.vocab_size, dim),
        "model.layers.{}.input_layernorm.weight": (layers, dim),
        "model.layers.{}.self_attn.q_proj.weight": (layers, dim, dim),
        "model.layers.{}.self_attn.k_proj.weight": (layers, kv_dim, dim),
        "model.layers.{}.self_attn.v_proj.weight": (layers, kv_dim, dim),
        "model.layers.{}.self_attn.o_proj.weight": (layers, dim, dim),
        "model.layers.{}.post_attention_layernorm.weight": (layers, dim),
        "model.layers.{}.mlp.gate_proj.weight": (layers, hidden_dim, dim),
        "model.layers.{}.mlp.down_proj.weight": (layers, dim, hidden_dim),
        "model.layers.{}.mlp.up_proj.weight": (layers, hidden_dim, dim),
        "model.norm.weight": (dim,),
        "rope_cos": rope,
        "rope_sin": rope,
    } | ({} if config.tie_word_embeddings else {"lm_head.weight": (config.vocab_size, dim)})


def load_tokenizer(path: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """The tokenizer of a `tokenizer.bin` file; with special tokens, encoding puts BOS in front, as training did.

    Raises: ModelError: cut short, or another number of tokens than `vocab_size`.
    """
    content, offset, tokens, scores = path.read_bytes(), 4, [], []  # the first int32 is the length of the longest token
    while offset < len(content):
        try:
            score, length = struct.unpack_from("<fi", content, offset)
            tokens.append(struct.unpack_from(f"{length}s", content, offset + 8)[0].decode().replace(" ", SPACE))
        except (struct.error, UnicodeDecodeError) as error:
            raise ModelError(f"{path}: token {len(tokens)} cannot be read ({error}); restore the file") from error
        scores.append(score)
        offset += 8 + length
    if len(tokens) != vocab_size:
        raise ModelError(f"{path}: {len(tokens)} tokens, expected {vocab_size}; give the tokenizer of this checkpoint")
    # Exports disagree on how they spell these; their places are fixed.
    tokens[:NUM_SPECIAL] = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {token: i for i, token in enumerate(tokens)}
    # sentencepiece merges by the score of the result, whatever two tokens it is made of
    results = sorted(tokens[NUM_SPECIAL:], key=lambda token: -scores[vocab[token]])
    splits = [(token[:i], token[i:]) for token in results for i in range(1, len(token))]
    merges = [(left, right) for left, right in splits if left in vocab and right in vocab]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", BOS_ID)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)


def _make_state(stacked: dict[str, torch.Tensor], head_dim: int) -> dict[str, torch.Tensor]:
    state = {"lm_head.weight": stacked["model.embed_tokens.weight"]}  # unless the file has one of its own
    for name, block in stacked.items():
        if "q_proj" in name or "k_proj" in name:
            # llama2.c rotates rows 2i and 2i + 1 of a head together; transformers rows i and i + head_dim / 2.
            pairs = block.view(len(block), -1, head_dim // 2, 2, block.shape[-1])
            block = pairs.transpose(2, 3).reshape(block.shape)
        if not name.startswith("rope_"):  # transformers computes these
            state |= {name.format(i): weight for i, weight in enumerate(block)} if "{}" in name else {name: block}
    return state


def main(argv: list[str] | None = None) -> None:
    """Convert, and say where to."""
    parser = argparse.ArgumentParser(description="llama2.c checkpoint and tokenizer -> transformers folder")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("out", type=Path, help="a folder, new or empty")
    args = parser.parse_args(argv)
    try:
        if args.out.exists() and any(args.out.iterdir()):
            raise ModelError(f"{args.out} is not empty; give a new folder")
        model = load_checkpoint(args.checkpoint)
        tokenizer = load_tokenizer(args.tokenizer, model.config.vocab_size)
        model.save_pretrained(args.out)
        tokenizer.save_pretrained(args.out)
    except (ModelError, OSError) as error:
        parser.error(str(error))
    sys.stdout.write(f"{args.out}: {model.num_parameters():,} parameters, {len(tokenizer)} tokens\n")


if __name__ == "__main__":
    main()
