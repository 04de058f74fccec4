"""lm-evaluation-harness's own side of harness_gsm8k.py; runs in the harness's environment, without thence.

    HARNESS/bin/python benchmarks/harness_task/run.py generate --data test.jsonl --model FOLDER --out FILE
    HARNESS/bin/python benchmarks/harness_task/run.py score --data test.jsonl --texts FILE --out FILE

The task is the harness's gsm8k_cot as it is shipped, with three settings of its own changed: the problems come from a
local file, responses may be `--max-tokens` long, and only the model's end token ends them (the shipped task also stops
at "Q:", which a chat model in its turn does not need and thence does not have). `generate` lets the harness's Hugging
Face model answer; it writes the token ids that went into `generate` and came out of it. `score` puts responses that
are already there in the model's place, so that all the rest, filters and metric, is the harness's; without `--texts`
they are empty, and what is of use are the messages.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval  # pyright: ignore[reportMissingImports]
import torch
import yaml
from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

TASK = "gsm8k_cot"
FILTERS = ("strict-match", "flexible-extract")


class Replay(LM):
    """Answers every request with a text that is already there, found by the messages of its prompt."""

    def __init__(self, texts: dict[str, str] | None):
        super().__init__()
        self.texts = texts

    @property
    def tokenizer_name(self) -> str:
        return "replay"

    def chat_template(self, chat_template: bool | str = False) -> str:
        return "replay"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return json.dumps([[message["role"], message["content"]] for message in chat_history])

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return [self.texts[request.args[0]] if self.texts is not None else "" for request in requests]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("texts have no probabilities")

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        raise NotImplementedError("texts have no probabilities")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("generate", "score"))
    parser.add_argument("--data", type=Path, required=True, help="GSM8K test problems, JSONL")
    parser.add_argument("--model", help="generate: Hugging Face folder")
    parser.add_argument("--texts", type=Path, help="score: JSON, {set: {messages of a prompt, as JSON: response}}")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--shots", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    start = time.perf_counter()
    record = generate(args) if args.what == "generate" else score(args)
    record["seconds"] = round(time.perf_counter() - start, 1)
    record["versions"] = {
        "python": sys.version.split()[0],
        **{name: version(name) for name in ("lm_eval", "torch", "transformers", "tokenizers", "datasets")},
    }
    args.out.write_text(json.dumps(record), encoding="utf-8")
    return 0


def generate(args: argparse.Namespace) -> dict[str, Any]:
    """Let the harness's model answer; every sample with the ids that the model was given and those it gave."""
    lm = HFLM(pretrained=args.model, device="cpu", dtype="float32", batch_size=args.batch_size)
    given = recorded(lm.model, end_id=lm.eot_token_id)
    record = evaluated(lm, args)
    for sample in record["samples"]:
        ids = tuple(lm.tok_encode(sample["prompt"]))
        sample["prompt_ids"], sample["token_ids"] = list(ids), given[ids]
    model: Any = lm.model
    record |= {"dtype": str(model.dtype), "threads": torch.get_num_threads(), "end_token": lm.eot_token_id}
    return record


def score(args: argparse.Namespace) -> dict[str, Any]:
    """Let each set of texts answer; every sample with the messages of its prompt."""
    sets = json.loads(args.texts.read_text(encoding="utf-8")) if args.texts else {"empty": None}
    found = {name: evaluated(Replay(texts), args) for name, texts in sets.items()}
    for record in found.values():
        for sample in record["samples"]:
            sample["messages"] = json.loads(sample.pop("prompt"))
    return {"sets": found}


def recorded(model: Any, end_id: int) -> dict[tuple[int, ...], list[int]]:
    """What `model.generate` is given from now on, without padding, and what it gives, up to the end token."""
    given: dict[tuple[int, ...], list[int]] = {}
    plain = model.generate

    def generate_and_keep(input_ids: Any, attention_mask: Any, **settings: Any) -> Any:
        found = plain(input_ids=input_ids, attention_mask=attention_mask, **settings)
        width = input_ids.shape[1]
        for ids, mask, whole in zip(input_ids.tolist(), attention_mask.tolist(), found.tolist(), strict=True):
            prompt = tuple(token for token, real in zip(ids, mask, strict=True) if real)
            response = whole[width:]
            given[prompt] = response[: response.index(end_id) + 1] if end_id in response else response
        return found

    model.generate = generate_and_keep
    return given


def evaluated(lm: LM, args: argparse.Namespace) -> dict[str, Any]:
    """The harness's evaluation: its results, and one entry for each problem with its verdict by every filter."""
    manager = TaskManager()
    shipped = Path(str(manager.task_index[TASK].yaml_path))
    task = yaml.safe_load(shipped.read_text(encoding="utf-8")) | {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(args.data.resolve())}},
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": args.max_tokens},
    }
    found: Any = lm_eval.simple_evaluate(
        lm,
        tasks=[task],
        task_manager=manager,
        num_fewshot=args.shots,
        limit=args.limit,
        apply_chat_template=True,
        fewshot_as_multiturn=True,
    )
    assert found is not None
    samples: dict[int, dict[str, Any]] = {}
    for line in found["samples"][TASK]:
        sample = samples.setdefault(
            line["doc_id"],
            {
                "question": line["doc"]["question"],
                "target": line["target"],
                "prompt": line["arguments"][0][0],
                "text": line["resps"][0][0],
                "exact_match": {},
            },
        )
        sample["exact_match"][line["filter"]] = line["exact_match"]
    assert all(set(sample["exact_match"]) == set(FILTERS) for sample in samples.values())
    config = found["configs"][TASK]
    return {
        "task": {
            "name": TASK,
            "file": str(Path(*shipped.parts[shipped.parts.index("lm_eval") :])),
            "version": found["versions"][TASK],
            "shots": found["n-shot"][TASK],
            "generation": config["generation_kwargs"],
            "filters": config["filter_list"],
        },
        "results": {key: value for key, value in found["results"][TASK].items() if key.startswith("exact_match")},
        "samples": [samples[number] for number in sorted(samples)],
    }


if __name__ == "__main__":
    sys.exit(main())
