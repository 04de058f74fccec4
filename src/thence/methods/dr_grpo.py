"""Dr. GRPO (arXiv 2503.20783): GRPO without its two biases.

    L = - (1 / (B L_max)) sum_i sum_t min(r A_i, clip(r, 0.8, 1.2) A_i),   A_i = R_i - mean of the group

B responses in the step, L_max a constant: set ``constant_tokens`` to the longest response of the run.
"""

from __future__ import annotations

from typing import Literal

from thence.methods.grpo import Grpo, GrpoOptions
from thence.settings.limits import Coefficient


class DrGrpoOptions(GrpoOptions):
    """GRPO's, with Dr. GRPO's values."""

    clip_high: Coefficient = 0.2
    """Clip range of the ratio above one."""
    aggregation: Literal["token-mean", "sequence-mean", "constant"] = "constant"
    """As in grpo."""


class DrGrpo(Grpo):
    """GRPO with a constant normaliser and no standard deviation."""

    name = "dr_grpo"
    formula = "-(1/(B L_max)) sum min(r A, clip(r, 0.8, 1.2) A), A = R - group mean"
    source = "arXiv 2503.20783"
    exactness = "exact"
    Options = DrGrpoOptions
