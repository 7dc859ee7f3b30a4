"""Loading of a causal language model and its tokenizer: the built-in one, a local folder, or a hub id."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.resources
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from prlhf.data.render import encode_rendered, render, render_prompt
from prlhf.data.world.text import build_text
from prlhf.data.world.tokenizer import CHAT_TEMPLATE, train_tokenizer
from prlhf.errors import DataError, ModelError

logger = logging.getLogger(__name__)

BUILTIN_TINY = "builtin:tiny"
BUILTIN_SCRATCH = "builtin:scratch"
# Where the experiments of these built-in worlds expect their supervised model.
SUPERVISED = {f"runs/builtin_{world}/model": world for world in ("tldr", "prism")}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NUM_NAMES_SHOWN = 5
PROBE_PROMPT = "Why?"
# Of a configuration: where it came from, what wrote it, how it is stored or run.
NO_ARCHITECTURE = ("transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "return_dict",
                   "output_attentions", "output_hidden_states", "id2label", "label2id", "problem_type")


def builtin_model_dir() -> Path:
    """The folder of the built-in pretrained model inside the package."""
    return Path(str(importlib.resources.files("prlhf") / "builtin_model"))


def load_backbone(name: str, *, dtype: str = "float32", seed: int = 0) -> tuple[nn.Module, Any]:
    """Load a causal LM and its tokenizer; code that a model's folder brings along is never run.

    Dropout inside the backbone is set to 0: policy and reference must be the same function at step 0
    (LoRA has a dropout of its own).

    Args:
        name: "builtin:tiny", "builtin:scratch" (the same architecture with random weights and a tokenizer made from
            the built-in text), a local folder, or a hub id "owner/name".
        dtype: "float32" or "bfloat16", the dtype of the weights in memory.
        seed: of the random weights of "builtin:scratch".
    Returns: (model in evaluation mode, tokenizer).
    Raises: ModelError: no such folder, not a causal LM, weights missing or not finite, or no usable tokenizer: see
        `load_tokenizer`, or it gives ids that the model has no embedding for.
    """
    if name == BUILTIN_SCRATCH:
        return _make_scratch(seed, DTYPES[dtype])
    folder = resolve_backbone(name)
    model = _load_model(folder, name, DTYPES[dtype])
    tokenizer = load_tokenizer(folder, name)
    _check_vocabulary(model, tokenizer, name)
    return model, tokenizer


def load_tokenizer(folder: Path | str, name: str) -> Any:
    """The tokenizer of a folder or hub id.

    Args:
        name: what messages call its owner.
    Raises: ModelError: none there, or one without an end-of-sequence token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **_loading_options(folder))
    except Exception as error:  # transformers raises whatever comes of the files that a user points it at
        raise ModelError(
            f"model.backbone {name!r}: no tokenizer that transformers can load ({_first_line(error)}); "
            "put the tokenizer's files into the model's folder, whose own code is never run"
        ) from error
    return check_tokenizer(tokenizer, name)


def resolve_backbone(name: str) -> Path | str:
    """The folder of a backbone, or the hub id itself.

    Raises: ModelError: a path that does not exist or holds no config.json.
    """
    if name.startswith("builtin:") and name != BUILTIN_TINY:
        raise ModelError(f"model.backbone {name!r}: no such built-in model; use {BUILTIN_TINY} or {BUILTIN_SCRATCH}")
    path = builtin_model_dir() if name == BUILTIN_TINY else Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"model.backbone {name!r}: {path} has no config.json; give a transformers folder")
        return path
    looks_like_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if name in SUPERVISED:
        world = SUPERVISED[name]
        raise ModelError(f"model.backbone {name!r}: not there yet; `make train EXP={world}` trains it first, or do so "
                         f"by `prlhf train experiments/builtin_{world}.yaml` and "
                         f"`python -m prlhf.engine.write_builtin runs/builtin_{world} --out {name}`")
    if not looks_like_hub_id:
        raise ModelError(f"model.backbone {name!r}: no folder {path}; give a transformers folder or a hub id")
    return name


def check_tokenizer(tokenizer: Any, name: str) -> Any:
    """The tokenizer, unless it cannot be trained with.

    Raises: ModelError: it has no end-of-sequence token, so generation would never stop; or its chat template leaves
        out what the user says, so all prompts would be one.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError(f"model.backbone {name!r}: the tokenizer has no EOS token; set eos_token in its config")
    try:
        rendered = render_prompt(tokenizer, PROBE_PROMPT)
    except DataError:  # some templates want more than one turn; what the data's turns meet is said with the data
        return tokenizer
    if PROBE_PROMPT not in rendered:
        raise ModelError(f"model.backbone {name!r}: the chat template leaves out what the user says; "
                         "mend chat_template in the tokenizer's files")
    return tokenizer


def pad_token_id(tokenizer: Any) -> int:
    """Id to fill the right end of a batch with; masks come from lengths, so EOS serves where no pad exists."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def input_embedding(backbone: nn.Module) -> nn.Module:
    """The module from token ids to embeddings. Call it, never index its weight: Gemma scales, OPT projects."""
    return cast(Any, backbone).get_input_embeddings()


def decoder(backbone: nn.Module) -> nn.Module:
    """The backbone without its output layer: `base_model` of transformers' PreTrainedModel.

    That is the backbone itself where a family's prefix names no part of it (Llama 4), whose decoder is `model`.
    """
    base = cast(Any, backbone).base_model
    return getattr(base, "model", base) if base is backbone else base


def embedding_dim(backbone: nn.Module) -> int:
    """Width D of what the embedding module returns (not always hidden_size: OPT projects)."""
    embedding = input_embedding(backbone)
    with torch.no_grad():
        return embedding(torch.zeros(1, 1, dtype=torch.int64, device=next(embedding.parameters()).device)).shape[-1]


def position_limit(backbone: nn.Module) -> int | None:
    """Positions that a sequence may have, soft prompt included; None when the config does not say.

    Those the model was built for, or those up to which its rotary frequencies stand still: under "longrope" a single
    position beyond them gives all rows of a call others. Under "dynamic" they stand still as far as it was built for.
    """
    config = cast(Any, backbone).config.get_text_config()
    limits = (getattr(config, "max_position_embeddings", None), _longrope_limit(config))
    return min((limit for limit in limits if limit is not None), default=None)


def describe_positions(backbone: nn.Module) -> str:
    """What a message says of `position_limit`, as in "the backbone has ..."."""
    limit = position_limit(backbone)
    if limit == _longrope_limit(cast(Any, backbone).config.get_text_config()):
        return f"{limit} positions up to its original_max_position_embeddings, beyond which a row changes others"
    return f"{limit} positions"


def _longrope_limit(config: Any) -> int | None:
    """`original_max_position_embeddings` where rotary frequencies depend on it call by call, else None."""
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [part for part in (rope, *rope.values()) if isinstance(part, Mapping)]  # one, or one a type of layer
    longrope = [part for part in parts if part.get("rope_type") == "longrope"]
    return min((part["original_max_position_embeddings"] for part in longrope), default=None)


def hash_state(module: nn.Module) -> str:
    """sha256 over names, dtypes, shapes and bytes of the weights; of a backbone: before adapters are added."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def describe_architecture(backbone: nn.Module) -> dict[str, Any]:
    """The backbone's configuration as JSON values: with the same weights, too, others make another model."""
    values = json.loads(cast(Any, backbone).config.to_json_string(use_diff=False))
    kept = {key: value for key, value in values.items() if key not in NO_ARCHITECTURE and not key.startswith("_")}
    return {"transformers": transformers.__version__, **kept}


def changed_architecture(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two configurations, "key: before, now"; nothing where two versions of transformers made
    them, which write the same model differently.
    """
    if before.get("transformers") != now["transformers"]:
        return []
    return [f"{key}: {before.get(key)}, now {now.get(key)}" for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)]


def save_backbone(
    backbone: nn.Module, tokenizer: Any, folder: str | os.PathLike[str], *, dtype: str = "bfloat16"
) -> None:
    """Write a model without adapters, and its tokenizer, as a transformers folder; the model itself stays as it is."""
    cast(Any, copy.deepcopy(backbone).to(DTYPES[dtype])).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _load_model(folder: Path | str, name: str, dtype: torch.dtype) -> nn.Module:
    options = _loading_options(folder)
    try:
        config = AutoConfig.from_pretrained(folder, **options)
        _switch_off_dropout_(config.get_text_config())
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True, use_safetensors=True, **options
        )
    except Exception as error:  # transformers raises whatever comes of the files that a user points it at
        raise ModelError(
            f"model.backbone {name!r}: cannot be loaded as a causal language model ({_first_line(error)}); "
            "give a folder or hub id for AutoModelForCausalLM"
        ) from error
    model, info = loaded
    # transformers fills what is missing with random numbers and goes on.
    if info["missing_keys"]:
        raise ModelError(f"model.backbone {name!r}: no weights for {_some(info['missing_keys'])}; restore the folder")
    broken = [key for key, parameter in model.named_parameters() if not torch.isfinite(parameter).all()]
    if broken:
        raise ModelError(f"model.backbone {name!r}: NaN or infinity in {_some(broken)}; restore the folder")
    if not _is_causal(model.eval()):
        raise ModelError(
            f"model.backbone {name!r}: not a causal language model, its tokens see those that follow "
            f"(model_type {config.model_type}); give a decoder"
        )
    if not _is_alike_in_training(model):
        logger.warning("model.backbone %r: computes with random numbers in training (model_type %s), so policy and "
                       "reference differ from the first step on", name, config.model_type)
    return model


def _check_vocabulary(model: nn.Module, tokenizer: Any, name: str) -> None:
    """Refuse a tokenizer whose ids go beyond the embeddings; special tokens that no prompt ever holds may."""
    num_embeddings = int(next(input_embedding(model).parameters()).shape[0])
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    written = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}
    with contextlib.suppress(DataError):  # what a template asks of the turns is said with the data
        written |= set(encode_rendered(tokenizer, render(tokenizer, PROBE_PROMPT)))
    highest = max((set(tokenizer.get_vocab().values()) - special) | written)
    if highest >= num_embeddings:
        raise ModelError(
            f"model.backbone {name!r}: the tokenizer has ids up to {highest}, the model {num_embeddings} embeddings; "
            "put the model's own tokenizer into its folder"
        )


def _loading_options(folder: Path | str) -> dict[str, bool]:
    # False, not the default None, which asks on the terminal whether to run a folder's own code.
    return {"local_files_only": isinstance(folder, Path), "trust_remote_code": False}


def _switch_off_dropout_(config: Any) -> None:
    """Every family has names of its own: attention_dropout, resid_pdrop, layerdrop, ..."""
    for setting, value in config.to_dict().items():
        if "drop" in setting and isinstance(value, float):
            setattr(config, setting, 0.0)


@torch.no_grad()
def _is_alike_in_training(model: nn.Module) -> bool:
    """Whether logits are those of evaluation; some routers draw their experts."""
    ids = torch.arange(32)[None] % next(input_embedding(model).parameters()).shape[0]
    expected = model(input_ids=ids, use_cache=False).logits
    in_training = model.train()(input_ids=ids, use_cache=False).logits
    model.eval()
    return torch.allclose(in_training, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


@torch.no_grad()
def _is_causal(model: nn.Module) -> bool:
    """Whether the logits of a text stay when what follows it changes; BERT loads as a causal LM, and is none.

    Rounding may depend on what follows (experts share their batches), so "stay" is to 5% of the largest logit.
    """
    texts = [[0] * 4 + [following] * 4 for following in (0, 1)]
    first, second = (model(input_ids=torch.tensor([text]), use_cache=False).logits[0, :4] for text in texts)
    return bool((first - second).abs().max() <= 0.05 * first.abs().max())


def _make_scratch(seed: int, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    rows, _ = build_text(seed=0)
    tokenizer = train_tokenizer(text for row in rows for text in (str(row.prompt), row.response))
    tokenizer.chat_template = CHAT_TEMPLATE
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.to(dtype).eval(), tokenizer


def _some(names: list[str] | set[str]) -> str:
    """A few of the names, and how many more there are."""
    shown = ", ".join(sorted(names)[:NUM_NAMES_SHOWN])
    return shown if len(names) <= NUM_NAMES_SHOWN else f"{shown} and {len(names) - NUM_NAMES_SHOWN} more"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
