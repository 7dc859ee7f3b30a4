"""A trained policy that answers users by their string ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prlhf.config import load_config
from prlhf.data.records import Prompt
from prlhf.data.user_index import GENERIC, GENERIC_USER_ID
from prlhf.engine.checkpoint import CONFIG
from prlhf.evaluation.samples import about_users
from prlhf.generation import SamplingOptions, generate
from prlhf.models import load_policy
from prlhf.models.run_folder import resolve_checkpoint


class Assistant:
    """One model, every user's answers; `prlhf.load` makes one.

    Args:
        path: a run directory, a checkpoint, or what `prlhf adapt` wrote.
    """

    def __init__(self, path: str | Path, *, device: str = "cpu") -> None:
        directory = resolve_checkpoint(Path(path))
        self.policy = load_policy(directory, device=device, rows_on_demand=True)
        self._max_prompt_tokens = load_config(directory / CONFIG).data.max_prompt_tokens

    @property
    def users(self) -> tuple[str, ...]:
        """Ids of the known users."""
        return () if self.policy.users is None else tuple(self.policy.users.user_ids)

    def answer(self, prompt: Prompt, user: str | None = None, *, user_text: str = "", **sampling: Any) -> str:
        """The answer to one prompt.

        Args:
            user: a known user's id; None for somebody nobody knows, who gets the generic user's answer.
            user_text: what is known of the user in words: read by an encoder of texts, elsewhere put before the prompt;
                "": what the checkpoint keeps of a known user.
            sampling: fields of `SamplingOptions`, such as `temperature=0.0` or `max_new_tokens=64`.
        Raises: DataError: an unknown user, or a prompt that does not fit.
        """
        user_ids = None
        if self.policy.user_encoder is not None and self.policy.users is not None:
            user_ids = [GENERIC_USER_ID if user is None else self.policy.users.index(user)]
        about = about_users(self.policy, [(GENERIC if user is None else user, prompt)], [user_text])
        return generate(
            self.policy, [prompt], user_ids, options=SamplingOptions(**sampling),
            max_prompt_tokens=self._max_prompt_tokens, **about,
        )[0]
