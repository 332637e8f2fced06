"""Training checkpoints: one safetensors file per saved state, written atomically."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import UserError
from ..formats.safetensors_file import write_tensors
from .distributed import ProcessGroup, distribute_like, full_tensor
from .optim import flatten_8bit, unflatten_8bit
from .recipe import rename_keys

METADATA_KEY = "mive.training"
PATTERN = "step_*.safetensors"
PARTIAL_PATTERN = ".step_*.partial.safetensors"  # unfinished files of media.paths.atomic_write
PART = ":"  # separator between the key of an 8-bit optimizer state and the name of one of its plain tensors


class RecipeMismatch(UserError):
    """Raised when the checkpoints in a folder were written with other settings; `differ` lists the fields."""

    def __init__(self, folder: Path, differ: list[str]):
        super().__init__(
            "the checkpoint there was written by another recipe",
            where=folder,
            got="different " + ", ".join(differ),
            fix="choose another output_dir, or remove that folder to start anew",
        )
        self.differ = differ


class FurtherThanAsked(UserError):
    """Raised when the checkpoints in a folder are of more steps than the run is to have."""

    def __init__(self, folder: Path, num_done: int, num_steps: int):
        super().__init__(
            "the checkpoint there has more steps than num_steps",
            where=folder,
            got=num_done,
            expected=f"at most {num_steps}",
            fix=f"set num_steps to {num_done} to export it, or to more to go on; another output_dir starts anew",
        )
        self.num_done, self.num_steps = num_done, num_steps


@dataclass(frozen=True)
class Resumed:
    """Where a run starts, and the fields that its user has changed since its first step."""

    step: int = 0  # the next step
    changes: tuple[dict, ...] = ()  # in order: {"step": the first one with the change, "changed": {field: [old, new]}}
    newest: dict[str, list] = field(default_factory=dict)  # the changed fields of this resume, which `changes` holds last


def save(
    folder: Path,
    step: int,
    modules: Mapping[str, nn.Module],
    averages: Mapping[str, Tensor],
    optimizers: Mapping[str, torch.optim.Optimizer],
    recipe: dict,
    keep: int,
    processes: ProcessGroup = ProcessGroup(),
    changes: Sequence[dict] = (),
) -> Path:
    """Saves all that is needed to continue after `step`, and removes all but the `keep` newest checkpoints.

    All processes call it, since each may hold a shard of every tensor; the first one writes.
    """
    tensors = {f"module.{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}
    tensors |= {f"average.{key}": value for key, value in averages.items()}
    scalars: dict[str, object] = {}
    for name, optimizer in optimizers.items():
        for index, entry in optimizer.state_dict()["state"].items():
            for key, value in entry.items():
                parts = flatten_8bit(value)
                tensors |= {f"optimizer.{name}.{index}.{key}{PART}{part}": tensor for part, tensor in parts.items()}
                if not parts:
                    (tensors if isinstance(value, Tensor) else scalars)[f"optimizer.{name}.{index}.{key}"] = value
    path = folder / f"step_{step:08d}.safetensors"
    full_tensors: dict[str, Tensor] = {}
    for key, value in tensors.items():
        full = full_tensor(value.detach())
        if processes.is_first:
            full_tensors[key] = full.cpu().clone()  # safetensors refuses tensors that share storage
    if not processes.is_first:
        return path
    write_tensors(path, full_tensors, {METADATA_KEY: json.dumps({"step": step, "recipe": recipe, "changes": changes, "scalars": scalars})})
    for old in sorted(folder.glob(PATTERN))[:-keep]:
        old.unlink()
    return path


def restore(
    folder: Path,
    modules: Mapping[str, nn.Module],
    averages: dict[str, Tensor],
    optimizers: Mapping[str, torch.optim.Optimizer],
    recipe: dict,
    defaults: dict,
    free_fields: frozenset[str] = frozenset(),
    is_adjustable: Callable[[str, Any], bool] = lambda field, old: False,
) -> Resumed:
    """Loads the newest complete checkpoint and returns where the run goes on. Removes unfinished files of a crash.

    `recipe` must equal the checkpoint's recipe except for `free_fields`, and for those that `is_adjustable(field, old value)` lets change;
    `defaults` fill in fields that are newer than the checkpoint. Raises RecipeMismatch if the recipes differ, FurtherThanAsked if the
    checkpoint has more steps than the recipe.
    """
    for orphan in folder.glob(PARTIAL_PATTERN):
        orphan.unlink(missing_ok=True)
    newest = _newest(folder)
    if newest is None:
        return Resumed()
    stored, state = newest
    written = defaults | rename_keys(state["recipe"], recipe.keys())
    differing = sorted(key for key in (recipe.keys() | written.keys()) - free_fields if recipe.get(key) != written.get(key))
    if mismatched := [key for key in differing if not is_adjustable(key, written.get(key))]:
        raise RecipeMismatch(folder, mismatched)
    if state["step"] + 1 > recipe.get("num_steps", math.inf):
        raise FurtherThanAsked(folder, state["step"] + 1, recipe["num_steps"])
    for name, module in modules.items():
        check_shapes(folder, {key: stored.shape(f"module.{name}.{key}") for key in _strip_prefix(stored, f"module.{name}.")}, module.state_dict())
    for name, module in modules.items():
        current = module.state_dict()
        module.load_state_dict({key: distribute_like(stored[f"module.{name}.{key}"], current[key]) for key in _strip_prefix(stored, f"module.{name}.")})
    for key in _strip_prefix(stored, "average."):
        averages[key].copy_(distribute_like(stored[f"average.{key}"], averages[key]))
    for name, optimizer in optimizers.items():
        prefix = f"optimizer.{name}."
        values = ((key, source[prefix + key]) for source in (stored, state["scalars"]) for key in _strip_prefix(source, prefix))
        optimizer.load_state_dict(optimizer.state_dict() | {"state": _optimizer_state(values, optimizer)})
    changed = {key: [written[key], recipe[key]] for key in differing if key in written}
    changes = (*state.get("changes", ()), *([{"step": state["step"] + 1, "changed": changed}] if changed else []))
    return Resumed(state["step"] + 1, changes, changed)


class LazyTensors(Mapping):
    """The tensors of a checkpoint, read from disk on access, so that a process with a part of the weights never holds them all."""

    def __init__(self, file: Any):
        self.file, self.names = file, file.keys()

    def __getitem__(self, key: str) -> Tensor:
        return self.file.get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def shape(self, key: str) -> tuple[int, ...]:
        """Returns the shape of a tensor without reading it."""
        return tuple(self.file.get_slice(key).get_shape())


def check_shapes(folder: Path, stored: Mapping[str, tuple], current: Mapping[str, Tensor]) -> None:
    """Raises UserError unless both have the same keys and shapes, which differ if the file start_from has been replaced."""
    for key in sorted(stored.keys() | current.keys()):
        got, expected = stored.get(key), tuple(current[key].shape) if key in current else None
        if got != expected:
            raise UserError(
                "the checkpoint there is of other shapes",
                where=folder,
                got=f"{key} of {got}" if got else f"no {key}",
                expected=expected or "nothing of that name",
                fix="choose another output_dir, or remove that folder to start anew",
            )


def _optimizer_state(values: Iterable[tuple[str, Any]], optimizer: torch.optim.Optimizer) -> dict[int, dict]:
    """Stored (key, value) pairs -> the optimizer's state by index of the weight, sharded like the weights."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    entries: dict[int, dict] = {}
    for key, value in values:
        index, _, field = key.partition(".")
        field, _, part = field.partition(PART)
        entry, weight = entries.setdefault(int(index), {}), weights[int(index)]
        if part:
            entry.setdefault(field, {})[part] = value.to(weight.device)
        else:
            entry[field] = distribute_like(value, weight) if getattr(value, "shape", None) == weight.shape else value
    return {
        index: {field: unflatten_8bit(field, value) if isinstance(value, dict) else value for field, value in entry.items()} for index, entry in entries.items()
    }


def _newest(folder: Path) -> tuple[LazyTensors, dict] | None:
    """Opens the newest readable checkpoint -> its tensors and metadata; files truncated by a crash of the machine are skipped."""
    for path in sorted(folder.glob(PATTERN), reverse=True):
        try:
            file = safe_open(str(path), framework="pt")
            return LazyTensors(file), json.loads(file.metadata()[METADATA_KEY])
        except SafetensorError:
            continue
    return None


def _strip_prefix(names: Iterable[str], prefix: str) -> list[str]:
    """Returns the names that start with the prefix, without it."""
    return [name[len(prefix) :] for name in names if name.startswith(prefix)]
