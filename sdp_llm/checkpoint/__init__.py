"""Checkpoints and exports: safetensors and JSON, complete or absent, never pickle."""
