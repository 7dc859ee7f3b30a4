"""Prompts as text: user text, separator, chat template; and its tokens.

Text that came from a user may contain the names of special tokens ("</s>", "<|im_end|>"); it must stay text. A chat
template writes special tokens of its own between such texts, so inside messages these names are replaced by marks
before rendering, and put back as plain text when the rendered prompt is tokenized.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from prlhf.data.quoting import is_utf8, quote
from prlhf.data.records import Message, Prompt
from prlhf.errors import DataError

FIRST_PRIVATE_CHARACTER = 0xE000


@dataclass(frozen=True)
class Rendered:
    """A rendered prompt.

    Args:
        text: the prompt; the template's special tokens are written out.
        marks: stand-ins in `text` -> the user's text that they hide; None without a template (all text is the user's).
    """

    text: str
    marks: dict[str, str] | None

    @property
    def plain(self) -> str:
        """The prompt as a reader sees it."""
        return _put_back(self.text, self.marks or {})


def has_chat_template(tokenizer: Any) -> bool:
    """Whether prompts are rendered as conversations."""
    return bool(getattr(tokenizer, "chat_template", None))


def render(tokenizer: Any, prompt: Prompt, user_text: str = "") -> Rendered:
    """Render a prompt up to the point where the response starts.

    Without a chat template: the user text and the prompt, a line each. With one: the user text is the system message
    (in front of the data's own), a string prompt is one user message, and the assistant's header ends it. Where a
    template refuses or drops system messages, their text opens the first user message instead.

    Raises: DataError: messages without a chat template, a conversation that the template refuses, or a template that
        fails on it.
    """
    if not has_chat_template(tokenizer):
        if not isinstance(prompt, str):
            raise DataError("the prompt is a list of messages and the tokenizer has no chat template; "
                            "use a model with one, or write prompts as strings")
        return Rendered("".join(f"{part}\n" for part in (user_text, prompt) if part), None)
    messages = [Message("user", prompt)] if isinstance(prompt, str) else list(prompt)
    if not messages:
        raise DataError("the prompt is an empty list of messages")
    if user_text:
        messages = _with_system(messages, user_text)
    guarded, marks = _guard(messages, special_names(tokenizer))
    return Rendered(_render_messages(tokenizer, guarded), marks)


def render_prompt(tokenizer: Any, prompt: Prompt, user_text: str = "") -> str:
    """The prompt as a reader sees it, up to the point where the response starts; see `render`."""
    return render(tokenizer, prompt, user_text).plain


def check_text(text: str) -> None:
    """Refuse what no tokenizer takes.

    Raises: DataError: half of a surrogate pair, which stands for a byte that is not UTF-8, too.
    """
    if not is_utf8(text):
        place = next(i for i, character in enumerate(text) if not is_utf8(character))
        shown = quote(text[max(0, place - 20) : place + 20])
        raise DataError(f"text {shown}: holds what is no character (bytes that are not UTF-8, or half of a surrogate "
                        "pair); clean the text")


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Ids of a user's text; special tokens in it stay text.

    Raises: DataError: see `check_text`.
    """
    check_text(text)
    return list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False))


def encode_rendered(tokenizer: Any, rendered: Rendered) -> list[int]:
    """Ids of a rendered prompt; only the template's own special tokens become special ids.

    Raises: DataError: see `check_text`.
    """
    if rendered.marks is None:
        return encode_text(tokenizer, rendered.text)
    if not rendered.marks:
        check_text(rendered.text)
        return list(tokenizer.encode(rendered.text, add_special_tokens=False, verbose=False))
    ids: list[int] = []
    names = special_names(tokenizer)
    for piece in re.split(f"({_any_of(names)})", rendered.text):
        if piece in names:
            ids.append(tokenizer.convert_tokens_to_ids(piece))
        elif piece:
            ids.extend(encode_text(tokenizer, _put_back(piece, rendered.marks)))
    return ids


def special_names(tokenizer: Any) -> tuple[str, ...]:
    """Texts that the tokenizer would read as special tokens, the longest first."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple(sorted({*added, *tokenizer.all_special_tokens}, key=lambda name: (-len(name), name)))


def _with_system(messages: Sequence[Message], text: str) -> list[Message]:
    if messages[0].role == "system":
        return [Message("system", f"{text}\n{messages[0].content}"), *messages[1:]]
    return [Message("system", text), *messages]


def _render_messages(tokenizer: Any, messages: Sequence[Message]) -> str:
    has_system = messages[0].role == "system"
    try:
        text = _apply_template(tokenizer, messages)
        if not has_system or messages[0].content.strip() in text:
            return text
        return _apply_template(tokenizer, _system_in_first_user_message(messages))
    except Exception as error:  # a template is a program of its own, and fails in its own ways
        if not has_system:
            raise _refused(messages, error) from error
    try:
        return _apply_template(tokenizer, _system_in_first_user_message(messages))
    except Exception as error:
        raise _refused(messages, error) from error


def _apply_template(tokenizer: Any, messages: Sequence[Message]) -> str:
    turns = [{"role": message.role, "content": message.content} for message in messages]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def _system_in_first_user_message(messages: Sequence[Message]) -> list[Message]:
    system, rest = messages[0].content, list(messages[1:])
    first_user = next((position for position, message in enumerate(rest) if message.role == "user"), None)
    if first_user is None:
        return [Message("user", system), *rest]
    rest[first_user] = Message("user", f"{system}\n{rest[first_user].content}")
    return rest


def _refused(messages: Sequence[Message], error: Exception) -> DataError:
    from jinja2.exceptions import TemplateError

    roles = [message.role for message in messages]
    if type(error) is TemplateError:  # raise_exception, with which templates refuse
        return DataError(f"the chat template refuses the roles {quote(roles)}: {error}; mend the order of the turns")
    return DataError(f"the chat template fails on the roles {quote(roles)} ({type(error).__name__}: {error}); "
                     "mend chat_template in the tokenizer's files")


def _guard(messages: Sequence[Message], names: tuple[str, ...]) -> tuple[list[Message], dict[str, str]]:
    """Replace special names in contents by marks; `{}` when there are none."""
    everything = "".join(message.content for message in messages)
    if not names or not re.search(_any_of(names), everything):
        return list(messages), {}
    fence = next(chr(code) for code in range(FIRST_PRIVATE_CHARACTER, 0xF8FF) if chr(code) not in everything)
    mark_of = {name: f"{fence}{number}{fence}" for number, name in enumerate(names)}
    pattern = re.compile(_any_of(names))
    guarded = [
        Message(message.role, pattern.sub(lambda match: mark_of[match.group()], message.content))
        for message in messages
    ]
    return guarded, {mark: name for name, mark in mark_of.items()}


def _put_back(text: str, marks: dict[str, str]) -> str:
    return re.sub(_any_of(tuple(marks)), lambda match: marks[match.group()], text) if marks else text


@lru_cache(maxsize=64)
def _any_of(names: tuple[str, ...]) -> str:
    return "|".join(re.escape(name) for name in names)
