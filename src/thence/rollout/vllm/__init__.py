"""Sampling with vLLM, which runs in its own Python environment (docs/vllm.md)."""
