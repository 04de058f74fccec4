"""thence: SFT, thence RL. Post-train language models to reason, correct by construction."""

__version__ = "0.1.0"
