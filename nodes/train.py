"""MiVE Train LoRA: trains a LoRA on a folder of clip pairs with the library's trainer."""

import math
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
import torch
from comfy_api.latest import io, ui

from ..mive_core.errors import UserError
from ..mive_core.evaluation.loss_curve import draw_losses, first_and_last_mean
from ..mive_core.formats.checkpoint import read_config
from ..mive_core.media.fit import check_request_frames, check_request_size
from .bridge.messages import with_text
from .bridge.paths import find, list_dits, list_pairs, list_vaes, list_vlms, output_path
from .dit import EXPECTED as EXPECTED_DIT
from .vlm import EXPECTED as EXPECTED_VLM

EXPECTED_PAIRS = "a folder with source/NAME.mp4, target/NAME.mp4 and NAME.txt, or a manifest, in ComfyUI's input folder"
EXPECTED_VAE = "a .safetensors file of a Wan 2.1 VAE in models/vae"
FILE_INPUTS = {"pairs": (list_pairs, EXPECTED_PAIRS), "model": (list_dits, EXPECTED_DIT), "vlm": (list_vlms, EXPECTED_VLM), "vae": (list_vaes, EXPECTED_VAE)}
DTYPES = ["default", "bf16", "fp32", "bf16, fp8 kept"]
CONTINUE, ANEW = "continue", "start anew"
NEW_PARTS = {"auto": "", "frozen": "frozen", "trained": "trained"}  # option -> recipe value
FOLDER = "mive_training"  # in ComfyUI's output folder
NUM_WARMUP_STEPS = 20
MAX_SEED = 2**63 - 1
TRAINED: set[Path] = set()  # LoRA files trained by this process
DELETED: list[Path] = []  # files of TRAINED found deleted, one entry per deletion


class MiVETrainLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiVETrainLoRA",
            display_name="MiVE Train LoRA",
            category="MiVE",
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            description="Trains a LoRA on pairs of clips, before and after an edit. Cancel saves a checkpoint, and the next run resumes from it.",
            search_aliases=["train lora", "fine-tune", "finetune", "training", "lora training", "paired edits"],
            inputs=[
                io.Combo.Input("pairs", options=list(list_pairs()), tooltip=f"The pairs of clips to learn from. Expected: {EXPECTED_PAIRS}."),
                io.Combo.Input("model", options=list(list_dits()), tooltip=f"The DiT to train the LoRA for. Expected: {EXPECTED_DIT}."),
                io.Combo.Input("vlm", options=list(list_vlms()), tooltip=f"The VLM that the DiT was trained with. Expected: {EXPECTED_VLM}."),
                io.Combo.Input("vae", options=list(list_vaes()), tooltip=f"The VAE that the DiT was trained with. Expected: {EXPECTED_VAE}."),
                io.String.Input(
                    "lora_name",
                    default="mive_lora.safetensors",
                    tooltip="Name of the new file in models/loras. An existing file is replaced only if this node trained it under that name.",
                ),
                io.Int.Input(
                    "width",
                    default=832,
                    min=16,
                    max=8192,
                    step=16,
                    tooltip="In pixels, a multiple of 16. Clips are scaled to cover width x height and cropped; portrait clips swap width and height.",
                ),
                io.Int.Input("height", default=480, min=16, max=8192, step=16, tooltip="In pixels, a multiple of 16."),
                io.Int.Input(
                    "length",
                    default=81,
                    min=1,
                    max=8193,
                    step=4,
                    tooltip="Number of frames used of each clip, from the first on: 4n+1. Shorter clips are skipped and listed in the report.",
                ),
                io.Int.Input("steps", default=1000, min=1, max=1_000_000, tooltip="Total number of training steps. Raise it to continue a finished training."),
                io.Int.Input("batch_size", default=1, min=1, max=256, tooltip="Pairs per step. Memory grows in proportion."),
                io.Float.Input(
                    "learning_rate", default=1e-4, min=1e-7, max=1.0, step=1e-6, round=1e-7, tooltip="Step size of the optimizer. 0.0001 suits most LoRAs."
                ),
                io.Int.Input("rank", default=32, min=1, max=1024, tooltip="Rank of the LoRA's matrices: a higher rank can learn more and takes a larger file."),
                io.Float.Input(
                    "alpha",
                    default=0.0,
                    min=0.0,
                    max=4096.0,
                    step=1.0,
                    advanced=True,
                    tooltip="The LoRA is scaled by alpha / rank. 0: use the rank, a scale of 1.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=False,
                    tooltip="Random seed of the LoRA's initial weights, the order of the pairs and the noise.",
                ),
                io.Boolean.Input(
                    "gradient_checkpointing", default=True, tooltip="Recomputes activations instead of storing them: far less memory, about a third more time."
                ),
                io.Boolean.Input(
                    "offload",
                    default=False,
                    advanced=True,
                    tooltip="Keeps the activations that gradient checkpointing still stores in main memory: for long clips on small cards.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=DTYPES,
                    default=DTYPES[0],
                    advanced=True,
                    tooltip="Data type of the DiT during training; the LoRA's own weights are fp32. default: bf16 if the device is fast at it, else fp32. "
                    "bf16, fp8 kept: matrices stored in 8 bits stay in 8 bits, which halves their memory.",
                ),
                io.Combo.Input(
                    "resume",
                    options=[CONTINUE, ANEW],
                    default=CONTINUE,
                    tooltip="continue: resume from the last checkpoint of this LoRA name, if there is one. start anew: delete that checkpoint first.",
                ),
                io.Combo.Input(
                    "new_parts",
                    options=list(NEW_PARTS),
                    default=next(iter(NEW_PARTS)),
                    optional=True,  # API prompts of before lack it
                    advanced=True,
                    tooltip="What a DiT has that Wan lacks: the layers that read the source and the VLM. auto: trained beside the LoRA, into the same "
                    "file, if the DiT is fresh from MiVE Init From Wan; else frozen.",
                ),
            ],
            outputs=[
                io.AnyType.Output(
                    display_name="lora_name", tooltip="For the lora_name of MiVE Load LoRA or of the stock LoRA loader."
                ),  # AnyType, because the loaders' dropdown accepts no other type
                io.LoraModel.Output(display_name="lora", tooltip="The LoRA's weights, for the stock node Load LoRA Model."),
                io.Image.Output(display_name="loss_curve", tooltip="Plot of the loss of each step and its running mean."),
                io.String.Output(display_name="report", tooltip="Number of pairs and steps, mean loss at the start and at the end, and the skipped pairs."),
            ],
        )

    @classmethod
    def validate_inputs(cls, pairs: str | None, model: str | None, vlm: str | None, vae: str | None, lora_name: str | None) -> bool | str:
        for name, value in {"pairs": pairs, "model": model, "vlm": vlm, "vae": vae}.items():
            entries, expected = FILE_INPUTS[name]
            if value is not None and value not in entries():
                return f"{name}: {value!r} is not there; expected {expected}"
        try:
            output_path("loras", lora_name or "from_a_wire.safetensors", "lora_name")  # None while a wire supplies the name
        except UserError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, pairs: str, lora_name: str, **inputs) -> str:
        """Returns a text that changes when the pairs' files change, or when a LoRA trained here has been deleted."""
        path, lora = find(list_pairs, pairs, EXPECTED_PAIRS), output_path("loras", lora_name, "lora_name")
        if lora in TRAINED and not lora.exists():
            TRAINED.remove(lora)
            DELETED.append(lora)
        files = sorted(file for file in (path if path.is_dir() else path.parent).rglob("*") if file.is_file())
        return repr((DELETED.count(lora), [(file.as_posix(), file.stat().st_size, file.stat().st_mtime_ns) for file in files]))

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
        new_parts: str = "auto",
    ) -> io.NodeOutput:
        from .bridge.training_job import Job  # imports the trainer, av and yaml, which are slow to load

        check_request_size((width, height))
        check_request_frames(length)
        check_numbers(learning_rate=learning_rate, alpha=alpha)
        if steps < 1:
            raise UserError("a training takes a step or more", where="steps", got=steps)
        given = {"pairs": pairs, "model": model, "vlm": vlm, "vae": vae}
        found = {name: find(entries, given[name], expected) for name, (entries, expected) in FILE_INPUTS.items()}
        bf16 = dtype.startswith("bf16") or (dtype == "default" and comfy.model_management.should_use_bf16(comfy.model_management.get_torch_device()))
        job = Job(
            **found,
            lora=output_path("loras", lora_name, "lora_name"),
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
                num_warmup_steps=NUM_WARMUP_STEPS,
                new_parts=NEW_PARTS[new_parts],
                time_shift=read_config(found["model"]).shift,
            ),
        )
        entries = job.check()
        if resume == ANEW:
            job.discard_progress()
        skipped = job.run(cls, entries)
        TRAINED.add(job.lora)
        losses, whole = job.losses(), job.trained_new_parts()
        report = "\n".join(
            [
                f"{lora_name}: rank {rank}, {len(entries) - len(skipped)} pairs, {steps} steps",
                "loss {:.4f} at first, {:.4f} at last".format(*first_and_last_mean(losses)),
                *([f"trained whole beside the LoRA, in the same file: {whole.replace(',', ', ')}"] if whole else []),
                *([f"skipped steps, which were not finite: {job.num_skipped()}"] if job.num_skipped() else []),
                *(f"left out: {item['name']}: {item['why']}" for item in skipped),
            ]
        )
        curve = torch.from_numpy(np.array(draw_losses(losses)))[None].float() / 255
        return io.NodeOutput(
            lora_name, comfy.utils.load_torch_file(str(job.lora), safe_load=True), curve, report, ui=with_text(report, ui.PreviewImage(curve, cls=cls))
        )


def check_numbers(**values: float) -> None:
    """Raises UserError unless the values are finite and not negative. ComfyUI does not check the bounds of values from wires."""
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise UserError("this is no number to learn with", where=name, got=value)


NODES = [MiVETrainLoRA]
