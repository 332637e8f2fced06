"""Model files: read, checked, written and converted (safetensors, GGUF, Wan, fp8)."""
