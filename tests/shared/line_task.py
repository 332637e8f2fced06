"""The smallest task of the training loop: a noisy line, fitted by two layers."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import Dataset

from mive_core.train.loop import Task
from mive_core.train.recipe import Recipe, parse_recipe


@dataclass(frozen=True, kw_only=True)
class LineRecipe(Recipe):
    lr: float = 0.01


class Points(Dataset):
    """A noisy line: dataset[step] is the batch of that step."""

    def __getitem__(self, step):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 3, generator=generator)
        return x, x @ torch.tensor([1.0, -2.0, 0.5])


class LineTask(Task):
    def __init__(self, recipe):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 1))
        self.recipe, self.modules, self.dataset = recipe, {"model": model}, Points()
        self.optimizers = {"adamw": torch.optim.AdamW(model.parameters(), lr=recipe.lr), "unused": torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)}

    def lr_factor(self, step):
        return 1 - step / self.recipe.num_steps

    def loss(self, step, batch, generator):
        x, y = batch
        x = x + 0.1 * torch.randn(x.shape, generator=generator)
        return {"loss": (self.modules["model"](x)[:, 0] - y).square().mean()}

    def export(self, path):
        save_file(self.modules["model"].state_dict(), str(path))


def recipe(folder: Path, **changes) -> LineRecipe:
    values = {
        "task": "line",
        "output_dir": str(folder / "run"),
        "export": str(folder / "model.safetensors"),
        "num_steps": 30,
        "num_workers": 0,
        "checkpoint_every_s": 0.0,
        "log_every": 1,
        "ema_decay": 0.9,
    }
    return parse_recipe(LineRecipe, values | changes)
