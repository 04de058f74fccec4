"""The flags of ``thence eval`` that come in groups: fields of its tasks, and what generates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Group, Parameter

from thence.settings.limits import Processes, Rows, Seconds, Seed, SomeShare, Temperature, Tokens

ONLY_SERVED = "the only one served"
KEY_VARIABLE = "OPENAI_API_KEY"
BackendName = Literal["native", "vllm", "endpoint"]


@Parameter(name="*", group=Group("Fields of all tasks (default: those of the suite)", sort_key=3))
@dataclass(frozen=True, kw_only=True)
class TaskFields:
    """What is set for every task of the suite.

    Args:
        tasks: Only these tasks.
        samples: Responses for each problem.
        temperature: Sampling temperature. 0 is greedy.
        top_p: Nucleus sampling. 1: off.
        max_tokens: Longest response.
        seed: Seed of sampling.
        grader: exact, math, math-after-think, math-boxed, or your own function.
        environment: Your own class that answers each turn and gives the scores, see docs/turns.md.
        template: own, question, boxed, letter, steps, or a text with {question}.
        system: System message. It may be empty.
    """

    tasks: Annotated[str | None, Parameter(metavar="A,B")] = None
    samples: Rows | None = None
    temperature: Temperature | None = None
    top_p: SomeShare | None = None
    max_tokens: Tokens | None = None
    seed: Seed | None = None
    grader: Annotated[str | None, Parameter(metavar="NAME")] = None
    environment: Annotated[str | None, Parameter(metavar="FILE:CLASS")] = None
    template: Annotated[str | None, Parameter(metavar="NAME")] = None
    system: Annotated[str | None, Parameter(metavar="TEXT")] = None


@Parameter(name="*", group=Group("What generates", sort_key=4))
@dataclass(frozen=True, kw_only=True)
class Generator:
    """What generates the responses.

    Args:
        backend: Default: native, or endpoint where --endpoint is given.
        chat_template: own, none, or a Jinja file.
        template_variable: A variable of the chat template, for example enable_thinking=false.
        gguf_file: A GGUF file inside MODEL.
        rows: Responses sampled side by side by the native backend. Default: 64.
        vllm: A setting of vLLM, see docs/vllm.md.
        endpoint: An OpenAI-compatible server. Passwords in the address and ${NAME} of the environment are not kept.
        model_name: The model's name on the server.
        key_variable: The environment variable that holds the server's API key. Default: OPENAI_API_KEY.
        concurrency: Requests under way at a time.
        timeout: Longest time for a response.
    """

    backend: BackendName | None = None
    chat_template: Annotated[str, Parameter(metavar="NAME")] = "own"
    template_variable: Annotated[tuple[str, ...], Parameter(metavar="NAME=VALUE")] = ()
    gguf_file: Annotated[str | None, Parameter(metavar="NAME")] = None
    rows: Rows | None = None
    vllm: Annotated[tuple[str, ...], Parameter(metavar="FIELD=VALUE")] = ()
    endpoint: Annotated[str | None, Parameter(metavar="URL")] = None
    model_name: Annotated[str | None, Parameter(metavar="NAME")] = None
    key_variable: Annotated[str | None, Parameter(metavar="NAME")] = None
    concurrency: Processes = 8
    timeout: Annotated[Seconds, Parameter(metavar="SECONDS")] = 600.0

    def kind(self) -> BackendName:
        """The backend's name."""
        return self.backend or ("endpoint" if self.endpoint else "native")
