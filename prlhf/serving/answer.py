"""Answer a prompt in a user's way from this folder alone: here, or on a vLLM server.

    python answer.py --prompt "Why do volcanoes erupt?" --user anna
    python answer.py --prompt "Why do volcanoes erupt?" --user anna --server http://127.0.0.1:8000 --model NAME

Needs torch, transformers and safetensors, and peft where the folder holds an adapter. `prlhf export` puts this file
beside the model; it imports nothing of prlhf.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

ABOUT, TABLE = "export.json", "user_prompts.safetensors"


def load_soft_prompt(folder: Path, user: str | None) -> Tensor | None:
    """(T, D) of a user, or of the generic one for None; None for a model without users.

    Raises: SystemExit: an unknown user.
    """
    known = read_json(folder / ABOUT)["user_ids"]
    if user is not None and user not in known:
        raise SystemExit(f"{user!r} is none of the {len(known)} known users; leave --user out for the generic one")
    if not (folder / TABLE).is_file():
        return None
    with safe_open(folder / TABLE, framework="pt") as table:
        return table.get_tensor("generic") if user is None else table.get_slice("users")[known.index(user)]


def read_json(path: Path) -> Any:
    """The JSON value of a file."""
    return json.loads(path.read_text(encoding="utf-8"))


def load_user_text(folder: Path, user: str | None) -> str:
    """What stands in front of a user's prompts; nothing for the generic one, and for users of whom nothing is said."""
    return "" if user is None else str(read_json(folder / ABOUT).get("user_texts", {}).get(user, ""))


def encode(tokenizer: Any, prompt: str, user_text: str = "") -> list[int]:
    """Ids of a prompt, BOS first where the tokenizer has one.

    Raises: SystemExit: a text of the user's is not UTF-8, or would be read as a special token.
    """
    for name, given in (("prompt", prompt), ("user's text", user_text)):
        if given.encode("utf-8", "ignore").decode("utf-8") != given:
            raise SystemExit(f"the {name} holds what is no character (bytes that are not UTF-8); clean it")
        wrong = [token for token in tokenizer.all_special_tokens if token in given]
        if wrong:
            raise SystemExit(
                f"the {name} holds {wrong[0]!r}, which the tokenizer reads as a special token; take it out"
            )
    text = render(tokenizer, prompt, user_text)
    ids = tokenizer.encode(text, add_special_tokens=False)
    bos = tokenizer.bos_token_id
    if bos is None:
        return ids
    if bos == tokenizer.eos_token_id:
        return [bos, *(ids[1:] if ids[:1] == [bos] else ids)]
    return [bos, *(token for token in ids if token != bos)]


def render(tokenizer: Any, prompt: str, user_text: str) -> str:
    """The prompt up to the answer: the user's text is the system message, a line before the prompt without template.

    Where a template refuses or drops system messages, the text opens the user's message.
    """
    joined = f"{user_text}\n{prompt}" if user_text else prompt
    if not tokenizer.chat_template:
        return f"{joined}\n"
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
    if user_text:
        turns = [{"role": "system", "content": user_text}, {"role": "user", "content": prompt}]
        try:
            text = str(tokenizer.apply_chat_template(turns, **options))
        except Exception:  # a template is a program of its own, and refuses in its own ways
            text = ""
        if text and user_text.strip() in text:
            return text
    return str(tokenizer.apply_chat_template([{"role": "user", "content": joined}], **options))


@torch.no_grad()
def make_prompt_embeds(model: Any, ids: Sequence[int], soft_prompt: Tensor | None, *, num_bos: int) -> Tensor:
    """[BOS] soft prompt, text: (L, D).

    Args:
        num_bos: 1 if the ids start with BOS, else 0.
    """
    # Called, never indexed: some families scale or project inside.
    tokens = model.get_input_embeddings()(torch.tensor([list(ids)], device=model.device))[0]
    if soft_prompt is None:
        return tokens
    return torch.cat([tokens[:num_bos], soft_prompt.to(tokens), tokens[num_bos:]])


def load_model(folder: Path, *, adapter: bool = True) -> Any:
    """The model of the folder, in the type it was trained in; without its adapter where embeddings are enough.

    Raises: SystemExit: the folder holds an adapter, and peft is not installed.
    """
    dtype = getattr(torch, read_json(folder / ABOUT)["dtype"])
    config = folder / "adapter_config.json"
    if not config.is_file():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    base = read_json(config)["base_model_name_or_path"]
    inside = folder / base  # where the base came along; a whole path stays itself
    model: Any = AutoModelForCausalLM.from_pretrained(inside if inside.is_dir() else base, dtype=dtype)
    if adapter:
        try:
            from peft import PeftModel
        except ModuleNotFoundError as error:
            raise SystemExit(f"this folder holds an adapter, and {error.name} is not installed, which reads it; "
                             "pip install peft, or export with --format merged") from None
        model = PeftModel.from_pretrained(model, folder)
    return model.eval()


def request_body(model: str, prompt_embeds: Tensor, *, max_new_tokens: int, temperature: float) -> dict[str, Any]:
    """A request to vLLM's completions, whose `prompt_embeds` is the base64 of `torch.save` of (L, D)."""
    buffer = io.BytesIO()
    torch.save(prompt_embeds.cpu(), buffer)
    return {
        "model": model,
        "prompt": "",
        "prompt_embeds": base64.b64encode(buffer.getvalue()).decode("ascii"),
        "max_tokens": max_new_tokens,
        "temperature": temperature,
    }


def ask_server(server: str, body: dict[str, Any]) -> str:
    """The text that a vLLM server answers."""
    request = urllib.request.Request(
        f"{server.rstrip('/')}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)["choices"][0]["text"].strip()


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--user", help="a known user's id (default: the generic user)")
    parser.add_argument("--user-text", help="what is known of the user in words (default: what is kept of a known one)")
    parser.add_argument("--server", metavar="URL", help="of a vLLM server started with --enable-prompt-embeds")
    parser.add_argument("--model", help="the adapter's or model's name on the server")
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parent)
    args = parser.parse_args(argv)
    if args.server and not args.model:
        parser.error("--server needs --model")
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    model = load_model(args.folder, adapter=not args.server)
    embeds = make_prompt_embeds(
        model,
        encode(tokenizer, args.prompt, args.user_text or load_user_text(args.folder, args.user)),
        load_soft_prompt(args.folder, args.user),
        num_bos=0 if tokenizer.bos_token_id is None else 1,
    )
    if args.server:
        settings = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
        sys.stdout.write(ask_server(args.server, request_body(args.model, embeds, **settings)) + "\n")
        return
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature > 0 else {"do_sample": False}
    new_ids = model.generate(inputs_embeds=embeds[None], max_new_tokens=args.max_new_tokens, **sampling)
    sys.stdout.write(str(tokenizer.decode(new_ids[0], skip_special_tokens=True)).strip() + "\n")


if __name__ == "__main__":
    main()
