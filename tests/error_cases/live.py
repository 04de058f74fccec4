"""Faults that show while a command works: training, rewards of one's own, servers, programs, secrets, output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import thence.evaluate.endpoint as endpoint
import thence.pipeline.reward_trial as reward_trial
from tests.evaluate.answering_server import Answer, Server, failed

from .case import Case, Prepare, write

RUN = "run recipe.toml"
RL = f"{RUN} --stages rl"
HEAD = "def share(prompt, response, answer):\n"
ASK = "eval --endpoint http://127.0.0.1:PORT/v1 --suite p.jsonl --grader exact --samples 1 --max-tokens 8 --folder e"
PROBLEMS = write("p.jsonl", '{"question": "1+1?", "answer": "2"}\n')
ONE = f"{ASK} --key-variable MY_KEY"


def reward(*lines: str, top: str = "") -> Prepare:
    return write("own.py", top + HEAD + "".join(f"    {line}\n" for line in lines))


@contextmanager
def untried(here: Path) -> Iterator[None]:
    """No reward counts as tried by a case before."""
    reward_trial._tried_rewards.clear()
    yield


def serving(answer: Answer, models: tuple[str, ...] = ("tiny",)):
    """A server that gives every request the same answer. Yields its port."""

    @contextmanager
    def around(here: Path) -> Iterator[int]:
        server = Server()
        server.answer = lambda count, path, body: answer
        server.models = list(models)
        before, endpoint.LONGEST_WAIT = endpoint.LONGEST_WAIT, 0.01
        try:
            yield server.http.server_address[1]
        finally:
            endpoint.LONGEST_WAIT = before
            server.http.shutdown()
            server.http.server_close()

    return around


@contextmanager
def nobody(here: Path) -> Iterator[int]:
    """A port of which nobody listens."""
    before, endpoint.LONGEST_WAIT = endpoint.LONGEST_WAIT, 0.01
    try:
        yield 9
    finally:
        endpoint.LONGEST_WAIT = before


TRAINING = [
    Case(
        "A learning rate at which training diverges",
        f"{RUN} --stages sft --sft.lr 1e6 --sft.steps 40 --sft.schedule constant --sft.warmup 0",
        base="data",
        writes=True,
    ),
    Case("A response longer than the model's context", f"{RUN} --rl.max-tokens 64", base="data"),
    Case("An engine without its Python", f"{RUN} --rl.engine vllm --rl.vllm.python /absent/python", base="data"),
    Case("A method that cannot sample ahead", f"{RUN} --rl.method exgrpo --rl.ahead 1", base="data"),
    Case("A method without room", f"{RUN} --rl.method luffy --rl.rollouts 1", base="data"),
]

REWARDS = [
    Case("A reward that is not there", f"{RL} --rl.reward mth", base="data", around=untried),
    Case("A function that its file lacks", f"{RL} --rl.reward own.py:shaer", base="data", around=untried),
    Case("A reward with an error in it", RL, reward("return 1 / 0"), base="data", around=untried),
    Case("A reward that returns text", RL, reward("return 'good'"), base="data", around=untried),
    Case("A reward that is not a number", RL, reward("return float('nan')"), base="data", around=untried),
    Case("A reward too large to train on", RL, reward("return 1e308"), base="data", around=untried),
    Case("A reward that ends the program", RL, reward("sys.exit(0)", top="import sys\n"), base="data", around=untried),
    Case(
        "A reward that never returns",
        f"{RL} --rl.reward-seconds 0.5",
        reward("while True: pass"),
        base="data",
        around=untried,
    ),
    Case(
        "A reward file with a mistake in Python",
        RL,
        write("own.py", "def share(prompt:\n"),
        base="data",
        around=untried,
    ),
]

PLAY = "eval world:chain/rich --suite p.jsonl --environment own.py:Talk --max-tokens 60 --folder e"
BEGIN = "    def reset(self, row):\n        return None\n\n"


def environment(*lines: str) -> Prepare:
    """A problem, and an environment of one's own with these lines in `step`."""
    step = "    def step(self, text):\n" + "".join(f"        {line}\n" for line in lines)

    def prepare(here: Path) -> None:
        PROBLEMS(here)
        write("own.py", f"class Talk:\n{BEGIN}{step}")(here)

    return prepare


ENVIRONMENTS = [
    Case("An environment that its file lacks", PLAY.replace("Talk", "Tlak"), environment("pass"), writes=True),
    Case("An environment with an error in it", PLAY, environment("return 1 / 0"), writes=True),
    Case("An environment that returns a number alone", PLAY, environment("return 1.0"), writes=True),
    Case("An environment whose reward is not a number", PLAY, environment("return '', 'good', True"), writes=True),
    Case(
        "An environment that never returns",
        f"{PLAY} --samples 3 --set environment.seconds=0.5",
        environment("while True: pass"),
        writes=True,
    ),
    Case("An environment beside a grader", f"{PLAY} --grader exact", environment("pass")),
    Case("A setting that no environment has", f"{PLAY} --set environment.turns=2", environment("pass")),
    Case(
        "An environment behind a server",
        "eval --endpoint http://127.0.0.1:9/v1 --suite p.jsonl --environment own.py:Talk",
        environment("pass"),
    ),
    Case("An environment beside a reward", f"{RL} --rl.environment own.py:Talk", environment("pass"), base="data"),
    Case(
        "A method that takes a response apart",
        f"{RL} --rl.reward math --rl.method prefix_rft --rl.environment own.py:Talk",
        environment("pass"),
        base="data",
    ),
    Case(
        "Partial rollouts with an environment",
        f"{RL} --rl.reward math --rl.partial.in-flight 9 --rl.environment own.py:Talk",
        environment("pass"),
        base="data",
    ),
]

CLUSTERS = [
    Case("A cluster that thence does not know", f"{RUN} --on slurm", base="data"),
    Case("Needs without a cluster", f"{RUN} --gpus 1", base="data"),
    Case("More ranks without torchrun or a cluster", f"{RUN} --ranks 2", base="data"),
]

SERVERS = [
    Case("No server at this address", ASK, PROBLEMS, writes=True, around=nobody),
    Case("An address that is none", "eval --endpoint host:8000 --suite p.jsonl --grader exact", PROBLEMS),
    Case(
        "A key that the server refuses",
        ONE,
        PROBLEMS,
        writes=True,
        around=serving(failed(401, "Incorrect API key provided")),
    ),
    Case(
        "A model that the server lacks",
        f"{ASK} --model-name huge",
        PROBLEMS,
        writes=True,
        around=serving(failed(404, "The model `huge` does not exist")),
    ),
    Case("An answer that is not JSON", ASK, PROBLEMS, writes=True, around=serving((200, {}, "<html>Welcome</html>"))),
    Case("An answer nested without end", ASK, PROBLEMS, writes=True, around=serving((200, {}, "[" * 100_000))),
    Case(
        "A server that fails with escapes in its words",
        ASK,
        PROBLEMS,
        writes=True,
        around=serving(failed(500, "\x1b[2Jgone")),
    ),
    Case(
        "Every prompt is too long for the server",
        ASK,
        PROBLEMS,
        writes=True,
        around=serving(failed(400, "This model's maximum context length is 64 tokens")),
    ),
]

AUDITS = [
    Case("A stack without an adapter", "audit trl-stf"),
    Case("A program that is not there", "audit command -- ./absent {model} {data} {out}", code=2),
    Case("No program", "audit command"),
    Case("A Python that is not there", "doctor --python /absent/python"),
]

SECRETS = [
    Case("A password in an address", "check https://user:hunter2-a-password@host/m"),
    Case("A key as a flag", f"{RUN} --api-key hunter2-a-password", base="data"),
    Case(
        "A variable for the key that is not set",
        f"{ASK} --key-variable NO_SUCH_KEY",
        PROBLEMS,
        around=serving(failed(401)),
    ),
]

OUTPUT = [
    Case("Output to a full disk", "methods", code=1, process="/dev/full"),
]
