"""MiVE Edit Video: a whole edit in one node, of a clip of any length, by calling MiVE Encode, MiVE Reference Latents and MiVE Sampler."""

from comfy_api.latest import io

from ..mive_core.config import MiVEConfig
from ..mive_core.media.fit import SAME_SHAPE, check_frames, fit_reference, nearest_side, resize_and_crop
from ..mive_core.stretches import edit_in_stretches, find_stretches
from ..mive_core.types import Clip, EditRequest, EditResult
from .bridge.conditioning import GUIDES
from .bridge.keyframes import KEYFRAME_NUMBERS, KEYFRAMES, read_keyframes
from .bridge.messages import show_progress, with_text
from .bridge.model import config_of
from .bridge.untrained import untrained_warning
from .bridge.vae import decode
from .encode import MiVEEncode
from .latents import MiVEReferenceLatents
from .sampling import MiVESampler, sampling_inputs
from .vlm import LayerChoice, LayersType, VlmType

DEFAULTS = MiVEConfig()


class MiVEEditVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiVEEditVideo",
            display_name="MiVE Edit Video",
            category="MiVE",
            hidden=[io.Hidden.unique_id],
            description="The whole edit in one node: reads, samples and decodes. A clip longer than the model knows is edited in stretches, "
            "each from the last edited frame of the one before.",
            search_aliases=["video edit", "edit video", "long video", "video to video", "vid2vid"],
            inputs=[
                io.Model.Input("model", tooltip="From MiVE Load DiT, optionally with LoRAs and patches applied."),
                VlmType.Input("vlm", tooltip="From MiVE Load VLM: the VLM that the DiT was trained with."),
                io.Vae.Input("vae", tooltip="A Wan 2.1 VAE: wan_2.1_vae.safetensors, or tiny/vae.safetensors for the embedded models."),
                io.Image.Input("source", tooltip="The video to edit, as frames of the size to edit at: from MiVE Preflight. Any number of frames."),
                io.Image.Input("reference", tooltip="One image: the video's first frame, already edited."),
                io.String.Input("instruction", multiline=True, default="", dynamic_prompts=True, tooltip="What to change, in words."),
                io.Float.Input("fps", default=24.0, min=0.01, max=1000.0, step=0.01, tooltip="Frame rate of the source video, in frames per second."),
                *sampling_inputs(advanced=True),
                LayersType.Input("layers", optional=True, tooltip="From MiVE Layer Select. If not connected: those of the model."),
                KEYFRAMES,
                KEYFRAME_NUMBERS,
            ],
            outputs=[
                io.Image.Output(display_name="video", tooltip="The edited video, for MiVE Keep Source Detail: as many frames as the source, at its size.")
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        vlm,
        vae,
        source,
        reference,
        instruction: str,
        fps: float,
        seed: int,
        steps: int,
        cfg: float,
        shift: float,
        sampler: str,
        scheduler: str,
        layers: LayerChoice | None = None,
        keyframes: io.Autogrow.Type | None = None,
        keyframe_numbers: str = "",
    ) -> io.NodeOutput:
        length = config_of(model).edit_frames
        frames = check_frames(source, "source")
        size = nearest_side(frames.shape[2]), nearest_side(frames.shape[1])
        frames = resize_and_crop(frames, size, SAME_SHAPE)
        further = read_keyframes(keyframes, keyframe_numbers, size, len(frames))
        request = EditRequest(Clip(frames, fps), fit_reference(reference, size, max_stretch=SAME_SHAPE), instruction, further)
        spans = find_stretches(frames, length)
        texts: list[str] = []  # of each stretch

        def edit(part: EditRequest, is_last: bool) -> EditResult:
            show_progress(cls, f"stretch {len(texts) + 1} of {len(spans)}")
            clip, image = part.source.frames, part.reference[None]
            settings = fps, DEFAULTS.video_fps, DEFAULTS.max_video_tokens, layers, model
            read = [MiVEEncode.execute(vlm, clip, image, text, *settings) for text in ([instruction] if cfg == 1.0 else [instruction, ""])]
            images = {f"keyframe_{index}": keyframe.image[None] for index, keyframe in enumerate(part.keyframes)}
            numbers = ", ".join(str(keyframe.number) for keyframe in part.keyframes)
            conditionings = read[0].args[0], read[-1].args[0]
            prepared = MiVEReferenceLatents.execute(*conditionings, vae, clip, image, 0, 0, 0, None, images, numbers)
            positive, negative, latent = prepared.args
            sampled = MiVESampler.execute(model, positive, negative, latent, seed, steps, cfg, shift, sampler, scheduler, 1.0).args[0]
            texts.append("\n".join(text for output in (read[0], prepared) for text in output.ui["text"] if text))
            return EditResult(Clip(decode(vae, sampled["samples"]), fps), None if is_last else decode(vae, positive[0][1][GUIDES["source"]]))

        edited = edit_in_stretches(request, length, edit).edited.frames
        count = f"in {len(spans)} stretches of at most {max(last - first for first, last in spans)}" if len(spans) > 1 else "at once"
        lines = f"{len(edited)} frames, edited {count}", texts[0], untrained_warning(model)
        return io.NodeOutput(edited, ui=with_text("\n".join(line for line in lines if line)))


NODES = [MiVEEditVideo]
