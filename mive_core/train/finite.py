"""Protection of a run from numbers that are not finite: such steps are skipped, several in a row end the run, and no such weight is written."""

import math
import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..errors import UserError
from .distributed import ProcessGroup

MAX_SKIPPED_STEPS = 5  # in a row, after which the run ends
FIX = (
    "lower the learning rate, set bf16 to false if it is true, or look for a broken pair; a resumed run may have another learning rate, "
    "but if the newest checkpoint has gone wrong already, choose another output_dir or remove that folder"
)


class NotFinite(UserError):
    """Raised when a run ends since its numbers are no longer finite: what, at which step, with which figures. Hosts may word the fix anew."""

    def __init__(self, what: str, step: int, got: str | None = None):
        self.what, self.where, self.got = what, f"step {step + 1}", got
        super().__init__(what, where=self.where, got=got, fix=FIX)


class StepGuard:
    """Decides which steps are taken. All processes decide alike, since loss and gradient norm are those of all of them."""

    def __init__(self, first_step: int, is_first_process: bool = True):
        self.first_step, self.is_first_process = first_step, is_first_process
        self.num_in_a_row = 0
        self.num_unlogged = 0  # skipped steps since the last log line
        self.seen = ""

    def accepts(self, step: int, losses: Mapping[str, Tensor]) -> bool:
        """Whether loss and gradient norm of the step are finite. Waits for the device."""
        loss, norm = float(losses["loss"]), float(losses["grad_norm"])
        if math.isfinite(loss) and math.isfinite(norm):
            self.num_in_a_row = 0
            return True
        self.num_in_a_row += 1
        self.num_unlogged += 1
        self.seen = f"loss {loss:g}, gradient norm {norm:g}"
        if self.is_first_process:
            warnings.warn(f"step {step + 1} is skipped, since it is not finite: {self.seen}", stacklevel=2)
        return False

    @property
    def ends_run(self) -> bool:
        return self.num_in_a_row >= MAX_SKIPPED_STEPS

    def logged(self) -> dict[str, int]:
        """Returns the number of skipped steps since the last call, if any, for a log line."""
        count, self.num_unlogged = self.num_unlogged, 0
        return {"skipped_steps": count} if count else {}

    def check(self, step: int, last_step: int) -> None:
        """Raises NotFinite after MAX_SKIPPED_STEPS in a row, and after the last step if none of this run was taken."""
        if self.ends_run or (step == last_step and self.num_in_a_row > step - self.first_step):
            raise NotFinite(f"{self.num_in_a_row} steps in a row were not finite", step, self.seen)


def all_finite(tensors: Iterable[Tensor], processes: ProcessGroup = ProcessGroup()) -> bool:
    """Whether all weights are finite, of all processes if they hold shards; all of them call it together."""
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return all(processes.gather(all(bool(torch.isfinite(tensor.detach()).all()) for tensor in local)))


def check_weights(tensors: Iterable[Tensor], step: int, processes: ProcessGroup = ProcessGroup()) -> None:
    """Raises NotFinite unless `all_finite`."""
    if not all_finite(tensors, processes):
        raise NotFinite("the weights are no longer finite, so they are not saved", step)
