"""All cases by theme, in the order of the page."""

from __future__ import annotations

from . import asked, kept, live
from .case import Case

THEMES: dict[str, list[Case]] = {
    "Recipes": asked.RECIPES,
    "Flags": asked.FLAGS,
    "Names": asked.NAMES,
    "Data": asked.DATA,
    "Models": kept.MODELS,
    "Run folders": kept.RUNS,
    "Damaged files of thence's own": kept.OWN_FILES,
    "Training": live.TRAINING,
    "Rewards": live.REWARDS,
    "Environments": live.ENVIRONMENTS,
    "Clusters": live.CLUSTERS,
    "Evaluations": kept.EVALUATIONS,
    "Servers": live.SERVERS,
    "Comparisons": kept.COMPARISONS,
    "Audits": live.AUDITS,
    "Secrets": live.SECRETS,
    "Output": live.OUTPUT,
}
