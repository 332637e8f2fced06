"""Adapters between the library and ComfyUI. The Hosted* classes run the library's models under ComfyUI's memory management."""
