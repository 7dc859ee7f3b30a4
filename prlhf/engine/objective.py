"""What a training step minimises: one loss for each row of a batch, by method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from prlhf.data.collate import LabelledBatch, PairBatch, ResponseBatch
from prlhf.data.user_index import GENERIC_USER_ID
from prlhf.losses import (
    PairwiseKind,
    PreferenceLoss,
    bradley_terry_loss,
    dpo_loss,
    kto_loss,
    orpo_loss,
    simpo_loss,
)
from prlhf.models.packing import Term
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
FIRST_TERM = "individual/"  # prefix of the figures of the term that is about a row's own user
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
        separate_terms: the terms are computed and differentiated one after the other; see `passes`.
        only_term: prefix of the one term that this is a pass of.
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
    separate_terms: bool = False
    only_term: str | None = None

    @property
    def terms(self) -> dict[str, float]:
        """Prefix of a term's figures -> its weight; what has none is not computed."""
        if not self.is_personal:
            return {"": 1.0}
        weights = {FIRST_TERM: self.alpha, "generic/": 1 - self.alpha}
        return {
            prefix: weight for prefix, weight in weights.items() if weight > 0 and self.only_term in (None, prefix)
        }

    def passes(self) -> list[Objective]:
        """What is computed and differentiated one after the other: all of it at once, or each term.

        A loss is a sum over terms, so the losses of the passes add up to the whole, and so do the gradients, while the
        activations of one term alone are alive at any time. Figures of several passes have equal values.
        """
        if not self.separate_terms or len(self.terms) == 1:
            return [self]
        return [replace(self, separate_terms=False, only_term=prefix) for prefix in self.terms]

    def read_as(self, batch: PairBatch | LabelledBatch) -> list[Term]:
        """How each term reads a batch: as its users, as the generic user, or without soft prompt."""
        ways = {
            "": Term(None, None, shared=True),
            FIRST_TERM: Term(batch.user_ids, batch.context, shared=False),
            "generic/": Term(torch.full_like(batch.user_ids, GENERIC_USER_ID), None, shared=True),
        }
        return [ways[prefix] for prefix in self.terms]

    def figure_names(self) -> list[str]:
        """Names of the sums that every micro-batch returns, the same on a rank that has no row."""
        names = REWARD_FIGURES if self.method in ("rm", "prm") else (*REWARD_FIGURES, *LOGP_FIGURES)
        names, counts = ((*names, "kl"), (LIKED, DISLIKED)) if self.is_unpaired else (names, ())
        return ["loss", *counts, *(term + name for term in self._prefixes() for name in names)]

    def figure_counts(self) -> dict[str, str]:
        """Of the figures that are not means over all rows, the name of the figure that counts their rows."""
        counts = LABELLED_COUNTS if self.is_unpaired else {}
        return {term + name: count for term in self._prefixes() for name, count in counts.items()}

    @property
    def is_unpaired(self) -> bool:
        """Whether rows are single responses with a label."""
        return self.kind == "kto"

    @property
    def is_personal(self) -> bool:
        """Whether there are an individual and a generic term."""
        return self.method in ("pdpo", "prm")

    def _prefixes(self) -> list[str]:
        """Of all figures: the plain names are the first term's."""
        return [] if self.method == "sft" else list({"": None, **self.terms})

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
            return self._reward(model, batch)
        if isinstance(batch, ResponseBatch):
            return self._sft(model, batch)
        if isinstance(batch, LabelledBatch):
            assert reference is not None and kl is not None
            return self._unpaired(model, batch, reference, kl)
        return self._pairs(model, batch, reference)

    def _reward(self, model: PersonalizedRewardModel, batch: PairBatch) -> RowLosses:
        outs = [bradley_terry_loss(*scores) for scores in model.term_scores(batch, self.read_as(batch))]
        losses = self._mix([out.losses for out in outs])
        return RowLosses(losses, self._sums(losses, [_reward_figures(out) for out in outs]))

    def _sft(self, policy: PersonalizedPolicy, batch: ResponseBatch) -> RowLosses:
        """Maximum likelihood of whole responses: a mean over tokens would make short responses' ends too likely."""
        logps, _ = policy.sequence_logps(batch, None)
        return RowLosses(-logps, {"loss": -logps.detach().sum()})

    def _pairs(self, policy: PersonalizedPolicy, batch: PairBatch, reference: ReferenceLogps | None) -> RowLosses:
        terms = policy.term_logps(batch, self.read_as(batch))
        outs = [self._compare(logps, reference) for logps in terms]
        nll = self._mix([_chosen_nll(logps) for logps in terms])
        losses = self._mix([out.losses for out in outs]) + self.sft_weight * nll
        return RowLosses(losses, self._sums(losses, list(map(_figures, outs, terms))))

    def _mix(self, values: Sequence[Tensor]) -> Tensor:
        """The weighted sum over terms, row by row; see `losses.mix_terms`."""
        first, *others = (weight * value for weight, value in zip(self.terms.values(), values, strict=True))
        return sum(others, start=first)

    def _sums(self, losses: Tensor, figures: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The loss, the first term's figures under their plain names, and in personal methods each term's own."""
        sums = {"loss": losses.detach().sum()}
        for prefix, own in {"": figures[0], **dict(zip(self.terms, figures, strict=True))}.items():
            sums.update({prefix + name: value for name, value in own.items()})
        return sums

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

    def _unpaired(
        self, policy: PersonalizedPolicy, batch: LabelledBatch, reference: ReferenceLogps, kl: Tensor
    ) -> RowLosses:
        losses: list[Tensor] = []
        figures: list[dict[str, Tensor]] = []
        for (logps, tokens), own_kl in zip(policy.term_values(batch.responses, self.read_as(batch)), kl, strict=True):
            out = kto_loss(
                logps,
                reference.chosen,
                batch.liked,
                own_kl,
                beta=self.beta,
                desirable_weight=self.desirable_weight,
                undesirable_weight=self.undesirable_weight,
            )
            losses.append(out.losses)
            figures.append(_labelled_figures(out.rewards, logps.detach(), tokens, batch.liked, own_kl, self.beta))
        mixed = self._mix(losses)
        counts = {LIKED: batch.liked.float().sum(), DISLIKED: (~batch.liked).float().sum()}
        return RowLosses(mixed, {**counts, **self._sums(mixed, figures)})


def _chosen_nll(logps: ResponseLogps) -> Tensor:
    return -logps.chosen / logps.chosen_tokens


def _figures(out: PreferenceLoss, logps: ResponseLogps) -> dict[str, Tensor]:
    """Sums over rows of TRL's figures."""
    values = (logps.chosen.detach(), logps.rejected.detach(), _chosen_nll(logps).detach())
    return {**_reward_figures(out), **_summed(LOGP_FIGURES, values)}


def _reward_figures(out: PreferenceLoss) -> dict[str, Tensor]:
    margins = out.chosen_rewards - out.rejected_rewards
    return _summed(REWARD_FIGURES, ((margins > 0).float(), margins, out.chosen_rewards, out.rejected_rewards))


def _summed(names: tuple[str, ...], values: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {name: value.sum() for name, value in zip(names, values, strict=True)}


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
        ),
        **_summed(
            LOGP_FIGURES,
            (
                torch.where(liked, logps, zeros),
                torch.where(liked, zeros, logps),
                torch.where(liked, -logps / tokens, zeros),
            ),
        ),
        "kl": kl * len(rewards),
    }
