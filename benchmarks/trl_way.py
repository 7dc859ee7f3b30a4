"""P-DPO in TRL's DPOTrainer: every row twice, for its user and the generic one, with soft prompts as plain tokens."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from prlhf.data.tokenize import TokenizedPair
from prlhf.engine.objective import ReferenceLogps
from prlhf.models.backbone import builtin_model_dir

PLACEHOLDER = 3  # a token that stands where prlhf has a soft token: the same length, the same work


class TrlSteps:
    """A DPOTrainer whose steps are called one by one.

    TRL scores response tokens alone on a GPU and every position elsewhere; here it takes its GPU path, the faster one.

    Args:
        backbone: without adapters; a copy is trained, or with `in_place` itself.
        lora: rank 8 on every linear layer, by PEFT; else all weights.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        lora: bool,
        beta: float,
        num_user_tokens: int,
        device: str = "cpu",
        in_place: bool = False,
    ) -> None:
        from datasets import Dataset
        from peft import LoraConfig
        from trl import DPOConfig, DPOTrainer

        self._num_user_tokens = num_user_tokens
        self._device = device
        settings = DPOConfig(
            output_dir=tempfile.mkdtemp(), beta=beta, max_length=None, use_cpu=device == "cpu", bf16=False,
            report_to=[], gradient_checkpointing=False, disable_tqdm=True,
        )
        adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
        self.trainer: Any = DPOTrainer(
            model=backbone if in_place else copy.deepcopy(backbone),
            ref_model=None if lora else copy.deepcopy(backbone),
            args=settings,
            train_dataset=Dataset.from_list([{"prompt": "Why?", "chosen": " So.", "rejected": " No."}]),
            processing_class=AutoTokenizer.from_pretrained(builtin_model_dir()),
            peft_config=adapter,
        )
        self.trainer.model.train()

    def parameters(self) -> list[nn.Parameter]:
        """What it trains."""
        return [parameter for parameter in self.trainer.model.parameters() if parameter.requires_grad]

    def loss(self, rows: Sequence[TokenizedPair], reference: ReferenceLogps | None) -> Tensor:
        """Mean DPO loss over the rows and their copies.

        Args:
            reference: of the rows, where it is known beforehand; None: a forward pass of the reference.
        """
        inputs = self._collate(rows)
        self.trainer.precompute_ref_logps = reference is not None
        if reference is not None:
            inputs["ref_chosen_logps"] = torch.cat([reference.chosen] * 2).to(self._device)
            inputs["ref_rejected_logps"] = torch.cat([reference.rejected] * 2).to(self._device)
        with mock.patch("trl.trainer.utils._use_triton", lambda _: True):
            loss: Tensor = self.trainer.compute_loss(self.trainer.model, inputs)
        return loss

    def reference_logps(self, rows: Sequence[TokenizedPair]) -> tuple[Tensor, Tensor]:
        """Log-probs of the chosen and of the rejected responses under the reference, rows and copies: (2 B,) each."""
        model = self.trainer.ref_model or self.trainer.model
        with mock.patch("trl.trainer.utils._use_triton", lambda _: True):
            chosen, rejected = self.trainer.compute_ref_log_probs(model, self._collate(rows))
        return chosen, rejected

    def _collate(self, rows: Sequence[TokenizedPair]) -> dict[str, Tensor]:
        soft = (PLACEHOLDER,) * self._num_user_tokens
        examples = [
            {
                "prompt_ids": [*row.prompt_ids[:1], *soft, *row.prompt_ids[1:]],
                "chosen_ids": list(row.chosen_ids),
                "rejected_ids": list(row.rejected_ids),
            }
            for _ in range(2)
            for row in rows
        ]
        inputs: dict[str, Tensor] = self.trainer.data_collator(examples)
        return {name: tensor.to(self._device) for name, tensor in inputs.items()}
