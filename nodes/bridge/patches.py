"""Refuses patches that MiVE's DiT would never call or that would break it, by the name of the node that made them.

ComfyUI hands a model whatever patches its nodes have put into the model's options; those that a model does not know have no effect.
"""

import re
from collections.abc import Iterator
from typing import Any

import comfy.model_sampling
from torch import Tensor

from ...mive_core.errors import UserError
from .model import MiVEModel

TIME = 2  # dimension of a latent (B, C, T, Y, X)
# forwards whose arguments or sequence differ from Wan's
OWN_FORWARD = re.compile(r"diffusion_model\.(blocks\.\d+\.(self_attn\.)?)?forward$")


def check_patches(executor, model: MiVEModel, conds: list, x: Tensor, sigma: Tensor, model_options: dict) -> list:
    """Wraps each computation of ComfyUI's predictions, as some nodes add their patch at each step. Raises UserError."""
    for place, patch in unused_patches(model_options.get("transformer_options", {}), model):
        raise UserError(
            f"{made_by(patch)} does not fit MiVE",
            where="the MODEL's patches",
            got=f"a patch of {place}, which MiVE's DiT does not have",
            fix="take that node out of the graph",
        )
    if not isinstance(model.model_sampling, comfy.model_sampling.CONST):
        names = ", ".join(base.__name__ for base in type(model.model_sampling).__bases__)
        raise UserError(
            "this noise schedule does not fit MiVE", where="the MODEL's sampling", got=names, expected="flow matching", fix="ModelSamplingSD3 sets its shift"
        )
    windows = getattr(model_options.get("context_handler"), "dim", TIME)
    if windows != TIME:
        raise UserError(
            "the context windows do not run along time",
            where="Context Windows (Manual)",
            got=f"dim {windows}",
            expected=f"dim {TIME}",
            fix="or take Wan Context Windows, which counts in frames",
        )
    return executor(model, conds, x, sigma, model_options)


def unused_patches(options: dict, model: MiVEModel) -> Iterator[tuple[str, Any]]:
    """Yields place and patch of every patch that the DiT would not call, or not as the patch expects."""
    for place, patches in options.get("patches", {}).items():
        yield from ((place, patch) for patch in patches)
    blocks = {("double_block", index) for index in range(model.config.num_blocks)}
    for place, patches in options.get("patches_replace", {}).items():
        if patches and not (place == "dit" and blocks & patches.keys()):  # nodes name blocks of several kinds of models at once
            yield from ((" ".join(map(str, (place, *key))), patch) for key, patch in patches.items())
    for place, patch in getattr(model.current_patcher, "object_patches", {}).items():
        if OWN_FORWARD.match(place):
            yield place, patch


def made_by(patch: Any) -> str:
    """The class, most often the node, in which a patch was made, and its file: "NAGuidance (nodes_nag)"."""
    function = patch if hasattr(patch, "__qualname__") else type(patch)
    file = re.split(r"[./\\]", function.__module__)[-1]  # a pack's module is named after its path
    return f"{function.__qualname__.split('.')[0]} ({file})"
