"""Sampling with vLLM, which runs in a Python environment of its own (docs/vllm.md)."""
