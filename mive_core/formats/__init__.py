"""Reading, checking, writing and converting model files (safetensors, GGUF, Wan, fp8)."""
