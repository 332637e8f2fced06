"""What the library and ComfyUI each expect of the other."""
