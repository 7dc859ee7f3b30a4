"""Shrinkage: an objective with a Gaussian prior on what sets each user apart from the generic one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from prlhf.data.collate import LabelledBatch, PairBatch, ResponseBatch
from prlhf.engine.objective import FIRST_TERM, Objective, ReferenceLogps, RowLosses
from prlhf.losses import gaussian_prior
from prlhf.models.policy import PersonalizedPolicy
from prlhf.models.reward import PersonalizedRewardModel

PRIOR_FIGURE = "user_prior"


@dataclass(frozen=True, kw_only=True)
class ShrunkObjective(Objective):
    """The same losses, and each row's share of the prior, which does not depend on how the batch was cut either.

    Args:
        precision: of the prior; see `gaussian_prior`.
        rows_of_user: (U + 1,) training rows of each user, on the model's device.
    """

    precision: float
    rows_of_user: Tensor

    def figure_names(self) -> list[str]:
        """Those of the objective, and the prior's."""
        return [*super().figure_names(), PRIOR_FIGURE]

    def __call__(
        self,
        model: PersonalizedPolicy | PersonalizedRewardModel,
        batch: PairBatch | ResponseBatch | LabelledBatch,
        reference: ReferenceLogps | None,
        kl: Tensor | None = None,
    ) -> RowLosses:
        """Losses with the prior's shares in them."""
        assert model.user_encoder is not None
        out = super().__call__(model, batch, reference, kl)
        if self.only_term not in (None, FIRST_TERM):
            return out
        # The generic user has no rows of its own and no deviation.
        counts = self.rows_of_user[batch.user_ids].clamp(min=1)
        shares = gaussian_prior(model.user_encoder.deviations(batch.user_ids), counts, precision=self.precision)
        total = shares.detach().sum()
        return RowLosses(out.losses + shares, {**out.sums, "loss": out.sums["loss"] + total, PRIOR_FIGURE: total})
