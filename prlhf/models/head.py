"""How a backbone's logits come from its last hidden states, so that they need never exist for all tokens at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from prlhf.losses import linear_token_logps
from prlhf.models.backbone import decoder
from prlhf.models.packing import PROBE_TOLERANCE

PROBE_TOKENS = 8
# Settings under which the output layer's logits are multiplied, divided, and capped.
FACTOR_KEYS = ("logit_scale", "lm_head_multiplier")
DIVISOR_KEYS = ("logits_scaling",)
CAP_KEY = "final_logit_softcapping"


@dataclass(frozen=True)
class Head:
    """A linear output layer, and what is done with its logits z: softcap * tanh(scale * z / softcap).

    Args:
        scale: 1 for nothing.
        softcap: None for scale * z.
    """

    scale: float = 1.0
    softcap: float | None = None

    def token_logps(self, backbone: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
        """Log-probs (S,) of targets (S,) after hidden states (S, D); see `linear_token_logps`."""
        layer = cast(Any, backbone).get_output_embeddings()
        return linear_token_logps(
            hidden, layer.weight, layer.bias, targets, scale=self.scale, softcap=self.softcap
        )


@torch.no_grad()
def find_head(backbone: nn.Module) -> Head | None:
    """What the configuration says of the logits, if on random input they are that; None if they are something else."""
    model = cast(Any, backbone)
    config = model.config.get_text_config()
    layer = model.get_output_embeddings()
    if type(layer) is not nn.Linear:
        return None
    scale = 1.0
    for key in FACTOR_KEYS:
        scale *= getattr(config, key, None) or 1.0
    for key in DIVISOR_KEYS:
        scale /= getattr(config, key, None) or 1.0
    cap = getattr(config, CAP_KEY, None) or None
    embedding = next(model.get_input_embeddings().parameters())
    ids = torch.arange(min(PROBE_TOKENS, embedding.shape[0]), device=embedding.device)[None]
    try:
        logits = layer(decoder(backbone)(input_ids=ids, use_cache=False).last_hidden_state) * scale
        expected = model(input_ids=ids, use_cache=False).logits
    except Exception:  # a family may name its parts in any way; its own logits serve it then
        return None
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    fits = (logits - expected).norm() <= PROBE_TOLERANCE[embedding.dtype] * expected.norm()
    return Head(scale, cap) if fits else None
