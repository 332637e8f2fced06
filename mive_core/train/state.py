"""The state of a training run on disk: one safetensors file, complete or absent."""

import json
from pathlib import Path
from typing import Mapping

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import UserError
from ..tensors import write_tensors
from .ranks import Ranks, placed_like, whole

METADATA_KEY = "mive.training"
PATTERN = "step_*.safetensors"


class OtherRecipe(UserError):
    """The checkpoints in a folder were written with other settings: the fields that `differ`."""

    def __init__(self, folder: Path, differ: list[str]):
        super().__init__("the checkpoint there was written by another recipe", where=folder, got="different " + ", ".join(differ),
                         fix="choose another output_dir, or remove that folder to start anew")
        self.differ = differ


def save(folder: Path, step: int, modules: Mapping[str, nn.Module], averages: Mapping[str, Tensor],
         optimizers: Mapping[str, torch.optim.Optimizer], recipe: dict, keep: int, ranks: Ranks = Ranks()) -> Path:
    """Everything that the step after `step` needs; older checkpoints beyond `keep` are removed.

    All processes call it, since each may hold a part of every tensor; the first one writes.
    """
    tensors = {f"module.{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}
    tensors |= {f"average.{key}": value for key, value in averages.items()}
    scalars: dict[str, object] = {}
    for name, optimizer in optimizers.items():
        for index, entry in optimizer.state_dict()["state"].items():
            for key, value in entry.items():
                (tensors if isinstance(value, Tensor) else scalars)[f"optimizer.{name}.{index}.{key}"] = value
    # Cloned, because tensors that share storage cannot be stored.
    path = folder / f"step_{step:08d}.safetensors"
    parts, tensors = tensors, {}
    for key, value in parts.items():
        joined = whole(value.detach())
        if ranks.is_first:
            tensors[key] = joined.cpu().clone()
    if not ranks.is_first:
        return path
    write_tensors(path, tensors, {METADATA_KEY: json.dumps({"step": step, "recipe": recipe, "scalars": scalars})})
    for old in sorted(folder.glob(PATTERN))[:-keep]:
        old.unlink()
    return path


def restore(folder: Path, modules: Mapping[str, nn.Module], averages: dict[str, Tensor],
            optimizers: Mapping[str, torch.optim.Optimizer], recipe: dict, defaults: dict) -> int:
    """Loads the newest complete checkpoint and returns the first step to do, 0 where there is none.

    A field that the checkpoint does not know counts as its default. Raises OtherRecipe where it was written by another.
    """
    tensors, state = _newest(folder)
    if state is None:
        return 0
    written = defaults | state["recipe"]
    differing = sorted(key for key in recipe.keys() | written.keys() if recipe.get(key) != written.get(key))
    if differing:
        raise OtherRecipe(folder, differing)
    for name, module in modules.items():
        current = module.state_dict()
        module.load_state_dict({key: placed_like(value, current[key]) for key, value in _below(tensors, f"module.{name}.").items()})
    for key, value in _below(tensors, "average.").items():
        averages[key].copy_(placed_like(value, averages[key]))
    for name, optimizer in optimizers.items():
        entries: dict[int, dict] = {}
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        for key, value in (_below(tensors, f"optimizer.{name}.") | _below(state["scalars"], f"optimizer.{name}.")).items():
            index, _, field = key.partition(".")
            weight = weights[int(index)]
            entries.setdefault(int(index), {})[field] = placed_like(value, weight) if getattr(value, "shape", None) == weight.shape else value
        optimizer.load_state_dict(optimizer.state_dict() | {"state": entries})
    return state["step"] + 1


def _newest(folder: Path) -> tuple[dict[str, Tensor], dict | None]:
    """A file cut short by a crash of the machine is passed over for the one before it."""
    for path in sorted(folder.glob(PATTERN), reverse=True):
        try:
            with safe_open(str(path), framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()[METADATA_KEY])
        except SafetensorError:
            continue
    return {}, None


def _below(values: Mapping, prefix: str) -> dict:
    return {key[len(prefix):]: value for key, value in values.items() if key.startswith(prefix)}
