"""Checkpoints on disk, tensor by tensor: torch, safetensors, folders of shards, packed."""
