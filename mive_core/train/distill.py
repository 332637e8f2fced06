"""The task `distill`: a LoRA with which an editor takes few steps without guidance, by piecewise rectified flow (PeRFlow, Yan et al., arXiv 2405.07510).

The way from noise to data is cut into windows, one for each step of the student. From the upper end of a window, a target with noise added,
the teacher solves the flow to the lower end in several guided steps. The student learns the constant velocity that joins both ends, at any
time between them. Teacher and student are one model, without the LoRA and with it.
B batch, C latent channels, T x Y x X latent grid.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..cost.flops import Layout, dit_flops
from ..errors import UserError
from ..flow import FlowSample, classifier_free_guidance, euler, flow_path, schedule
from ..formats.lora_file import sampling_metadata
from ..reference import fix_first_frame
from .cache import read_index
from .edit_task import EditRecipe, EditTask
from .objective import EditFeatures, reference_times, velocity_losses
from .recipe import parse_recipe
from .throughput import Workload

SHARED = ("time_sampling", "scheduled_sampling_ratio", "condition_dropout")  # settings of training on targets, which have no meaning here


@dataclass(frozen=True, kw_only=True)
class DistillRecipe(EditRecipe):
    """Recipe of a distillation."""

    lora_rank: int = 32
    student_steps: int = 4  # sampling steps of the student, without guidance
    student_shift: float = 0.0  # timestep shift of these steps; 0: the checkpoint's
    teacher_steps: int = 8  # sampling steps of the teacher in each window
    teacher_cfg: float = 0.0  # guidance scale of the teacher; 0: the checkpoint's


class DistillTask(EditTask):
    """Trains the LoRA."""

    recipe: DistillRecipe

    def __init__(self, recipe: DistillRecipe, where: object = None):
        check_distill_recipe(recipe, where)
        super().__init__(recipe, where)
        self.cfg, self.shift = recipe.teacher_cfg or self.config.cfg, recipe.student_shift or self.config.shift
        self.times = schedule(recipe.student_steps, self.shift)
        if self.cfg != 1.0:
            for folder in recipe.caches:
                if not read_index(folder)["contract"].get("negative"):
                    raise UserError(
                        "the teacher's guidance needs the states of an empty instruction",
                        where=folder,
                        got=f"guidance {self.cfg:g}",
                        fix="run `mive data cache --negative` into another folder, or set teacher_cfg to 1",
                    )

    def loss(self, step: int, batch: EditFeatures, generator: torch.Generator) -> dict[str, Tensor]:
        """Draws a window, noise and times in the window, and returns the losses of velocity_losses."""
        recipe = self.recipe
        window = int(torch.randint(recipe.student_steps, (), generator=generator))
        upper, lower = self.times[window : window + 2].tolist()
        noise, places = torch.randn(batch.target.shape, generator=generator), torch.rand(len(batch.target), generator=generator)
        batch, noise, places = batch.to(recipe.device), noise.to(recipe.device), places.to(recipe.device)
        with torch.autocast(torch.device(recipe.device).type, torch.bfloat16, enabled=recipe.bf16):
            start = flow_path(batch.target, noise, torch.full_like(places, upper)).x_t
            end = self.solve(batch, start, upper, lower)
            path = between(start, end, upper, lower, places)
            return velocity_losses(self.model, batch, batch.states, path, recipe.edited_weight, self.channel_weights, cauchy_scale=recipe.cauchy_scale)

    @torch.no_grad()
    def solve(self, batch: EditFeatures, x: Tensor, upper: float, lower: float) -> Tensor:
        """The teacher's flow from x (B, C, T, Y, X) at the time `upper` -> the point at `lower`."""
        config, places = self.config, reference_times(batch)
        with without_lora(self.model):
            states = [batch.states] if self.cfg == 1.0 or batch.negative is None else [batch.states, batch.negative]
            tokens = [self.model.embed_condition(each) for each in states]

            def velocity(x: Tensor, t: float) -> Tensor:
                times = x.new_full((len(x),), t)
                contexts = tokens if t > config.guided_above else tokens[:1]
                guided = classifier_free_guidance(
                    *(self.model(x, batch.source, batch.reference, context, times, places).float() for context in contexts), cfg=self.cfg
                )
                return fix_first_frame(guided, x, times, batch.source, batch.reference) if config.fix_first_frame else guided

            return euler(velocity, x, torch.linspace(upper, lower, self.recipe.teacher_steps + 1))

    def workload(self, batch: EditFeatures) -> Workload:
        """Counts the teacher's forwards too."""
        layout = Layout(batch.states.shape[2], self.config.patch_grid(*batch.target.shape[2:]), batch.reference.shape[2])
        work = super().workload(batch)
        return replace(work, flops=work.flops + len(batch.target) * (1 + (self.cfg != 1.0)) * self.recipe.teacher_steps * dit_flops(self.config, layout))

    def export_metadata(self) -> dict[str, str]:
        return sampling_metadata(self.recipe.student_steps, self.shift, 1.0)


def between(start: Tensor, end: Tensor, upper: float, lower: float, places: Tensor) -> FlowSample:
    """Both ends of a window (B, ...) and places (B,) from 0 at its lower to 1 at its upper end -> the points there, and their constant velocity."""
    share = places.view(-1, *[1] * (start.ndim - 1))
    return FlowSample(end + share * (start - end), (start - end) / (upper - lower), lower + places * (upper - lower))


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """Within it, the model computes as if the LoRA were not there."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def check_distill_recipe(recipe: DistillRecipe, where: object) -> None:
    """Raises UserError for invalid values of DistillRecipe's own fields, and for those that a distillation has no use for."""
    for name, least in (("lora_rank", 1), ("student_steps", 1), ("teacher_steps", 1)):
        if getattr(recipe, name) < least:
            raise UserError(f"a distillation needs a {name}", where=where, got=getattr(recipe, name), expected=f"{least} or more")
    default = {name: getattr(DistillRecipe(task="distill", output_dir="", export="", num_steps=1, start_from="", caches=()), name) for name in SHARED}
    for name, value in default.items():
        if getattr(recipe, name) != value:
            raise UserError(f"a distillation has no use for {name}", where=where, fix="leave it out")
    if recipe.new_parts == "trained":
        raise UserError("a distillation trains a LoRA alone", where=where, got="new_parts: trained", fix="leave new_parts out")


def recipe_values(values: dict, low_precision: bool) -> dict:
    """The values of a distillation's recipe, completed as a model's size asks for: `low_precision` for a large one. Raises UserError for invalid ones."""
    values = {"task": "distill", "num_warmup_steps": min(100, values["num_steps"]), "decay_ratio": 0.5} | values
    if low_precision:
        values |= {"bf16": True, "gradient_checkpointing": True, "weight_dtype": "bf16", "float8": "kept"}
    check_distill_recipe(parse_recipe(DistillRecipe, values), None)
    return values


def build(values: dict, where: object = None) -> DistillTask:
    """Builds the task from the values of a recipe. Raises UserError."""
    return DistillTask(parse_recipe(DistillRecipe, values, where), where)
