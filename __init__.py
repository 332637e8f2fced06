"""The door of the ComfyUI pack."""

from .nodes import comfy_entrypoint

WEB_DIRECTORY = "./web"  # help pages

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
