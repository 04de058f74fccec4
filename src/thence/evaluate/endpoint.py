"""Evaluation of a model behind an OpenAI-compatible server: chat completions over HTTP, standard library only."""

from __future__ import annotations

import http.client
import json
import os
import queue
import threading
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from thence.data.think import put_back
from thence.errors import UserError
from thence.evaluate.backends import Generation, Request

if TYPE_CHECKING:
    from thence.evaluate.suites import Task

RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)
SEED_RANGE = 2**31  # servers differ in how many bits they take
LONGEST_WAIT = 60.0


@dataclass(frozen=True, slots=True)
class EndpointSettings:
    """How a server is spoken to.

    Args:
        url: its address: `http://host:port`, with or without `/v1` or `/v1/chat/completions`.
        model: the name of the model there; None: the only one it serves.
        key_variable: the environment variable that holds the API key; no key is sent where it is not set, and it is
            never written anywhere.
        concurrency: requests under way at one time.
        seconds: longest wait for a response.
        tries: how often one request is sent before the evaluation stops.
        pause: seconds before the second try; doubled before each further one, at most 60.
    """

    url: str
    model: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    concurrency: int = 8
    seconds: float = 600.0
    tries: int = 6
    pause: float = 1.0


class _Trouble(Exception):
    """A try that failed in a way that may pass. `wait` is what the server asked for, in seconds."""

    def __init__(self, problem: str, wait: float | None = None):
        super().__init__(problem)
        self.wait = wait


class EndpointBackend:
    """Asks a server for every response. Its chat template and its random numbers are its own.

    Raises:
        UserError: no such address; a server that does not answer; no model of that name there.
    """

    name = "endpoint"

    def __init__(self, settings: EndpointSettings, variables: Mapping[str, Any] | None = None):
        self.variables = dict(variables or {})
        if settings.concurrency < 1 or settings.tries < 1:
            raise UserError("no request would be sent", remedy="set concurrency and tries to 1 or more")
        self.settings = settings
        self.base = _base(settings.url)
        self._key = os.environ.get(settings.key_variable, "")
        self._stop = threading.Event()
        self._limit_name = "max_tokens"
        self._served = self._models()
        self.model = settings.model or self._only_model()
        if self._served and self.model not in self._served:
            raise UserError(
                f"no model {self.model!r} on this server",
                remedy=f"--model-name is one of: {', '.join(self._served[:20])}",
                file=settings.url,
            )

    def generate(self, requests: Sequence[Request], task: Task) -> Iterator[tuple[Request, Generation]]:
        """See `Backend`. Several requests are under way at a time; each failing one is tried again.

        Raises:
            UserError: the server refuses a request, or a request failed `tries` times. What was yielded stands.
        """
        self._stop.clear()
        waiting: queue.SimpleQueue[Request] = queue.SimpleQueue()
        for request in requests:
            waiting.put(request)
        done: queue.SimpleQueue[tuple[Request, Generation] | BaseException] = queue.SimpleQueue()
        threads = [
            threading.Thread(target=self._work, args=(waiting, done, task), daemon=True)
            for _ in range(min(self.settings.concurrency, len(requests)))
        ]
        for thread in threads:
            thread.start()
        failure = None
        try:
            for _ in requests:
                found = done.get() if failure is None else _next(done)
                if found is None:
                    break
                if isinstance(found, BaseException):
                    failure = failure or found
                    self._stop.set()
                else:  # also after a failure: what the others have is kept
                    yield found
        finally:
            self._stop.set()
        if failure is not None:
            raise failure

    def facts(self) -> dict[str, Any]:
        """See `Backend`. What a server does not tell (weights, dtype, chat template) is not there."""
        return {
            "backend": self.name,
            "model": self.model,
            "endpoint": self.base,
            "served_models": self._served,
            "concurrency": self.settings.concurrency,
            "template_variables": self.variables,
            "seeds": f"sent as the request's seed, modulo {SEED_RANGE}; whether it is heeded is up to the server",
        }

    def close(self) -> None:
        """Start no further request."""
        self._stop.set()

    def _work(self, waiting: queue.SimpleQueue, done: queue.SimpleQueue, task: Task) -> None:
        while not self._stop.is_set():
            try:
                request = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((request, self._ask(request, task)))
            except BaseException as error:  # a thread must not die silently: the caller raises it
                done.put(error)
                return

    def _ask(self, request: Request, task: Task) -> Generation:
        problem = ""
        for attempt in range(self.settings.tries):
            if attempt and self._stop.is_set():
                break
            try:
                return self._once(request, task)
            except _Trouble as trouble:
                problem = str(trouble)
                pause = trouble.wait if trouble.wait is not None else self.settings.pause * 2**attempt
                if attempt + 1 < self.settings.tries:
                    self._stop.wait(min(pause, LONGEST_WAIT))
        raise UserError(
            f"the server failed {self.settings.tries} times in a row: {problem}",
            remedy="look at the server; what was sampled is kept, and the same command goes on with the rest",
            file=self.base,
        )

    def _once(self, request: Request, task: Task) -> Generation:
        messages, plain = request.problem.messages, request.problem.plain
        asked: dict[str, Any] = (
            {"prompt": "\n\n".join(content for _, content in messages)}
            if plain
            else {"messages": [{"role": role, "content": content} for role, content in messages]}
        )
        if self.variables and not plain:
            asked["chat_template_kwargs"] = self.variables  # the name that vLLM and SGLang give it
        body = {
            "model": self.model,
            **asked,
            "temperature": task.temperature,
            "top_p": task.top_p,
            self._limit_name: task.max_tokens,
            "seed": request.seed % SEED_RANGE,
            "n": 1,
            "stream": False,
        }
        status, headers, text = self._send("POST", "/completions" if plain else "/chat/completions", body)
        if status == 400 and "max_completion_tokens" in text and "max_tokens" in body:
            self._limit_name = "max_completion_tokens"  # the newer name, which some servers insist on
            return self._once(request, task)
        if status in RETRIED:
            raise _Trouble(f"HTTP {status}: {_message(text)}", _asked_wait(headers))
        if status != 200:
            raise UserError(f"HTTP {status}: {_message(text)}", remedy=_remedy(status, self.settings), file=self.base)
        return _generation(text)

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, str], str]:
        """One request. Raises _Trouble where no whole answer came."""
        parts = urllib.parse.urlsplit(self.base)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=self.settings.seconds)
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            connection.request(method, parts.path + path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            text = answer.read().decode("utf-8", "replace")
            return answer.status, {key.lower(): value for key, value in answer.getheaders()}, text
        except TimeoutError:
            raise _Trouble(f"no answer within {self.settings.seconds:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise _Trouble(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__) from None
        finally:
            connection.close()

    def _models(self) -> list[str]:
        """The names that the server lists; empty where it has no list."""
        try:
            status, _, text = self._send("GET", "/models")
        except _Trouble as trouble:
            raise UserError(
                f"the server does not answer: {trouble}",
                remedy=f"check the address, and that the server is up: curl {self.base}/models",
                file=self.settings.url,
            ) from None
        if status in (401, 403):
            remedy = _remedy(status, self.settings)
            raise UserError(f"HTTP {status}: {_message(text)}", remedy=remedy, file=self.base)
        try:
            return [str(row["id"]) for row in json.loads(text)["data"]] if status == 200 else []
        except (ValueError, KeyError, TypeError):
            return []

    def _only_model(self) -> str:
        if len(self._served) == 1:
            return self._served[0]
        listed = f"the server lists: {', '.join(self._served[:20])}" if self._served else "the server lists none"
        raise UserError("which model?", remedy=f"give --model-name NAME ({listed})", file=self.settings.url)


def _next(done: queue.SimpleQueue) -> Any:
    try:
        return done.get_nowait()
    except queue.Empty:
        return None


def _base(url: str) -> str:
    """The address up to and with `/v1`. Raises UserError."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"no address: {url!r}", remedy="write --endpoint http://host:port/v1", field="--endpoint")
    path = parts.path.rstrip("/").removesuffix("/chat/completions").rstrip("/")
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, path or "/v1", "", ""))


def _generation(text: str) -> Generation:
    """The response in a server's answer. Raises _Trouble where it is not there: proxies cut and replace answers."""
    try:
        answer = json.loads(text)
        choice = answer["choices"][0]
        message = choice["message"] if "message" in choice else {"content": choice["text"]}
        content = message.get("content") or ""
        thinking = message.get("reasoning_content") or message.get("reasoning") or ""
        finish = choice["finish_reason"]
        if not isinstance(content, str) or not isinstance(finish, str) or not isinstance(thinking, str):
            raise TypeError("content and finish_reason are texts")
        tokens = (answer.get("usage") or {}).get("completion_tokens")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise _Trouble(f"not a chat completion ({type(error).__name__}: {error}): {text[:200]!r}") from None
    # A server that takes the thinking out of the response is put right: graders look for the tags. So is one whose
    # template has opened the thinking, which no response then repeats.
    whole = f"<think>\n{thinking}\n</think>\n{content}" if thinking else put_back(content)
    return Generation(whole, tokens if isinstance(tokens, int) else None, finish)


def _message(text: str) -> str:
    """What the server says is wrong, in one line."""
    try:
        error = json.loads(text)["error"]
        text = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError):
        pass
    return " ".join(str(text).split())[:300] or "(nothing said)"


def _asked_wait(headers: dict[str, str]) -> float | None:
    try:
        return max(0.0, float(headers["retry-after"]))
    except (KeyError, ValueError):
        return None


def _remedy(status: int, settings: EndpointSettings) -> str:
    if status in (401, 403):
        return f"put the API key into the environment variable {settings.key_variable}, or name another: --key-variable"
    if status == 404:
        return "check the address (it ends in /v1 with most servers) and --model-name"
    return "change what the server objects to, for example --max-tokens; what was sampled is kept"
