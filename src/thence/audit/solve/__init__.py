"""From optimizer steps to token weights: probe, gradients of single tokens, the linear system and its solution."""
