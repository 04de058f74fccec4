"""What llama.cpp makes of prompts: their tokens, a greedy continuation, and the log-probability of each of its tokens.

    ENV/bin/python benchmarks/llama_cpp_answers.py MODEL.gguf < asked.json > answers.json

For an environment that has xllamacpp and needs neither thence nor torch: `gguf_llama_cpp.py` starts it. asked.json has
`prompts` (texts) and `tokens` (how many to generate). Keys and values are float32, as transformers' are here.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from typing import Any

import xllamacpp


def main() -> None:
    asked = json.load(sys.stdin)
    settings = xllamacpp.CommonParams()
    settings.model.path = sys.argv[1]
    settings.n_ctx, settings.n_parallel, settings.n_gpu_layers, settings.warmup = 1024, 1, 0, False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1  # threads that wait for each other spin
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(settings)

    def post(path: str, body: dict[str, Any]) -> Any:
        data = json.dumps(body).encode()
        request = urllib.request.Request(server.listening_address + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)

    answers = []
    for prompt in asked["prompts"]:
        tokens = post("/tokenize", {"content": prompt, "add_special": True, "parse_special": True})["tokens"]
        greedy = {"temperature": 0, "n_probs": 2, "post_sampling_probs": False, "cache_prompt": False}
        more = {"prompt": tokens, "n_predict": asked["tokens"], "return_tokens": True}
        told = post("/completion", {**more, **greedy})
        answers.append(
            {"prompt_tokens": tokens, "tokens": told["tokens"], "logprobs": logprobs_of(told["tokens"], told)}
        )
    json.dump({"answers": answers}, sys.stdout)


def logprobs_of(tokens: list[int], told: dict[str, Any]) -> list[float | None]:
    """One a token; None where the server tells none: of a token that is a part of a character."""
    left = list(told["completion_probabilities"])
    found = [left.pop(0)["logprob"] if left and left[0]["id"] == token else None for token in tokens]
    if left:
        raise SystemExit(f"log-probabilities of tokens that were not generated: {left[0]}")
    return found


if __name__ == "__main__":
    main()
