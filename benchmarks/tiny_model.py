"""Write a tiny random Llama with a real tokenizer, to run whole suites in minutes: its answers mean nothing.

.venv/bin/python benchmarks/tiny_model.py DATA/real FOLDER
.venv/bin/thence eval FOLDER --suite paper-id --data openr1_eval --limit 5 --max-tokens 32 --folder OUT
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

HIDDEN, LAYERS, CONTEXT = 64, 2, 4096


def main() -> None:
    tokenizer_from, folder = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_from)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
