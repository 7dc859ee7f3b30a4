"""What a training step minimises: one loss for each row of a batch, by method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from prlhf.data.collate import PairBatch, ResponseBatch
from prlhf.losses import PairwiseKind, PreferenceLoss, bradley_terry_loss, dpo_loss, pdpo_loss, prm_loss
from prlhf.models.policy import PersonalizedPolicy, ResponseLogps
from prlhf.models.reward import PersonalizedRewardModel

Method = Literal["sft", "dpo", "pdpo", "rm", "prm"]
REWARD_FIGURES = (
    "rewards/accuracies",
    "rewards/margins",
    "rewards/chosen",
    "rewards/rejected",
)
LOGP_FIGURES = (
    "logps/chosen",
    "logps/rejected",
    "nll/chosen",
)


class ReferenceLogps(NamedTuple):
    """Reference log-probs of both responses of each row, (B,) float32."""

    chosen: Tensor
    rejected: Tensor


class RowLosses(NamedTuple):
    """Losses (B,) with gradient, and sums over the batch's rows of detached figures to report."""

    losses: Tensor
    sums: dict[str, Tensor]


@dataclass(frozen=True)
class Objective:
    """The loss of each row under the configured method.

    The batch loss is the sum of the row losses over the rows of the global step, so it does not depend on how the
    global batch is cut into micro-batches and ranks.

    Args:
        method: "sft": NLL of the response in nats, summed over its tokens; "dpo"; "pdpo"; "rm"; "prm".
        alpha: weight of the individual term, 1 - alpha of the generic one (pdpo, prm).
        sft_weight: weight of the chosen response's NLL per token, in both terms.
    """

    method: Method
    kind: PairwiseKind = "sigmoid"
    beta: float = 0.1
    alpha: float = 0.5
    label_smoothing: float = 0.0
    sft_weight: float = 0.0

    def figure_names(self) -> list[str]:
        """Names of the sums that every micro-batch returns, the same on a rank that has no row."""
        terms = {"sft": (), "dpo": ("",), "rm": ("",)}.get(self.method, ("", "individual/", "generic/"))
        names = REWARD_FIGURES if self.method in ("rm", "prm") else (*REWARD_FIGURES, *LOGP_FIGURES)
        return ["loss", *(term + name for term in terms for name in names)]

    def __call__(
        self,
        model: PersonalizedPolicy | PersonalizedRewardModel,
        batch: PairBatch | ResponseBatch,
        reference: ReferenceLogps | None,
    ) -> RowLosses:
        """Losses and figures of one micro-batch; `reference` is None for sft and for reward models."""
        if isinstance(model, PersonalizedRewardModel):
            assert isinstance(batch, PairBatch)
            return self._prm(model, batch) if self.method == "prm" else self._rm(model, batch)
        if isinstance(batch, ResponseBatch):
            return self._sft(model, batch)
        assert reference is not None
        return self._pdpo(model, batch, reference) if self.method == "pdpo" else self._dpo(model, batch, reference)

    def _rm(self, model: PersonalizedRewardModel, batch: PairBatch) -> RowLosses:
        out = bradley_terry_loss(*model.scores(batch, None))
        return RowLosses(out.losses, {"loss": out.losses.detach().sum(), **_reward_figures(out, "")})

    def _prm(self, model: PersonalizedRewardModel, batch: PairBatch) -> RowLosses:
        individual = model.scores(batch, batch.user_ids, batch.context)
        generic = model.scores(batch, torch.zeros_like(batch.user_ids))
        out = prm_loss(*individual, *generic, alpha=self.alpha)
        return RowLosses(
            out.losses,
            {
                "loss": out.losses.detach().sum(),
                **_reward_figures(out.individual, ""),
                **_reward_figures(out.individual, "individual/"),
                **_reward_figures(out.generic, "generic/"),
            },
        )

    def _sft(self, policy: PersonalizedPolicy, batch: ResponseBatch) -> RowLosses:
        """Maximum likelihood of whole responses: a mean over tokens would make short responses' ends too likely."""
        logps, _ = policy.sequence_logps(batch, None)
        return RowLosses(-logps, {"loss": -logps.detach().sum()})

    def _dpo(self, policy: PersonalizedPolicy, batch: PairBatch, reference: ReferenceLogps) -> RowLosses:
        logps = policy.logps(batch, None)
        out = dpo_loss(
            logps.chosen,
            logps.rejected,
            *reference,
            beta=self.beta,
            kind=self.kind,
            label_smoothing=self.label_smoothing,
        )
        losses = out.losses + self.sft_weight * _chosen_nll(logps)
        return RowLosses(losses, {"loss": losses.detach().sum(), **_figures(out, logps, "")})

    def _pdpo(self, policy: PersonalizedPolicy, batch: PairBatch, reference: ReferenceLogps) -> RowLosses:
        individual = policy.logps(batch, batch.user_ids, batch.context)
        generic = policy.logps(batch, torch.zeros_like(batch.user_ids))
        out = pdpo_loss(
            individual.chosen,
            individual.rejected,
            generic.chosen,
            generic.rejected,
            *reference,
            alpha=self.alpha,
            beta=self.beta,
            kind=self.kind,
            label_smoothing=self.label_smoothing,
        )
        nll = self.alpha * _chosen_nll(individual) + (1 - self.alpha) * _chosen_nll(generic)
        losses = out.losses + self.sft_weight * nll
        return RowLosses(
            losses,
            {
                "loss": losses.detach().sum(),
                **_figures(out.individual, individual, ""),
                **_figures(out.individual, individual, "individual/"),
                **_figures(out.generic, generic, "generic/"),
            },
        )


def _chosen_nll(logps: ResponseLogps) -> Tensor:
    return -logps.chosen / logps.chosen_tokens


def _figures(out: PreferenceLoss, logps: ResponseLogps, prefix: str) -> dict[str, Tensor]:
    """Sums over rows of TRL's figures."""
    values = (logps.chosen.detach(), logps.rejected.detach(), _chosen_nll(logps).detach())
    return {**_reward_figures(out, prefix), **_summed(LOGP_FIGURES, values, prefix)}


def _reward_figures(out: PreferenceLoss, prefix: str) -> dict[str, Tensor]:
    margins = out.chosen_rewards - out.rejected_rewards
    values = ((margins > 0).float(), margins, out.chosen_rewards, out.rejected_rewards)
    return _summed(REWARD_FIGURES, values, prefix)


def _summed(names: tuple[str, ...], values: tuple[Tensor, ...], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value.sum() for name, value in zip(names, values, strict=True)}
