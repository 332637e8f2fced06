"""Tells how much of a LoRA fits a MiVE DiT, and refuses one whose new parts were made for another."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ..config import METADATA_KEY, MiVEConfig
from ..errors import UserError
from .lora_file import BASE_CONFIG_KEY, BASE_KEY, NEW_PARTS_KEY, LoRAFile
from .untrained import NEW_PARTS, still_untrained

CROSS_ATTENTION = re.compile(r"cross_attn|attn2|norm3|text_embed|img_emb")
FIX = "take a LoRA of Wan 2.1 of this DiT's width, or of MiVE"
# fields of the config that the new parts depend on, and how a message names their values
BASE_FIELDS = {
    "width": "width {}",
    "num_heads": "{} heads",
    "ffn_width": "feed-forward width {}",
    "num_blocks": "{} blocks",
    "latent_channels": "{} latent channels",
    "patch_size": "patches {}",
    "rope_scheme": "positions {}",
    "vlm": "{}",
    "vlm_width": "VLM width {}",
    "vlm_num_layers": "{} VLM layers",
    "layers": "reads layers {}",
}


@dataclass(frozen=True)
class Fit:
    """How many of a LoRA's keys fit and how many of those change new parts; how many of the others belong to the cross-attention, which MiVE lacks."""

    num_keys: int
    num_fitting: int
    num_cross: int
    num_new: int = 0

    @classmethod
    def of(cls, keys: Mapping[str, str | None]) -> "Fit":
        """Key of the LoRA -> the DiT's parameter that it changes, without prefix; None if it fits none."""
        fitting = [parameter for parameter in keys.values() if parameter is not None]
        num_cross = sum(bool(CROSS_ATTENTION.search(key)) for key, parameter in keys.items() if parameter is None)
        new = tuple(f"{part}." for part in NEW_PARTS if part not in still_untrained(NEW_PARTS, fitting))  # a Wan LoRA may hold the patch embedding's bias
        return cls(len(keys), len(fitting), num_cross, sum(parameter.startswith(new) for parameter in fitting))

    def __str__(self) -> str:
        rest = self.num_keys - self.num_fitting
        new = f", {self.num_new} of them new parts" if self.num_new else ""
        if not rest:
            return f"all {self.num_keys} keys fit{new}"
        parts = [(self.num_cross, "of the cross-attention, which MiVE does not have"), (rest - self.num_cross, "of other layers or shapes")]
        return f"{self.num_fitting} of {self.num_keys} keys fit{new}, {rest} do not: " + ", ".join(f"{number} {what}" for number, what in parts if number)


def fit_lora(lora: LoRAFile, shapes: Mapping[str, tuple[int, ...]], where: Path) -> tuple[frozenset[str], Fit]:
    """A LoRA and the DiT's shapes -> the parameters that the LoRA changes, and the Fit. Raises UserError if no key fits."""
    known = {name: shape for name, shape in lora.shapes.items() if name in shapes}
    fitting = frozenset(name for name, shape in known.items() if shape[0] == shapes[name][0] and math.prod(shape) == math.prod(shapes[name]))
    keys = {**dict.fromkeys(lora.unread), **lora.keys}
    fit = Fit.of({key: parameter if parameter in fitting else None for key, parameter in keys.items()})
    if not known:
        expected = "names of Wan's self-attention and feed-forward layers"
        raise UserError("no key of this LoRA fits the DiT", where=where, got=str(fit), expected=expected, fix=FIX)
    if not fitting:
        got, expected = f"none of {len(known)} weights of a fitting shape", f"a width of {shapes['patch_embedding.weight'][0]}"
        raise UserError("this LoRA was made for a DiT of another size", where=where, got=got, expected=expected, fix=FIX)
    return fitting, fit


def check_base(metadata: Mapping[str, str], config: MiVEConfig, where: object, base: object) -> None:
    """Raises UserError if the LoRA holds new parts that were trained on another base than one of that config; `base` names it."""
    if NEW_PARTS_KEY not in metadata or BASE_CONFIG_KEY not in metadata:
        return
    made_on = MiVEConfig.from_metadata({METADATA_KEY: metadata[BASE_CONFIG_KEY]}, where=where)
    differing = [name for name in BASE_FIELDS if _comparable(made_on)[name] != _comparable(config)[name]]
    if differing:
        raise UserError(
            "this LoRA holds new parts of another base",
            where=where,
            got=f"made on {metadata.get(BASE_KEY, 'a checkpoint')}: {_describe(made_on, differing)}",
            expected=f"{base}: {_describe(config, differing)}",
            fix="apply it to the checkpoint that it was trained on, or to another of the same kind",
        )


def _comparable(config: MiVEConfig) -> dict:
    return {**asdict(config), "layers": config.resolved_layers}


def _describe(config: MiVEConfig, names: Iterable[str]) -> str:
    values = asdict(config)
    return ", ".join(BASE_FIELDS[name].format(" ".join(map(str, values[name])) if isinstance(values[name], tuple) else values[name]) for name in names)
