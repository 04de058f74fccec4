"""Evaluation of a model behind an OpenAI-compatible server: chat completions over HTTP."""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from thence.errors import UserError
from thence.evaluate.backends import Generation, Refused, Request
from thence.evaluate.completion import Trouble, message, refused_name, request_outcome
from thence.foreign_text import one_line
from thence.http_client import Address, Answer, NoAnswer, read_address, send

if TYPE_CHECKING:
    from thence.evaluate.suites import Task

log = logging.getLogger(__name__)
SEED_RANGE = 2**31  # servers differ in how many bits they take
LONGEST_WAIT = 60.0
DEAR_TRIES = 2  # of requests that take the whole time allowed, or more room than allowed
FAILED_IN_ROW = 3  # requests, each tried several times; then it is the server and not the request
MOST_AT_ONCE = 1024
LONGEST_NAME = 1000
LISTED = 100  # models of a server that are kept


@dataclass(frozen=True, slots=True)
class EndpointSettings:
    """How a server is spoken to.

    Args:
        url: its address: `http://host:port`, with or without `/v1` or `/v1/chat/completions`. It may hold
            `user:password@`, a query, and `${NAME}` for an environment variable; none of these is kept or printed.
        model: the name of the model there; None: the only one it serves.
        key_variable: the environment variable that holds the API key; no key is sent where it is not set, and it is
            never written anywhere.
        concurrency: requests under way at one time.
        seconds: longest time of a request, from connecting to the last byte of its answer.
        tries: how often one request is sent before it counts as failed.
        pause: seconds before the second try; doubled before each further one, at most 60.
    """

    url: str = field(repr=False)
    model: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    concurrency: int = 8
    seconds: float = 600.0
    tries: int = 6
    pause: float = 1.0


class EndpointBackend:
    """Asks a server for every response. Its chat template and its random numbers are its own.

    Raises:
        UserError: no such address; a server that does not answer; no model of that name there.
    """

    name = "endpoint"

    def __init__(self, settings: EndpointSettings, variables: Mapping[str, Any] | None = None):
        self.variables = dict(variables or {})
        _check_numbers(settings)
        self.settings = settings
        self.base = server_address(settings.url)
        self._key = _key(settings.key_variable)
        self._stop, self._lock, self._reading = threading.Event(), threading.Lock(), threading.Lock()
        self._answered, self._failed = 0, 0
        self._without: frozenset[str] = frozenset()
        self._served = self._models()
        self.model = settings.model or self._only_model()
        if self._served and self.model not in self._served:
            raise UserError(
                f"no model {one_line(self.model, 200)!r} on this server",
                remedy=f"--model-name is one of: {self._listed()}",
                file=self.base.shown,
            )

    def generate(self, requests: Sequence[Request], task: Task) -> Iterator[tuple[Request, Generation | Refused]]:
        """See `Backend`. Several requests are under way at a time; each failing one is tried again.

        The shortest prompt is asked first: what it is refused for, all are refused for.

        Raises:
            UserError: the server refuses everything; or several requests in a row failed, each of them `tries`
                times. What was yielded stands.
        """
        self._stop.clear()
        self._failed = 0
        waiting: queue.SimpleQueue[Request] = queue.SimpleQueue()
        for request in _in_order(requests):
            waiting.put(request)
        done: queue.SimpleQueue[tuple[Request, Generation | Refused] | BaseException] = queue.SimpleQueue()
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
        seeds = f"sent as the request's seed, modulo {SEED_RANGE}; whether it is heeded is up to the server"
        if "seed" in self._without:
            seeds = "refused by the server, so not sent: the same command gives other responses"
        dropped = {"not_sent": sorted(self._without)} if self._without else {}
        return {
            "backend": self.name,
            "model": self.model,
            "endpoint": self.base.shown,
            "served_models": [one_line(name, 200) for name in self._served[:LISTED]],
            "concurrency": self.settings.concurrency,
            "template_variables": self.variables,
            "seeds": seeds,
            **dropped,
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

    def _ask(self, request: Request, task: Task) -> Generation | Refused:
        tries, attempt, in_vain, problem, everywhere = self.settings.tries, 0, 0, "", False
        begun = before = self._answered
        while in_vain < tries and not (attempt and self._stop.is_set()):
            try:
                found = self._once(request, task)
            except Trouble as trouble:
                problem, everywhere = str(trouble), trouble.everywhere
                tries = min(tries, DEAR_TRIES) if trouble.dear else tries
                pause = trouble.wait if trouble.wait is not None else self.settings.pause * 2 ** min(attempt, 10)
                # Its turn at a busy server comes, as long as others are answered.
                in_vain = 0 if everywhere and self._answered > before else in_vain + 1
                attempt, before = attempt + 1, self._answered
                if in_vain < tries:
                    self._stop.wait(min(pause, LONGEST_WAIT))
            else:
                with self._lock:
                    self._answered, self._failed = self._answered + 1, 0
                return found
        said = f"the server failed {in_vain} times in a row: {problem}"
        with self._lock:
            self._failed += 1
            others_are_answered = self._answered > begun or request.refused_before
            if not everywhere and (others_are_answered or self._failed < FAILED_IN_ROW):
                return Refused("failed", said)
        remedy = "look at the server; what was sampled is kept, and the same command resumes with the rest"
        raise UserError(said, remedy=remedy, file=self.base.shown)

    def _once(self, request: Request, task: Task) -> Generation | Refused:
        """One try. Raises Trouble, UserError.

        A server that objects to something that can be left out gets the same request without it.
        """
        whole = {"model": self.model, **_request_body(request, task, self.variables)}
        without = self._without
        while True:
            # The newer name of "max_tokens", which some servers insist on.
            names = {name: "max_completion_tokens" if name == "max_tokens" else None for name in without}
            body = {new: value for name, value in whole.items() if (new := names.get(name, name))}
            answer = self._send("POST", "/completions" if request.problem.plain else "/chat/completions", body)
            objected = refused_name(answer, body, _droppable(task))
            if objected is None:
                break
            without |= {objected}
        with self._reading:  # JSON takes many times its length: one answer at a time
            remedy = partial(_remedy, key_variable=self.settings.key_variable)
            found = request_outcome(answer, hide=self._hide, remedy=remedy, file=self.base.shown)
        if isinstance(found, Generation) and without - self._without:
            self._remember(without)
        return found

    def _remember(self, without: frozenset[str]) -> None:
        """What the server does not take, now that it has answered without."""
        with self._lock:
            new, self._without = without - self._without, self._without | without
        for name in sorted(new - {"max_tokens"}):
            more = ": the same command gives other responses" if name == "seed" else ""
            log.warning("the server refuses %r: requests are sent without%s", name, more)

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> Answer:
        """One request. Raises Trouble where no whole answer came."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        address = replace(self.base, path=self.base.path + path)
        content = None if body is None else json.dumps(body).encode("ascii")
        try:
            return send(method, address, headers=headers, body=content, seconds=self.settings.seconds)
        except NoAnswer as failed:
            dear = failed.kind in ("late", "large")
            raise Trouble(self._hide(str(failed)), everywhere=failed.kind == "unreachable", dear=dear) from None

    def _models(self) -> list[str]:
        """The names that the server lists; empty where it has no list."""
        try:
            answer = self._send("GET", "/models")
        except Trouble as trouble:
            raise UserError(
                f"the server does not answer: {trouble}",
                remedy=f"check the address, and that the server is up: curl {self.base.shown}",
                file=self.base.shown,
            ) from None
        if answer.status in (401, 403):
            said = f"HTTP {answer.status}: {message(answer, self._hide)}"
            raise UserError(said, remedy=_remedy(answer.status, self.settings.key_variable), file=self.base.shown)
        try:
            names = [str(row["id"]) for row in answer.value()["data"]] if answer.status == 200 else []
            return [name for name in names if len(name) <= LONGEST_NAME]
        except (ValueError, KeyError, TypeError, RecursionError):
            return []

    def _only_model(self) -> str:
        if len(self._served) == 1:
            return self._served[0]
        listed = f"the server lists: {self._listed()}" if self._served else "the server lists none"
        raise UserError("which model?", remedy=f"give --model-name NAME ({listed})", file=self.base.shown)

    def _listed(self) -> str:
        return ", ".join(one_line(name, 200) for name in self._served[:20])

    def _hide(self, text: str) -> str:
        return self.base.hide(text, self._key)


def _check_numbers(settings: EndpointSettings) -> None:
    if not (1 <= settings.concurrency <= MOST_AT_ONCE) or settings.tries < 1:
        remedy = f"set concurrency to 1 to {MOST_AT_ONCE}, and tries to 1 or more"
        raise UserError("so many requests cannot be sent", remedy=remedy, field="--concurrency")
    if not (math.isfinite(settings.seconds) and settings.seconds > 0):
        remedy = "give a number of seconds above 0"
        raise UserError(f"a time limit of {settings.seconds} s", remedy=remedy, field="--timeout")


def server_address(url: str) -> Address:
    """The address up to and with `/v1`. Raises UserError."""
    address = read_address(url, flag="--endpoint")
    path = address.path.rstrip("/").removesuffix("/chat/completions").rstrip("/")
    return replace(address, path=path or "/v1")


def _in_order(requests: Sequence[Request]) -> list[Request]:
    """The shortest prompt first, and last what was refused before."""
    if not requests:
        return []
    place = min(range(len(requests)), key=lambda i: (requests[i].refused_before, len(requests[i].problem.text), i))
    rest = [request for i, request in enumerate(requests) if i != place]
    return [requests[place], *sorted(rest, key=lambda request: request.refused_before)]


def _request_body(request: Request, task: Task, variables: Mapping[str, Any]) -> dict[str, Any]:
    messages, plain = request.problem.messages, request.problem.plain
    asked: dict[str, Any] = (
        {"prompt": "\n\n".join(content for _, content in messages)}
        if plain
        else {"messages": [{"role": role, "content": content} for role, content in messages]}
    )
    if variables and not plain:
        asked["chat_template_kwargs"] = variables  # the name that vLLM and SGLang give it
    return {
        **asked,
        "temperature": task.temperature,
        "top_p": task.top_p,
        "max_tokens": task.max_tokens,
        "seed": request.seed % SEED_RANGE,
        "n": 1,
        "stream": False,
    }


def _droppable(task: Task) -> list[str]:
    """What may be left out of a request: seeds, which are an offer, and what says no more than leaving it out does."""
    defaults = [name for name in ("top_p", "temperature") if getattr(task, name) == 1.0]
    return ["seed", "stream", "n", *defaults]


def _remedy(status: int, key_variable: str) -> str:
    if status in (401, 403):
        return f"put the API key into the environment variable {key_variable}, or name another: --key-variable"
    if status == 404:
        return "check the address (it ends in /v1 with most servers) and --model-name"
    if 300 <= status < 400:
        return "give --endpoint the address that the server itself answers at"
    return "change what the server objects to, for example --max-tokens; what was sampled is kept"


def _key(variable: str) -> str:
    """The API key. Raises UserError where no header can hold it."""
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(
            f"the API key in the environment variable {variable} has characters that no key has",
            remedy="set it again, without quotes, spaces and line ends inside",
            field="--key-variable",
        )
    return key


def _next(done: queue.SimpleQueue) -> Any:
    try:
        return done.get_nowait()
    except queue.Empty:
        return None
