"""Trains a LoRA on a folder of pairs, by the library's own trainer."""

import math
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
import torch
from comfy_api.latest import io, ui

from ..mive_core.errors import UserError
from ..mive_core.evaluation.loss_curve import draw_losses, ends
from ..mive_core.formats.checkpoint import read_config
from ..mive_core.media.fit import check_request_frames, check_request_size
from .bridge.messages import show
from .bridge.paths import find, list_dits, list_pairs, list_vaes, list_vlms, place
from .dit import EXPECTED as EXPECTED_DIT
from .vlm import EXPECTED as EXPECTED_VLM

EXPECTED_PAIRS = "a folder with source/NAME.mp4, target/NAME.mp4 and NAME.txt, or a manifest, in ComfyUI's input folder"
EXPECTED_VAE = "a .safetensors file of a Wan 2.1 VAE in models/vae"
OFFERED = {"pairs": (list_pairs, EXPECTED_PAIRS), "model": (list_dits, EXPECTED_DIT), "vlm": (list_vlms, EXPECTED_VLM), "vae": (list_vaes, EXPECTED_VAE)}
DTYPES = ["default", "bf16", "fp32", "bf16, fp8 kept"]
CONTINUE, ANEW = "continue", "start anew"
FOLDER = "mive_training"  # in ComfyUI's output folder
WARMUP = 20  # steps
MAX_SEED = 2**63 - 1
MADE: set[Path] = set()  # by this process
LOST: list[Path] = []  # each time that one of them was gone


class MiVETrainLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiVETrainLoRA",
            display_name="MiVE Train LoRA",
            category="MiVE",
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            description="Trains a LoRA on clips before and after an edit. Cancel saves a checkpoint, and the next run goes on from there.",
            search_aliases=["train lora", "fine-tune", "finetune", "training", "lora training", "paired edits"],
            inputs=[
                io.Combo.Input("pairs", options=list(list_pairs()), tooltip=f"What to learn. Expected: {EXPECTED_PAIRS}."),
                io.Combo.Input("model", options=list(list_dits()), tooltip=f"The DiT that the LoRA is for. Expected: {EXPECTED_DIT}."),
                io.Combo.Input("vlm", options=list(list_vlms()), tooltip=f"The VLM that the DiT reads. Expected: {EXPECTED_VLM}."),
                io.Combo.Input("vae", options=list(list_vaes()), tooltip=f"The VAE that the DiT was trained with. Expected: {EXPECTED_VAE}."),
                io.String.Input(
                    "lora_name",
                    default="mive_lora.safetensors",
                    tooltip="The new file, in models/loras. Only what this node trained under that name is replaced.",
                ),
                io.Int.Input(
                    "width",
                    default=832,
                    min=16,
                    max=8192,
                    step=16,
                    tooltip="Clips are scaled to cover width x height and cropped; upright ones height x width. A multiple of 16.",
                ),
                io.Int.Input("height", default=480, min=16, max=8192, step=16, tooltip="In pixels; a multiple of 16."),
                io.Int.Input(
                    "length",
                    default=81,
                    min=1,
                    max=8193,
                    step=4,
                    tooltip="Frames of each clip, from its first on; 4n+1. A shorter clip is left out, and named.",
                ),
                io.Int.Input("steps", default=1000, min=1, max=1_000_000, tooltip="In all. A finished training goes on where this is raised."),
                io.Int.Input("batch_size", default=1, min=1, max=256, tooltip="Pairs in a step. Memory grows with it."),
                io.Float.Input(
                    "learning_rate", default=1e-4, min=1e-7, max=1.0, step=1e-6, round=1e-7, tooltip="How far a step goes. 0.0001 suits most LoRAs."
                ),
                io.Int.Input("rank", default=32, min=1, max=1024, tooltip="Of the LoRA's matrices: how much it can hold."),
                io.Float.Input(
                    "alpha", default=0.0, min=0.0, max=4096.0, step=1.0, advanced=True, tooltip="The LoRA counts by alpha / rank. 0: the rank, so by 1."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=False,
                    tooltip="Of the LoRA's first weights, the order of the pairs and the noise.",
                ),
                io.Boolean.Input(
                    "gradient_checkpointing",
                    default=True,
                    tooltip="Computes activations again instead of keeping them: far less memory, about a third more time.",
                ),
                io.Boolean.Input(
                    "offload",
                    default=False,
                    advanced=True,
                    tooltip="With gradient checkpointing, what it still keeps waits in main memory: for long clips on small cards.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=DTYPES,
                    default=DTYPES[0],
                    advanced=True,
                    tooltip="Of the DiT while it is trained; the LoRA's own weights are fp32. default: bf16 where the device is fast at it. "
                    "bf16, fp8 kept: matrices that the file has in 8 bits stay so, which halves their memory.",
                ),
                io.Combo.Input(
                    "resume",
                    options=[CONTINUE, ANEW],
                    default=CONTINUE,
                    tooltip="continue: from the last checkpoint of that name, if there is one. start anew: that checkpoint is removed.",
                ),
            ],
            outputs=[
                io.AnyType.Output(
                    display_name="lora_name", tooltip="For the lora_name of MiVE Load LoRA, or of the stock loader."
                ),  # whose dropdown takes no other type
                io.LoraModel.Output(display_name="lora", tooltip="The same weights, for the stock node Load LoRA Model."),
                io.Image.Output(display_name="loss_curve", tooltip="Each step's loss, and its running mean."),
                io.String.Output(display_name="report", tooltip="Pairs, steps, losses, and what was left out."),
            ],
        )

    @classmethod
    def validate_inputs(cls, pairs: str | None, model: str | None, vlm: str | None, vae: str | None, lora_name: str | None) -> bool | str:
        for name, value in {"pairs": pairs, "model": model, "vlm": vlm, "vae": vae}.items():
            entries, expected = OFFERED[name]
            if value is not None and value not in entries():
                return f"{name}: {value!r} is not there; expected {expected}"
        try:
            place("loras", lora_name or "of_a_wire.safetensors", "lora_name")
        except UserError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, pairs: str, lora_name: str, **inputs) -> str:
        """Changes with the pairs' files, and where a LoRA that was made here is gone."""
        path, lora = find(list_pairs, pairs, EXPECTED_PAIRS), place("loras", lora_name, "lora_name")
        if lora in MADE and not lora.exists():
            MADE.remove(lora)
            LOST.append(lora)
        files = sorted(file for file in (path if path.is_dir() else path.parent).rglob("*") if file.is_file())
        return repr((LOST.count(lora), [(file.as_posix(), file.stat().st_size, file.stat().st_mtime_ns) for file in files]))

    @classmethod
    def execute(
        cls,
        pairs: str,
        model: str,
        vlm: str,
        vae: str,
        lora_name: str,
        width: int,
        height: int,
        length: int,
        steps: int,
        batch_size: int,
        learning_rate: float,
        rank: int,
        alpha: float,
        seed: int,
        gradient_checkpointing: bool,
        offload: bool,
        dtype: str,
        resume: str,
    ) -> io.NodeOutput:
        from .bridge.training_job import Job  # the trainer, av and yaml come with the first training

        check_request_size((width, height))
        check_request_frames(length)
        check_numbers(learning_rate=learning_rate, alpha=alpha)
        given = {"pairs": pairs, "model": model, "vlm": vlm, "vae": vae}
        found = {name: find(entries, given[name], expected) for name, (entries, expected) in OFFERED.items()}
        bf16 = dtype.startswith("bf16") or (dtype == "default" and comfy.model_management.should_use_bf16(comfy.model_management.get_torch_device()))
        job = Job(
            **found,
            lora=place("loras", lora_name, "lora_name"),
            folder=Path(folder_paths.get_output_directory()) / FOLDER / Path(lora_name).stem,
            size=(width, height),
            num_frames=length,
            recipe=dict(
                num_steps=steps,
                batch_size=batch_size,
                learning_rate=learning_rate,
                lora_rank=rank,
                lora_alpha=alpha,
                seed=seed,
                gradient_checkpointing=gradient_checkpointing or offload,
                offload=offload,
                bf16=bf16,
                weight_dtype="bf16" if bf16 else "fp32",
                float8="kept" if dtype.endswith("kept") else "scaled_back",
                num_warmup_steps=WARMUP,
                time_shift=read_config(found["model"]).shift,
            ),
        )
        entries = job.check()
        if resume == ANEW:
            job.forget()
        skipped = job.run(cls, entries)
        MADE.add(job.lora)
        losses = job.losses()
        report = "\n".join(
            [
                f"{lora_name}: rank {rank}, {len(entries) - len(skipped)} pairs, {len(losses)} steps",
                "loss {:.4f} at first, {:.4f} at last".format(*ends(losses)),
                *(f"left out: {item['name']}: {item['why']}" for item in skipped),
            ]
        )
        show(cls, report)
        curve = torch.from_numpy(np.array(draw_losses(losses)))[None].float() / 255
        return io.NodeOutput(lora_name, comfy.utils.load_torch_file(str(job.lora), safe_load=True), curve, report, ui=ui.PreviewImage(curve, cls=cls))


def check_numbers(**values: float) -> None:
    """A wire's value has passed no bounds. Raises UserError for one that is no number."""
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise UserError("this is no number to learn with", where=name, got=value)


NODES = [MiVETrainLoRA]
