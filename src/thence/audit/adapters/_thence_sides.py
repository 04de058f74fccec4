"""SFT steps of thence: between the rollout batches of an RL stage, and those of a stage whose weights depend on the
policy or on a reference model; driven by ``_thence_rl.py``."""

from __future__ import annotations

from typing import Any


def take_turns(case: dict, update: Any, method: Any, trajectories: list[Any], metrics: Any) -> None:
    """For every epoch of a case one rollout batch, and one SFT step before or after it.

    A method that composes SFT steps by itself (``sasr``) is given a sampler whose coin says SFT, then RL. One that
    keeps a buffer of unsolved prompts (``relift``) finds the demonstrations in it.

    Raises:
        AssertionError: the coin says RL in the step that is due to SFT.
    """
    half = case["examples"] // 2
    rollouts, shown = trajectories[:half], trajectories[half:]
    sampler = _Sampler(rollouts, [_prompt(t) for t in shown])
    for _ in range(case["epochs"]):
        if case["options"]["sides"] == "first":
            if method.compose(sampler, half, half):
                raise AssertionError("the coin of the method says RL where it was to say SFT")
            update.take_side_steps(sampler, metrics)
            update.take(method.compose(sampler, half, half), metrics)
        else:
            method.restore({"buffer": [_buffered(p) for p in sampler.experts]})
            update.take(rollouts, metrics)
            update.take_side_steps(sampler, metrics)


def train_demonstrations(case: dict, session: Any, trainer: Any, method: Any, trajectories: list[Any]) -> None:
    """The steps of an SFT stage; all responses are demonstrations, dealt to ``minis`` steps an epoch."""
    from thence.pipeline.sft_stage import demonstration_batch

    options, size = case["options"], case["examples"] // case["options"]["minis"]
    rollouts = [{"reward": 0.0, "group": i, "demonstration": True} for i in range(len(trajectories))]
    steps = case["epochs"] * options["minis"]
    session.watch(trainer.model.base_model)
    session.parameters(trainer.model)
    session.say(policy=options["policy"], rollouts=rollouts, versions=list(range(steps)))
    for _ in range(case["epochs"]):
        for start in range(0, len(trajectories), size):
            trainer.step(demonstration_batch(trainer, method, trajectories[start : start + size])[0])
            session.stepped(trainer.model)


class _Sampler:
    """Stands where a stage's sampler is: what it gives is known beforehand.

    Args:
        given: the rollouts of every batch.
        experts: prompts with their demonstrations.
    """

    rank, world, step = 0, 1, 0

    def __init__(self, given: list[Any], experts: list[Any]):
        self.given, self.experts, self.coins = given, experts, 0

    def next_prompts(self, count: int) -> list[Any]:
        """The prompts of the rollouts."""
        return [trajectory.prompt for trajectory in self.given]

    def rollouts(self, prompts: list[Any], n: int) -> list[Any]:
        """The rollouts."""
        return self.given

    def expert_prompts(self, count: int) -> list[Any]:
        """The prompts with a demonstration."""
        return self.experts[:count]

    def uniform(self, *key: object) -> float:
        """One, then nought, and so on: the first draw comes after the warm-up and decides for RL."""
        self.coins += 1
        return float(self.coins % 2)


def _prompt(trajectory: Any) -> Any:
    from dataclasses import replace

    return replace(trajectory.prompt, demonstration_ids=trajectory.response_ids)


def _buffered(prompt: Any) -> list[Any]:
    return [0, prompt.index, list(prompt.token_ids), list(prompt.demonstration_ids)]
