"""The trainer's errors, which speak of a recipe, in words of the node that trains."""

from ...mive_core.errors import UserError
from ...mive_core.train.checkpoints import FurtherThanAsked, RecipeMismatch
from ...mive_core.train.finite import NotFinite

INPUT_NAMES = {  # recipe keys that are named differently on the node
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "start_from": "model",
    "caches": "pairs, vlm, vae, width, height or length",
    "bf16": "dtype",
    "weight_dtype": "dtype",
    "float8": "dtype",
    "num_steps": "steps",
}


def in_words_of_the_node(error: NotFinite | FurtherThanAsked | RecipeMismatch) -> UserError:
    """The trainer's error, which speaks of a recipe's keys -> one that speaks of the node's inputs."""
    if isinstance(error, NotFinite):
        fix = "lower learning_rate, set dtype to fp32, or look for a broken pair; if the last checkpoint has gone wrong already, set resume to 'start anew'"
        return UserError(error.what, where=error.where, got=error.got, fix=fix)
    if isinstance(error, FurtherThanAsked):
        return UserError(
            "this LoRA has been trained for more steps already",
            where="steps",
            got=error.num_steps,
            expected=f"at least {error.num_done}",
            fix="raise steps, or set resume to 'start anew'",
        )
    differ = ", ".join(dict.fromkeys(INPUT_NAMES.get(field, field) for field in error.differ))
    return UserError(
        "the training of that name was begun with other settings",
        where="lora_name",
        got=f"another {differ}",
        fix="set resume to 'start anew', or choose another name",
    )
