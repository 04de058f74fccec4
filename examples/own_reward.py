"""Trains your own tiny model with your own reward function, from the pieces: sampler, method, step."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import thence
from thence.data.trajectory import Prompt, Trajectory
from thence.methods.base import make_batch
from thence.methods.grpo import Grpo


def reward(token_ids: list[int]) -> float:
    """The share of tokens that are 7."""
    return token_ids.count(7) / len(token_ids)


torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
).eval()
trainer, method = thence.Trainer(model, 3e-3), Grpo()
sampling = thence.Sampling(max_tokens=12, stop_ids=(0,))
prompts = [Prompt(index=i, token_ids=(1, 2 + i)) for i in range(8)]

for step in range(30):
    repeated = [prompt for prompt in prompts for _ in range(8)]
    seeds = [1000 * step + i for i in range(len(repeated))]
    responses = thence.sample(model, [p.token_ids for p in repeated], seeds, sampling)
    group = [
        Trajectory(p, tuple(r.token_ids), score=reward(r.token_ids)) for p, r in zip(repeated, responses, strict=True)
    ]
    report = trainer.step(make_batch(method, group))
    if step % 10 == 0 or step == 29:
        mean = sum(t.score or 0.0 for t in group) / len(group)
        print(f"step {step:2}  reward {mean:.2f}  gradient norm {report.grad_norm:.2f}")
