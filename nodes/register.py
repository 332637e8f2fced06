"""MiVE Register Reference: moves an edited first frame that an image editor shifted or zoomed back over the source's."""

from comfy_api.latest import io

from ..mive_core.media.fit import check_frames, fit_reference
from ..mive_core.registration import register
from .bridge.messages import log_warnings


class MiVERegisterReference(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiVERegisterReference",
            display_name="MiVE Register Reference",
            category="MiVE",
            description="Moves an edited first frame over the source's first frame, where an image editor has shifted or zoomed it.",
            search_aliases=["align image", "image registration", "shift", "zoom"],
            inputs=[
                io.Image.Input("source", tooltip="The video before the edit, or its first frame."),
                io.Image.Input("reference", tooltip="One image: the first frame, edited. Of any size; it is scaled to the source's and cropped at the centre."),
            ],
            outputs=[io.Image.Output(display_name="reference", tooltip="The reference in the size and the framing of the source.")],
        )

    @classmethod
    def execute(cls, source, reference) -> io.NodeOutput:
        with log_warnings():
            frame = check_frames(source[:1].cpu(), "source")[0]
            fitted = fit_reference(reference.cpu(), (frame.shape[1], frame.shape[0]))
            return io.NodeOutput(register(fitted, frame)[None])


NODES = [MiVERegisterReference]
