"""A training recipe: one YAML file, read into one frozen dataclass."""

import json
import warnings
from collections.abc import Collection, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ..errors import UserError
from ..media.paths import atomic_write


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Fields that all tasks share; each task adds its own in a subclass."""

    task: str  # name of the task: edit; for the embedded models dit, vae or vlm; for studies small_wan
    output_dir: str  # folder of checkpoints, logs and validations
    export: str  # path of the finished model, written after the last step
    version: str = ""  # version of the finished model, stored in its metadata and shown by `mive inspect`; "": none
    num_steps: int  # number of optimizer steps
    seed: int = 0  # seed of initial weights, batches and noise
    num_threads: int = 1  # number of torch's CPU threads; 0: torch's own choice
    num_workers: int = 1  # number of data loading processes; 0: loading in the training process
    checkpoint_every_s: float = 120.0  # seconds between checkpoints
    num_checkpoints: int = 2  # number of newest checkpoints to keep
    log_every: int = 20  # steps between log lines
    max_grad_norm: float = 1.0  # maximum gradient norm, above which gradients are clipped; 0: no clipping
    gradient_accumulation_steps: int = 1  # batches per process whose gradients are averaged into one step
    device: str = "cpu"  # cpu or cuda
    bf16: bool = False  # autocast: matrix products and convolutions in bfloat16, weights and sums in float32; faster on GPUs and on some CPUs
    ema_decay: float = 0.0  # decay of the weights' exponential moving average, which is then validated and exported; 0: no average
    wandb: str = ""  # Weights & Biases project that also receives the log; "": none
    peak_tflops: float = 0.0  # peak TFLOPS of each device, for model FLOPs utilisation (mfu); 0: looked up by the GPU's name

    def __post_init__(self):
        if self.num_steps < 1:
            raise UserError("a run takes a step or more", where="num_steps", got=self.num_steps, fix="set num_steps to the number of optimizer steps")

    @property
    def free_fields(self) -> frozenset[str]:
        """The fields that may differ between the run that wrote a checkpoint and the run that resumes it."""
        return FREE_FIELDS

    def is_adjustable(self, field: str, old: Any) -> bool:
        """Whether a run may resume with another value of this field than `old`, on purpose; the checkpoint then records the change."""
        return False

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of the finished model, besides its config."""
        return {"mive.version": self.version} if self.version else {}


# Fields that do not affect the result of a step; loop.checkpoint_fields compares gradient_accumulation_steps times the number of processes.
FREE_FIELDS = frozenset(
    {
        "device",
        "gradient_accumulation_steps",
        "output_dir",
        "export",
        "version",
        "num_threads",
        "num_workers",
        "checkpoint_every_s",
        "num_checkpoints",
        "log_every",
        "wandb",
        "peak_tflops",
    }
)

# Old name (up to version 0.1) -> present name; old names are accepted with a warning until version 0.3.
RENAMED = {
    "adamw_lr": "adamw_learning_rate",
    "clip_norm": "max_grad_norm",
    "copier_start": "identity_init",
    "decay_share": "decay_ratio",
    "draft_share": "scheduled_sampling_ratio",
    "ema": "ema_decay",
    "final_lr": "final_learning_rate_ratio",
    "growth_share": "growth_ratio",
    "half_batch": "num_new_clips",
    "initial": "start_from",
    "local_odds": "local_edit_ratio",
    "log_floor": "cauchy_scale",
    "lr": "learning_rate",
    "memory": "replay_steps",
    "muon_floor": "muon_min_norm",
    "muon_lr": "muon_learning_rate",
    "muon_rate": "muon_learning_rate",
    "natural_share": "natural_ratio",
    "num_accumulated": "gradient_accumulation_steps",
    "num_alike": "num_same_size",
    "odds": "size_probabilities",
    "recompute": "gradient_checkpointing",
    "time_rate": "time_learning_rate",
    "warmup": "num_warmup_steps",
    "warmup_steps": "num_warmup_steps",
    "weights": "loss_weights",
}

AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


def read_recipe(path: str | Path) -> dict:
    """Reads the mapping in a YAML file. Raises UserError if the file has none."""
    path = Path(path)
    if not path.is_file():
        raise UserError("no such recipe", where=path, fix="the recipes of the embedded models are in configs/")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:  # its constructors raise what they meet
        raise UserError("not YAML", where=path, got=str(error)) from error
    if not isinstance(values, dict) or "task" not in values:
        raise UserError("a recipe is a mapping with the key 'task'", where=path, got=type(values).__name__)
    return values


def write_recipe(path: Path, values: Mapping) -> Path:
    """Writes a recipe's values to a YAML file, in a folder that is made where there is none -> the path. Raises UserError if that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        partial.write_text(yaml.safe_dump(dict(values), sort_keys=False), encoding="utf-8")
    return path


def parse_recipe(cls: type[AnyRecipe], values: Mapping, where: object = None) -> AnyRecipe:
    """Builds a recipe from a mapping; lists become tuples. Raises UserError for unknown, missing or ill-typed keys."""
    known = {field.name: field for field in fields(cls)}
    old = {name: RENAMED[name] for name in values if name not in known and RENAMED.get(name) in known}
    for name, new in old.items():
        if new in values:
            raise UserError(f"the recipe has {name} and {new}, which are the same key", where=where, fix=f"keep {new}")
        warnings.warn(f"{where or 'recipe'}: the key {name} is now called {new}; the old name will be refused from version 0.3 on", stacklevel=2)
    values = rename_keys(values, known)
    unknown = sorted(map(str, set(values) - set(known)))
    if unknown:
        raise UserError("unknown keys in the recipe", where=where, got=", ".join(unknown), expected=", ".join(known))
    missing = [name for name, field in known.items() if field.default is MISSING and name not in values]
    if missing:
        raise UserError("keys missing from the recipe", where=where, expected=", ".join(missing))
    return cls(**{name: _parse_value(name, value, known[name].type, where) for name, value in values.items()})


def _parse_value(name: str, value: Any, wanted: Any, where: object) -> Any:
    """Converts a YAML value to the field type `wanted`. Raises UserError if the type does not match. One name stands for a list of one."""
    if wanted == tuple[str, ...]:
        items = [value] if isinstance(value, str) else value  # one name needs no list
        if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
            raise UserError(f"the recipe's {name} is no list of names", where=where, got=repr(value), expected="such as [first, second]")
        return tuple(items)
    if wanted is tuple and not isinstance(value, (list, tuple)):
        raise UserError(f"the recipe's {name} is no list", where=where, got=repr(value), expected="a list, in brackets")
    if isinstance(value, list):
        return tuple(tuple(item) if isinstance(item, list) else item for item in value)
    if wanted is float and type(value) in (int, str):  # YAML 1.1 reads 1e-3 as a string
        try:
            return float(value)
        except ValueError:
            raise UserError(f"the recipe's {name} is not a number", where=where, got=repr(value)) from None
    if wanted in (int, float, str, bool) and type(value) is not wanted:
        raise UserError(f"the recipe's {name} has the wrong type", where=where, got=repr(value), expected=wanted.__name__)
    return value


def rename_keys(values: Mapping, known: Collection[str]) -> dict:
    """Replaces old names by the present ones if these are in `known`."""
    return {name if name in known else RENAMED[name] if RENAMED.get(name) in known else name: value for name, value in values.items()}


def fingerprint(recipe: Recipe) -> dict:
    """Returns the fields that must match to resume a checkpoint, after a JSON round trip."""
    return json.loads(json.dumps({name: value for name, value in asdict(recipe).items() if name not in recipe.free_fields}))


def defaults_of(recipe: Recipe) -> dict:
    """Returns the defaults of the same fields, which apply to checkpoints older than a field."""
    return json.loads(
        json.dumps({field.name: field.default for field in fields(recipe) if field.default is not MISSING and field.name not in recipe.free_fields})
    )
