"""The state of a training run on disk: one safetensors file, complete or absent."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import UserError
from ..formats.safetensors_file import write_tensors
from .distributed import ProcessGroup, distribute_like, whole
from .optim import packed, unpacked
from .recipe import renamed

METADATA_KEY = "mive.training"
PATTERN = "step_*.safetensors"
ORPHANS = ".step_*.partial.safetensors"  # as files.atomic_write names what it has not finished
PART = ":"  # between an optimizer's value in 8 bits and what it is made of


class RecipeMismatch(UserError):
    """The checkpoints in a folder were written with other settings: the fields that `differ`."""

    def __init__(self, folder: Path, differ: list[str]):
        super().__init__(
            "the checkpoint there was written by another recipe",
            where=folder,
            got="different " + ", ".join(differ),
            fix="choose another output_dir, or remove that folder to start anew",
        )
        self.differ = differ


def save(
    folder: Path,
    step: int,
    modules: Mapping[str, nn.Module],
    averages: Mapping[str, Tensor],
    optimizers: Mapping[str, torch.optim.Optimizer],
    recipe: dict,
    keep: int,
    processes: ProcessGroup = ProcessGroup(),
) -> Path:
    """Everything that the step after `step` needs; older checkpoints beyond `keep` are removed.

    All processes call it, since each may hold a part of every tensor; the first one writes.
    """
    tensors = {f"module.{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}
    tensors |= {f"average.{key}": value for key, value in averages.items()}
    scalars: dict[str, object] = {}
    for name, optimizer in optimizers.items():
        for index, entry in optimizer.state_dict()["state"].items():
            for key, value in entry.items():
                parts = unpacked(value)
                tensors |= {f"optimizer.{name}.{index}.{key}{PART}{part}": tensor for part, tensor in parts.items()}
                if not parts:
                    (tensors if isinstance(value, Tensor) else scalars)[f"optimizer.{name}.{index}.{key}"] = value
    # Cloned, because tensors that share storage cannot be stored.
    path = folder / f"step_{step:08d}.safetensors"
    parts, tensors = tensors, {}
    for key, value in parts.items():
        joined = whole(value.detach())
        if processes.is_first:
            tensors[key] = joined.cpu().clone()
    if not processes.is_first:
        return path
    write_tensors(path, tensors, {METADATA_KEY: json.dumps({"step": step, "recipe": recipe, "scalars": scalars})})
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
    free: frozenset[str] = frozenset(),
) -> int:
    """Loads the newest complete checkpoint and returns the first step to do, 0 where there is none; what a crash left unfinished is removed.

    A field that the checkpoint does not know counts as its default, one of `free` does not count. Raises RecipeMismatch where it was
    written by another.
    """
    for orphan in folder.glob(ORPHANS):
        orphan.unlink(missing_ok=True)
    stored, state = _newest(folder)
    if stored is None:
        return 0
    written = defaults | renamed(state["recipe"], recipe.keys())
    differing = sorted(key for key in (recipe.keys() | written.keys()) - free if recipe.get(key) != written.get(key))
    if differing:
        raise RecipeMismatch(folder, differing)
    for name, module in modules.items():
        check_shapes(folder, {key: stored.shape(f"module.{name}.{key}") for key in _below(stored, f"module.{name}.")}, module.state_dict())
    for name, module in modules.items():
        current = module.state_dict()
        module.load_state_dict({key: distribute_like(stored[f"module.{name}.{key}"], current[key]) for key in _below(stored, f"module.{name}.")})
    for key in _below(stored, "average."):
        averages[key].copy_(distribute_like(stored[f"average.{key}"], averages[key]))
    for name, optimizer in optimizers.items():
        prefix = f"optimizer.{name}."
        values = ((key, source[prefix + key]) for source in (stored, state["scalars"]) for key in _below(source, prefix))
        optimizer.load_state_dict(optimizer.state_dict() | {"state": _entries(values, optimizer)})
    return state["step"] + 1


class Stored(Mapping):
    """A checkpoint's tensors, each read when it is asked for: processes that hold a part of it never hold the whole."""

    def __init__(self, file):
        self.file, self.names = file, file.keys()

    def __getitem__(self, key: str) -> Tensor:
        return self.file.get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.file.get_slice(key).get_shape())


def check_shapes(folder: Path, stored: Mapping[str, tuple], current: Mapping[str, Tensor]) -> None:
    """Raises UserError unless both have the same keys and shapes: what a recipe starts from may be another file than it was."""
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


def _entries(values: Iterable[tuple[str, object]], optimizer: torch.optim.Optimizer) -> dict[int, dict]:
    """An optimizer's state by the number of its weight, in the parts that the weights are in."""
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
    return {index: {field: packed(field, value) if isinstance(value, dict) else value for field, value in entry.items()} for index, entry in entries.items()}


def _newest(folder: Path) -> tuple[Stored | None, dict | None]:
    """A file cut short by a crash of the machine is passed over for the one before it."""
    for path in sorted(folder.glob(PATTERN), reverse=True):
        try:
            file = safe_open(str(path), framework="pt")
            return Stored(file), json.loads(file.metadata()[METADATA_KEY])
        except SafetensorError:
            continue
    return None, None


def _below(names: Iterable[str], prefix: str) -> list[str]:
    """What follows the prefix in the names that have it."""
    return [name[len(prefix) :] for name in names if name.startswith(prefix)]
