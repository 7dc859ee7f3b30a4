"""What a training step minimises: one loss for each row of a batch, by method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from prlhf.data.collate import LabelledBatch, PairBatch, ResponseBatch
from prlhf.data.context import ContextBatch
from prlhf.losses import (
    PairwiseKind,
    PreferenceLoss,
    bradley_terry_loss,
    dpo_loss,
    kto_loss,
    mix_terms,
    orpo_loss,
    prm_loss,
    simpo_loss,
)
from prlhf.models.policy import PersonalizedPolicy, ResponseLogps
from prlhf.models.reward import PersonalizedRewardModel

Method = Literal["sft", "dpo", "pdpo", "rm", "prm"]
LossKind = PairwiseKind | Literal["simpo", "orpo", "kto"]
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
# Of unpaired rows: what is said of the liked ones is a mean over them alone, and so for the disliked ones.
LIKED, DISLIKED = "labels/liked", "labels/disliked"
LABELLED_COUNTS = {
    "rewards/chosen": LIKED,
    "rewards/rejected": DISLIKED,
    "logps/chosen": LIKED,
    "logps/rejected": DISLIKED,
    "nll/chosen": LIKED,
}


class ReferenceLogps(NamedTuple):
    """Reference log-probs of both responses of each row, (B,) float32; of an unpaired row, its own and the mismatched.
    """

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
        kind: the loss of dpo and pdpo; "simpo" and "orpo" need no reference, "kto" takes unpaired rows.
        beta: inverse temperature; for orpo the weight of the odds-ratio term.
        sft_weight: weight of the chosen response's NLL per token, in both terms.
        gamma: the margin of simpo.
        desirable_weight: of liked rows under kto; undesirable_weight of disliked ones.
    """

    method: Method
    kind: LossKind = "sigmoid"
    beta: float = 0.1
    alpha: float = 0.5
    label_smoothing: float = 0.0
    sft_weight: float = 0.0
    gamma: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    @property
    def num_terms(self) -> int:
        """Ways in which a batch is read in one pass."""
        return 2 if self.is_personal else 1

    def figure_names(self) -> list[str]:
        """Names of the sums that every micro-batch returns, the same on a rank that has no row."""
        names = REWARD_FIGURES if self.method in ("rm", "prm") else (*REWARD_FIGURES, *LOGP_FIGURES)
        names, counts = ((*names, "kl"), (LIKED, DISLIKED)) if self.is_unpaired else (names, ())
        return ["loss", *counts, *(term + name for term in self._terms() for name in names)]

    def figure_counts(self) -> dict[str, str]:
        """Of the figures that are not means over all rows, the name of the figure that counts their rows."""
        counts = LABELLED_COUNTS if self.is_unpaired else {}
        return {term + name: count for term in self._terms() for name, count in counts.items()}

    @property
    def is_unpaired(self) -> bool:
        """Whether rows are single responses with a label."""
        return self.kind == "kto"

    @property
    def is_personal(self) -> bool:
        """Whether there are an individual and a generic term."""
        return self.method in ("pdpo", "prm")

    def _terms(self) -> tuple[str, ...]:
        if self.method == "sft":
            return ()
        return ("", "individual/", "generic/") if self.is_personal else ("",)

    def __call__(
        self,
        model: PersonalizedPolicy | PersonalizedRewardModel,
        batch: PairBatch | ResponseBatch | LabelledBatch,
        reference: ReferenceLogps | None,
        kl: Tensor | None = None,
    ) -> RowLosses:
        """Losses and figures of one micro-batch.

        Args:
            reference: None where nothing is compared with it: sft, reward models, simpo, orpo.
            kl: for unpaired rows the KL of each term over the rows of the global step, see `engine.kl`.
        """
        if isinstance(model, PersonalizedRewardModel):
            assert isinstance(batch, PairBatch)
            return self._prm(model, batch) if self.method == "prm" else self._rm(model, batch)
        if isinstance(batch, ResponseBatch):
            return self._sft(model, batch)
        if isinstance(batch, LabelledBatch):
            assert reference is not None and kl is not None
            return self._kto(model, batch, reference, kl)
        return self._pdpo(model, batch, reference) if self.method == "pdpo" else self._dpo(model, batch, reference)

    def _rm(self, model: PersonalizedRewardModel, batch: PairBatch) -> RowLosses:
        out = bradley_terry_loss(*model.scores(batch, None))
        return RowLosses(out.losses, {"loss": out.losses.detach().sum(), **_reward_figures(out, "")})

    def _prm(self, model: PersonalizedRewardModel, batch: PairBatch) -> RowLosses:
        individual, generic = model.both_scores(batch)
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

    def _dpo(self, policy: PersonalizedPolicy, batch: PairBatch, reference: ReferenceLogps | None) -> RowLosses:
        logps = policy.logps(batch, None)
        out = self._compare(logps, reference)
        losses = out.losses + self.sft_weight * _chosen_nll(logps)
        return RowLosses(losses, {"loss": losses.detach().sum(), **_figures(out, logps, "")})

    def _pdpo(self, policy: PersonalizedPolicy, batch: PairBatch, reference: ReferenceLogps | None) -> RowLosses:
        individual, generic = policy.both_logps(batch)
        out = mix_terms(self._compare(individual, reference), self._compare(generic, reference), alpha=self.alpha)
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

    def _compare(self, logps: ResponseLogps, reference: ReferenceLogps | None) -> PreferenceLoss:
        """The loss of one term of each pair."""
        if self.kind == "simpo":
            return simpo_loss(*logps, beta=self.beta, gamma=self.gamma)
        if self.kind == "orpo":
            return orpo_loss(*logps, beta=self.beta)
        assert reference is not None and self.kind != "kto"
        return dpo_loss(
            logps.chosen,
            logps.rejected,
            *reference,
            beta=self.beta,
            kind=self.kind,
            label_smoothing=self.label_smoothing,
        )

    def _kto(
        self, policy: PersonalizedPolicy, batch: LabelledBatch, reference: ReferenceLogps, kl: Tensor
    ) -> RowLosses:
        own_reference, _ = reference
        losses: list[Tensor] = []
        sums = {LIKED: batch.liked.float().sum(), DISLIKED: (~batch.liked).float().sum()}
        for i, (user_ids, context) in enumerate(self.term_users(batch)):
            logps, tokens = policy.sequence_logps(batch.responses, user_ids, context)
            out = kto_loss(
                logps,
                own_reference,
                batch.liked,
                kl[i],
                beta=self.beta,
                desirable_weight=self.desirable_weight,
                undesirable_weight=self.undesirable_weight,
            )
            losses.append(out.losses)
            figures = _labelled_figures(out.rewards, logps.detach(), tokens, batch.liked, kl[i], self.beta)
            prefixes = ("",) if not self.is_personal else ("generic/",) if i else ("", "individual/")
            sums.update({prefix + name: value for prefix in prefixes for name, value in figures.items()})
        mixed = self.alpha * losses[0] + (1 - self.alpha) * losses[1] if self.is_personal else losses[0]
        return RowLosses(mixed, {"loss": mixed.detach().sum(), **sums})

    def term_users(self, batch: LabelledBatch) -> list[tuple[Tensor | None, ContextBatch | None]]:
        """Under whom each term scores the rows: as their users and as the generic one, or with no soft prompt."""
        if not self.is_personal:
            return [(None, None)]
        return [(batch.user_ids, batch.context), (torch.zeros_like(batch.user_ids), None)]


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


def _labelled_figures(
    rewards: Tensor, logps: Tensor, tokens: Tensor, liked: Tensor, kl: Tensor, beta: float
) -> dict[str, Tensor]:
    """Sums over rows; a row's margin is how far its reward lies on its label's side of the KL."""
    margins = torch.where(liked, 1.0, -1.0) * (rewards - beta * kl)
    zeros = torch.zeros_like(logps)
    return {
        **_summed(
            REWARD_FIGURES,
            ((margins > 0).float(), margins, torch.where(liked, rewards, zeros), torch.where(liked, zeros, rewards)),
            "",
        ),
        **_summed(
            LOGP_FIGURES,
            (
                torch.where(liked, logps, zeros),
                torch.where(liked, zeros, logps),
                torch.where(liked, -logps / tokens, zeros),
            ),
            "",
        ),
        "kl": kl * len(rewards),
    }
