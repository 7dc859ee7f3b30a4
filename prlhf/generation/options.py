"""How tokens are drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass

from prlhf.data.quoting import is_utf8
from prlhf.errors import ConfigError


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are drawn; names and meanings as in transformers.

    Args:
        temperature: 0 is greedy.
        top_k: 0 is all tokens.
        repetition_penalty: 1 is none; of the answer's own tokens, not of the prompt's.
        no_repeat_ngram_size: 0 is none; within the answer.
        stop_strings: an answer ends where one of them begins.
        seed: of the draws; the caller's random state is not touched.
    Raises: ConfigError: values out of range, or top_k or top_p for greedy answers.
    """

    max_new_tokens: int = 160
    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    stop_strings: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be meant, all of it at once."""
        stops = self.stop_strings
        rules = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < math.inf, "0 (greedy) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or more"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0; 1 is none"),
            "no_repeat_ngram_size": (self.no_repeat_ngram_size >= 0, "0 (none) or more"),
            "stop_strings": (
                isinstance(stops, tuple) and all(stops) and all(map(is_utf8, stops)),
                "a tuple of texts in UTF-8, none empty",
            ),
        }
        wrong = [
            f"{name}: got {getattr(self, name)!r}, expected {expected}"
            for name, (holds, expected) in rules.items()
            if not holds
        ]
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            wrong.append(
                f"temperature: 0 takes the likeliest token, so top_k {self.top_k} and top_p {self.top_p} would change "
                "nothing; leave them out or raise the temperature"
            )
        if wrong:
            raise ConfigError(*wrong)
