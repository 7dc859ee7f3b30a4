"""Chat templates: BOS, system messages, and templates that refuse or drop them."""

from __future__ import annotations

from typing import Any

import pytest

from prlhf.data.records import Message
from prlhf.data.render import render_prompt
from prlhf.data.tokenize import encode_prompt
from prlhf.errors import DataError
from tests.data.toy import CHATML, make_toy_tokenizer

BOS_EVERY_TURN = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[{{ m.content }}]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
REFUSES_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
DROPS_SYSTEM = "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
TRIMS = "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}assistant:"
DIALOGUE = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))


def test_a_string_prompt_is_one_user_message_where_there_is_a_template() -> None:
    tokenizer = make_toy_tokenizer(template=CHATML)
    expected = "<|im_start|>system\nI am six.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert render_prompt(tokenizer, "Why?", "I am six.") == expected


def test_user_text_opens_the_systems_own_message() -> None:
    tokenizer = make_toy_tokenizer(template=CHATML)
    text = render_prompt(tokenizer, (Message("system", "Be brief."), Message("user", "Why?")), "I am six.")
    assert text.startswith("<|im_start|>system\nI am six.\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?")


@pytest.mark.parametrize("template", [CHATML, BOS_EVERY_TURN, REFUSES_SYSTEM])
def test_one_bos_at_the_start_whatever_the_template_writes(template: str) -> None:
    tokenizer = make_toy_tokenizer(template=template)
    ids = encode_prompt(tokenizer, DIALOGUE, max_prompt_tokens=500)
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


def test_no_bos_is_invented_for_a_tokenizer_without_one() -> None:
    tokenizer = make_toy_tokenizer(bos=False, template=TRIMS)
    ids = encode_prompt(tokenizer, DIALOGUE, max_prompt_tokens=500)
    assert tokenizer.decode(ids) == "user: a\nassistant: b\nuser: c\nassistant:"


@pytest.mark.parametrize("template", [REFUSES_SYSTEM, DROPS_SYSTEM])
def test_user_text_reaches_the_model_where_system_messages_do_not(template: str) -> None:
    tokenizer = make_toy_tokenizer(template=template)
    text = render_prompt(tokenizer, DIALOGUE, "I am six.").removeprefix("<|begin|>")
    assert text == "user: I am six.\na\nassistant: b\nuser: c\nassistant:"


def test_template_filters_see_the_users_text_and_special_names_stay_text() -> None:
    tokenizer = make_toy_tokenizer(template=TRIMS)
    ids = encode_prompt(tokenizer, "  hi <|im_end|> ", max_prompt_tokens=500)
    assert tokenizer.decode(ids) == "<|begin|>user: hi <|im_end|>\nassistant:"
    assert tokenizer.eos_token_id not in ids


def test_a_conversation_that_the_template_refuses_is_an_error_with_its_reason() -> None:
    tokenizer = make_toy_tokenizer(template=REFUSES_SYSTEM)
    with pytest.raises(DataError, match=r"refuses the roles .'assistant', 'user'.: roles must alternate"):
        render_prompt(tokenizer, (Message("assistant", "a"), Message("user", "b")))
    with pytest.raises(DataError, match="roles must alternate"):
        render_prompt(tokenizer, (Message("assistant", "a"), Message("user", "b")), "I am six.")
    with pytest.raises(DataError, match="empty list of messages"):
        render_prompt(tokenizer, (), "I am six.")


def test_harmless_text_is_tokenized_as_the_tokenizer_itself_would(chat_toy: Any) -> None:
    text = render_prompt(chat_toy, DIALOGUE)
    native = chat_toy.encode(text, add_special_tokens=False)
    assert encode_prompt(chat_toy, DIALOGUE, max_prompt_tokens=500) == [chat_toy.bos_token_id, *native]
