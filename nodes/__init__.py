"""The pack's nodes, as a ComfyUI extension."""

from comfy_api.latest import ComfyExtension, io

from . import convert, detail, diagnostics, dit, edit, encode, inspect, latents, lora, register, sampling, train, vlm
from .bridge.load import StockLoaderGuard
from .bridge.paths import register as register_paths

MODULES = (vlm, encode, register, dit, latents, sampling, edit, inspect, diagnostics, detail, convert, lora, train)


class MiVEExtension(ComfyExtension):
    async def on_load(self) -> None:
        register_paths()
        StockLoaderGuard.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [node for module in MODULES for node in module.NODES]


async def comfy_entrypoint() -> MiVEExtension:
    return MiVEExtension()
