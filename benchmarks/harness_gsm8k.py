"""GSM8K by `thence eval` and by lm-evaluation-harness: same model, same prompts, greedy; same texts, same scores?

    benchmarks/harness_environment.sh HARNESS
    python benchmarks/workloads.py DATA --real                  # SmolLM2-135M-Instruct as a float32 folder, DATA/real
    python benchmarks/harness_gsm8k.py --harness HARNESS/bin/python --model DATA/real --data gsm8k/test.jsonl \\
        --work FOLDER --out benchmarks/results/harness-gsm8k.json

The harness runs in its own environment (`harness_task/run.py`): its task gsm8k_cot with the first `--shots` of its own
worked examples as turns of a conversation. These messages are `thence eval`'s problems, and each side turns them into
tokens by itself. Both sides' responses are then graded by three rules: thence's `math`, and the harness's strict-match
and flexible-extract, which the harness itself applies to both. Both sides run at once; what FOLDER already holds of
the same request is not made again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import common

RUN = Path(__file__).parent / "harness_task" / "run.py"
FILTERS = ("strict-match", "flexible-extract")


@dataclass(frozen=True)
class Pair:
    """One problem on both sides: what was given and answered, and the verdict of every rule."""

    number: int
    key: str
    answer: str
    prompt_ids: dict[str, list[int]]
    texts: dict[str, str]
    tokens: dict[str, int]
    harness_ids: list[int]
    right: dict[str, dict[str, bool]]  # rule, then side


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--harness", required=True, help="Python of the harness's environment")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--data", type=Path, required=True, help="GSM8K test problems, JSONL")
    parser.add_argument("--work", type=Path, required=True, help="folder for what both sides make")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--shots", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--batch-size", type=int, default=32, help="of the harness")
    parser.add_argument("--rows", type=int, default=64, help="of thence")
    parser.add_argument("--threads", type=int, default=1, help="of each side")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    common.set_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    messages = write_prompts(args)
    harness, commands = run_both(args)
    pairs = pair(args, messages, harness)
    record = record_of(args, pairs, harness) | {"commands": commands}
    show(record)
    if args.out is not None:
        args.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


# --- Both sides ------------------------------------------------------------------------------------------------------


def harness_command(args: argparse.Namespace, what: str, out: Path, *more: str) -> list[str]:
    request = ["--data", str(args.data), "--limit", str(args.limit), "--shots", str(args.shots)]
    return [args.harness, str(RUN), what, *request, *more, "--out", str(out)]


def write_prompts(args: argparse.Namespace) -> list[list[list[str]]]:
    """The messages that the harness makes of every problem; also written as the problems of `thence eval`.

    The answers are those that thence reads in the same file.
    """
    from thence.evaluate.problems import load_problems
    from thence.evaluate.suites import load_suite

    out = args.work / "messages.json"
    subprocess.run(harness_command(args, "score", out), check=True)
    samples = read_json(out)["sets"]["empty"]["samples"]
    problems = load_problems(load_suite("gsm8k").tasks[0], args.data, args.limit)
    rows = []
    for sample, problem in zip(samples, problems, strict=True):
        if sample["question"].strip() != problem.text.strip():
            raise SystemExit(f"{problem.source}: the harness has another problem there: {sample['question']!r}")
        turns = [{"role": role, "content": content} for role, content in sample["messages"]]
        rows.append(json.dumps({"messages": turns, "answer": problem.answer}))
    (args.work / "prompts.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return [sample["messages"] for sample in samples]


def run_both(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str]]:
    """The harness's record and the commands; thence's samples are in FOLDER/thence."""
    out = args.work / "harness.json"
    size = ["--max-tokens", str(args.max_tokens)]
    theirs = harness_command(args, "generate", out, "--model", str(args.model), *size)
    theirs += ["--batch-size", str(args.batch_size)]
    ours = [str(Path(sys.executable).parent / "thence"), "eval", str(args.model), "--suite", "gsm8k"]
    ours += ["--data", str(args.work / "prompts.jsonl"), "--template", "own", "--backend", "native"]
    ours += ["--temperature", "0", "--samples", "1", "--limit", str(args.limit), *size, "--rows", str(args.rows)]
    ours += ["--folder", str(args.work / "thence")]
    running = None if is_done(args, out) else subprocess.Popen(theirs)
    try:
        subprocess.run(ours, check=True)
        if running is not None and running.wait():
            raise SystemExit(f"the harness ended with code {running.returncode}")
    finally:
        if running is not None and running.poll() is None:
            running.terminate()
    names = {args.harness: "HARNESS/bin/python", str(args.data): "gsm8k/test.jsonl", ours[0]: "thence"}
    names |= {str(RUN): "benchmarks/harness_task/run.py"}
    commands = {"thence": ours, "harness": theirs, "comparison": ["python", *sys.argv]}
    named = {side: [names.get(word, word) for word in command] for side, command in commands.items()}
    work = str(args.work)
    return read_json(out), {side: shlex.join(words).replace(work, "FOLDER") for side, words in named.items()}


def is_done(args: argparse.Namespace, out: Path) -> bool:
    """Whether the harness has answered this very request before."""
    if not out.exists():
        return False
    kept = read_json(out)
    asked = args.shots, args.max_tokens, args.limit
    return (kept["task"]["shots"], kept["task"]["generation"]["max_gen_toks"], len(kept["samples"])) == asked


# --- Grading ---------------------------------------------------------------------------------------------------------


def pair(args: argparse.Namespace, messages: Sequence[Any], harness: dict[str, Any]) -> list[Pair]:
    """Every problem with both responses and all verdicts.

    `thence eval`'s own verdicts count for its responses, and the harness's own for its; each side's rules are applied
    by its own code to the other side's responses.
    """
    from thence.evaluate.backends import Prompts
    from thence.evaluate.store import Store
    from thence.recipe import Model
    from thence.train.model import load_tokenizer
    from thence.verify import Verdict, load_reward

    store = Store(args.work / "thence")
    samples = {json.dumps(sample.prompt): sample for sample in store.samples("gsm8k")}
    mine = [samples[json.dumps(turns)] for turns in messages]
    theirs = harness["samples"]
    prompts = Prompts(load_tokenizer(Model(path=str(args.model))))
    own = store.graded("gsm8k", "math")
    with load_reward("math") as grader:
        texts = [sample["text"] for sample in theirs]
        grades = grader.grade_many([s.question for s in mine], texts, [s.answer for s in mine])
    keys = [json.dumps(turns) for turns in messages]
    filtered = by_harness(
        args,
        {
            "thence": {key: sample.text for key, sample in zip(keys, mine, strict=True)},
            "harness": {key: sample["text"] for key, sample in zip(keys, theirs, strict=True)},
        },
    )
    if filtered["harness"] != [sample["exact_match"] for sample in theirs]:
        raise SystemExit("the harness grades its own responses differently when they are given to it again")
    found = []
    for i, (sample, other) in enumerate(zip(mine, theirs, strict=True)):
        right = {
            "math": {"thence": own[sample.place].verdict == "right", "harness": grades[i].verdict is Verdict.RIGHT}
        }
        for rule in FILTERS:
            right[rule] = {side: filtered[side][i][rule] == 1.0 for side in ("thence", "harness")}
        found.append(
            Pair(
                number=i + 1,
                key=sample.problem,
                answer=sample.answer,
                prompt_ids={
                    "thence": prompts.rendered(sample.as_problem("gsm8k")).prompt_ids,
                    "harness": other["prompt_ids"],
                },
                texts={"thence": sample.text, "harness": other["text"]},
                tokens={"thence": sample.tokens or 0, "harness": len(other["token_ids"])},
                harness_ids=other["token_ids"],
                right=right,
            )
        )
    return found


def by_harness(args: argparse.Namespace, sets: Mapping[str, Mapping[str, str]]) -> dict[str, list[dict[str, float]]]:
    """The harness's verdicts on sets of texts: of each set and problem, 0 or 1 by filter."""
    texts, out = args.work / "texts.json", args.work / "scored.json"
    texts.write_text(json.dumps(sets), encoding="utf-8")
    subprocess.run(harness_command(args, "score", out, "--texts", str(texts)), check=True)
    found = read_json(out)["sets"]
    return {name: [sample["exact_match"] for sample in found[name]["samples"]] for name in sets}


# --- Where texts part ------------------------------------------------------------------------------------------------


def partings(args: argparse.Namespace, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """Where unequal texts part, and how near the two best tokens were to each other there.

    The gap is that of the two largest logits (nats) after the common tokens, by transformers in float32: where greedy
    decoding is a matter of the last bits it is about 1e-5.
    """
    if all(pair.texts["thence"] == pair.texts["harness"] for pair in pairs):
        return []
    import torch

    from thence.recipe import Model
    from thence.train.model import load_model

    loaded = load_model(Model(path=str(args.model), compute_dtype="float32"), torch.device("cpu"))
    found = []
    for pair in pairs:
        if pair.texts["thence"] == pair.texts["harness"]:
            continue
        place = common_tokens(pair, loaded.tokenizer)
        ids = torch.tensor([pair.prompt_ids["harness"] + pair.harness_ids[:place]])
        with torch.no_grad():
            best = loaded.model(input_ids=ids, logits_to_keep=1).logits[0, -1].double().topk(2)
        found.append(
            {
                "problem": pair.number,
                "key": pair.key,
                "common_tokens": place,
                "next": [loaded.tokenizer.decode([token]) for token in best.indices.tolist()],
                "gap": float(best.values[0] - best.values[1]),
                "right": pair.right,
                **{side: text[:400] for side, text in pair.texts.items()},
            }
        )
    return found


def common_tokens(pair: Pair, tokenizer: Any) -> int:
    """How many of the harness's tokens thence's text begins with."""
    for count in range(1, len(pair.harness_ids) + 1):
        # Half of a character is decoded as a mark at the end.
        text = tokenizer.decode(pair.harness_ids[:count], clean_up_tokenization_spaces=False).rstrip("\ufffd")
        if not pair.texts["thence"].startswith(text):
            return count - 1
    return len(pair.harness_ids)


# --- The record ------------------------------------------------------------------------------------------------------


def record_of(args: argparse.Namespace, pairs: Sequence[Pair], harness: dict[str, Any]) -> dict[str, Any]:
    import importlib.metadata

    import torch

    import thence

    names = ("torch", "transformers", "tokenizers", "math-verify")
    stop = harness["end_token"]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "workload": {
            "model": common.digest(args.model),
            "data": common.digest(args.data),
            "task": harness["task"],
            "problems": len(pairs),
            "shots": args.shots,
            "max_tokens": args.max_tokens,
            "temperature": 0.0,
            "stop": [stop],
            "precision": {"thence": "torch.float32", "harness": harness["dtype"]},
            "side_by_side": {"thence": args.rows, "harness": args.batch_size},
            "threads": {"thence": torch.get_num_threads(), "harness": harness["threads"]},
        },
        "versions": {
            "thence": {"thence": thence.__version__, **{name: importlib.metadata.version(name) for name in names}},
            "harness": harness["versions"],
        },
        "machine": common.machine(),
        "prompts": {
            "equal_token_ids": sum(pair.prompt_ids["thence"] == pair.prompt_ids["harness"] for pair in pairs),
            "tokens": sum(len(pair.prompt_ids["harness"]) for pair in pairs),
        },
        "texts": {
            "equal": sum(pair.texts["thence"] == pair.texts["harness"] for pair in pairs),
            "tokens": {side: sum(pair.tokens[side] for pair in pairs) for side in ("thence", "harness")},
            "not_ended_within_max_tokens": sum(stop not in pair.harness_ids for pair in pairs),
        },
        "scores": {rule: scores(pairs, rule) for rule in ("math", *FILTERS)},
        "harness_reports": harness["results"],
        "rules_on_the_same_texts": rules_compared(pairs),
        "different": partings(args, pairs),
    }


def scores(pairs: Sequence[Pair], rule: str) -> dict[str, Any]:
    """Both sides' accuracy by a rule with 95% intervals, and the paired difference, thence minus harness."""
    from thence.evaluate.metrics import avg_at_k
    from thence.stats.paired import paired

    right = {side: {pair.key: float(pair.right[rule][side]) for pair in pairs} for side in ("thence", "harness")}
    difference = paired(right["thence"], right["harness"])
    return {
        **{side: asdict(avg_at_k([int(one) for one in found.values()], 1)) for side, found in right.items()},
        "right": {side: int(sum(found.values())) for side, found in right.items()},
        "different_verdicts": [p.number for p in pairs if p.right[rule]["thence"] != p.right[rule]["harness"]],
        "difference": asdict(difference),
        "agree": difference.low <= 0 <= difference.high,
    }


def rules_compared(pairs: Sequence[Pair]) -> dict[str, Any]:
    """On the harness's texts: the problems on which each of its filters disagrees with thence's `math`."""
    return {
        rule: {
            "right_by_math_only": [p.number for p in pairs if p.right["math"]["harness"] > p.right[rule]["harness"]],
            "right_by_filter_only": [p.number for p in pairs if p.right["math"]["harness"] < p.right[rule]["harness"]],
        }
        for rule in FILTERS
    }


def show(record: dict[str, Any]) -> None:
    count = record["workload"]["problems"]
    print(f"{count} problems; same prompt tokens: {record['prompts']['equal_token_ids']}")
    print(f"same text: {record['texts']['equal']}")
    for one in record["different"]:
        print(f"  problem {one['problem']}: after {one['common_tokens']} tokens, gap {one['gap']:.1e}, {one['next']}")
    for rule, found in record["scores"].items():
        for side in ("thence", "harness"):
            one = found[side]
            print(f"{rule}, {side}: {one['value']:.1%} ({one['low']:.1%} to {one['high']:.1%})")
        gap = found["difference"]
        print(f"{rule}, difference: {gap['difference']:+.2%} ({gap['low']:+.2%} to {gap['high']:+.2%})")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
