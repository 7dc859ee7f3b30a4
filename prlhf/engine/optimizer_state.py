"""What an optimizer knows of each parameter, as tensors of a checkpoint."""

from __future__ import annotations

from torch import Tensor

from prlhf.engine.optim import RowLazyAdamW
from prlhf.errors import CheckpointError
from prlhf.models.personalized import PersonalizedModel
from prlhf.models.tensor_files import StoredTensors
from prlhf.models.user_rows import stored_table
from prlhf.sharding import own_rows, place_like


def optimizer_tensors(model: PersonalizedModel, optimizer: RowLazyAdamW) -> dict[str, Tensor]:
    """Moments and step counts, by the names of parameter and slot; a table that a store keeps has its own there."""
    stored = stored_table(model.user_encoder)
    return {
        f"{name}.{slot}": value
        for name, parameter in model.trainable().items()
        if stored is None or parameter is not stored[1]
        for slot, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_(model: PersonalizedModel, optimizer: RowLazyAdamW, state: StoredTensors) -> None:
    """Put back what `optimizer_tensors` gave; of sharded parameters each rank reads the rows that it holds.

    Raises: CheckpointError: tensors of other parameters, or that do not fit.
    """
    parameters = model.trainable()
    rows = {}
    for key, kind in state.kinds.items():
        name = key.rpartition(".")[0]
        if name not in parameters:
            raise CheckpointError(f"{state.path}: {name}: unexpected; the model has no such trained tensor")
        rows[key] = own_rows(parameters[name]) if kind.dim() else None
        if rows[key] is not None and kind.shape != parameters[name].shape:
            raise CheckpointError(f"{state.path}: {key}: got {tuple(kind.shape)}, expected "
                                  f"{tuple(parameters[name].shape)}; use another checkpoint")
    state.check_finite(rows)
    for key in state.kinds:
        name, _, slot = key.rpartition(".")
        optimizer.state[parameters[name]][slot] = place_like(state.read(key, rows[key]), parameters[name])
