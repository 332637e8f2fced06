"""The entry point of the ComfyUI pack."""

from .nodes import comfy_entrypoint

WEB_DIRECTORY = "./web"  # icons, help pages, and the script that draws texts on nodes

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
