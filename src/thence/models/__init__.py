"""Hugging Face causal language models taken apart, and the checks that the parts are what thence takes them for."""
