"""The parts of a DiT that Wan lacks, trained whole beside a LoRA: the condition's projection and the patch embedding.

A LoRA adapts the blocks only. On a checkpoint fresh from Wan that would leave the source unread, since its half of the patch embedding is zero.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..dit import MiVEDiT
from ..errors import UserError
from ..formats.untrained import NEW_PARTS

CHOICES = ("", "frozen", "trained")  # "": trained on an untrained checkpoint, else frozen


def trains_new_parts(choice: str, untrained: bool) -> bool:
    """Whether a LoRA's training trains the new parts too, on a checkpoint whose own are `untrained` or not. Raises UserError if it would be in vain."""
    if untrained and choice == "frozen":
        raise UserError(
            "the checkpoint's new parts have not learnt yet: the weights that read the source are zero, so a LoRA alone never sees the source",
            where="new_parts",
            got=choice,
            fix="leave new_parts out, or set it to trained: they are then trained beside the LoRA and stored in its file",
        )
    return choice == "trained" or untrained


def train_whole(model: MiVEDiT, parts: Iterable[str] = NEW_PARTS) -> dict[str, nn.Parameter]:
    """Makes the weights of these modules trainable float32 ones and returns them by name."""
    trained = {}
    for part in parts:
        for name, parameter in model.get_submodule(part).float().named_parameters():
            trained[f"{part}.{name}"] = parameter.requires_grad_(True)
    return trained


def stored_weights(trained: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Copies weights to main memory, as the start to which `differences` are taken."""
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in trained.items()}


@torch.no_grad()
def differences(trained: Mapping[str, nn.Parameter], start: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns what training has added to each weight, in float32 in main memory."""
    return {name: parameter.cpu() - start[name] for name, parameter in trained.items()}
