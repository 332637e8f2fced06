"""The layer study: what the hidden states of each layer of a VLM give a DiT that edits."""
