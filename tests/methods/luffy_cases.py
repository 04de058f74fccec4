"""LUFFY, SRFT and their baselines."""

from __future__ import annotations

from thence.methods.luffy import Luffy
from thence.methods.mixed_policy import MixedPolicy
from thence.methods.on_policy import OnPolicy
from thence.methods.rl_sft_loss import RlSftLoss
from thence.methods.srft import Srft

METHODS = (Luffy, MixedPolicy, OnPolicy, RlSftLoss, Srft)
NAMES = [method.name for method in METHODS]
