"""What lanes minimise, and what they are chosen by, for each task of a head. Axes in names: M lanes, B cases, O outputs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from hilum.probe.heads.head import Array, Task, class_numbers
from hilum.probe.heads.losses import cox_loss


class TaskLoss:
    """Loss and score of one task over N cases.

    task     classification: cross-entropy · multilabel: binary cross-entropy, mean over labels, unknown ones count 0 ·
             regression: squared error of standardised values · survival: Cox's partial likelihood within the batch
    y        as `hilum.probe.heads.head` says
    classes  sorted, in classification; y may hold others, which count nothing
    centre, spread  of the training values, in regression

    The score is minus the loss over all validation cases together: a proper score, defined whatever they hold.
    """

    def __init__(self, task: Task, y: Array, classes: Array | None, centre: float, spread: float) -> None:
        self.task = task
        if task == "classification":
            assert classes is not None
            self._y = torch.from_numpy(class_numbers(y, classes))
        else:
            self._y = torch.from_numpy(np.asarray(y, np.float32))
        if task == "regression":
            self._y = (self._y - centre) / spread

    def loss(self, outputs_MBO: Tensor, cases: Sequence[int]) -> Tensor:
        """(M,) mean over these cases."""
        y = self._y[torch.as_tensor(cases)].to(outputs_MBO.device)
        if self.task == "classification":
            losses = -functional.log_softmax(outputs_MBO, -1)[:, torch.arange(len(y)), y.clamp(min=0)]
            return (losses * (y >= 0)).mean(1)
        if self.task == "multilabel":
            known = ~torch.isnan(y)
            wanted = y.nan_to_num().expand_as(outputs_MBO)
            losses = functional.binary_cross_entropy_with_logits(outputs_MBO, wanted, reduction="none")
            return (losses * known).mean((1, 2))
        if self.task == "survival":
            return cox_loss(outputs_MBO[..., 0], y[:, 0], y[:, 1])
        return (outputs_MBO[..., 0] - y).square().mean(1)

    def score(self, parts: list[Any], pieces: list[list[int]]) -> Tensor:
        """(M,), higher is better."""
        return -self.loss(torch.cat(parts, 1), [case for piece in pieces for case in piece])


def finish(task: Task, outputs: Tensor) -> NDArray[np.float32]:
    """Outputs of a network → those of a head: probabilities, values, risks."""
    if task == "classification":
        outputs = outputs.softmax(-1)
    elif task == "multilabel":
        outputs = outputs.sigmoid()
    array: NDArray[np.float32] = outputs.cpu().numpy()
    return array
