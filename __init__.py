"""The entry point of the ComfyUI pack."""

from .nodes import comfy_entrypoint

WEB_DIRECTORY = "./web"  # icons and help pages

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
