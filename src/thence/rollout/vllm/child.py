"""The process that runs vLLM. It needs the standard library and vLLM with its torch and safetensors, not thence.

    python child.py --fd N --model FOLDER ...       started by thence.rollout.vllm.engine, which it does not outlive;
                                                    with --socket PATH other ranks of that run ask it too
    python child.py --port P --model FOLDER ...     started by a user; serves on 127.0.0.1 the ranks of one run at a
                                                    time, if they know the token in THENCE_VLLM_TOKEN

Messages are framed as in thence/framed.py. The client's first is {"op": "hello", "token", "run"}, answered by
{"ready": facts} once the model is loaded. Then it asks for one thing at a time:

    load      path, version, digest, tensors,   -> loaded, stamp, seconds, probe_logps
              probe
    take      first, chunk                      -> taken, so many so far; after the last chunk load, path ""
    generate  id, prompts, rows, sampling       -> done, stamp, token_ids, logps, finish for every row as it ends;
                                                   alive (steps of rows so far) now and then; at last end
    cancel    id                                   (while it generates) -> end
    stop

A stamp is [version, digest] of the weights in the model. A reply {"failed": text} ends the conversation.
"""

from __future__ import annotations

import argparse
import contextlib
import hmac
import os
import queue
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from client import Client, Inbox, framed, tell_failure  # pyright: ignore[reportMissingImports]
from service import Service  # pyright: ignore[reportMissingImports]
from transfer import register, tensors_in_file  # pyright: ignore[reportMissingImports]
from wire import PROTOCOL, TOKEN_VARIABLE, weight_files, weights_digest  # pyright: ignore[reportMissingImports]

LARGEST_GREETING = 1 << 12  # from a client who has not yet shown the token
GREETING_SECONDS = 10.0
PARTING_SECONDS = 2.0

# Python puts the folder of a script first in its path. Installed packages must be found before it.
sys.path.append(sys.path.pop(0))

# Set unless the user has set them. One process: no engine that outlives this one, and a sampler within reach.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


class VllmModel:
    """A model in vLLM, and the stamp of its weights."""

    def __init__(self, options: argparse.Namespace):
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if options.threads:
            os.environ["OMP_NUM_THREADS"] = str(options.threads)
        import torch
        import vllm  # pyright: ignore[reportMissingImports] - lives in another environment
        from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

        self.options, self._torch, self._vllm = options, torch, vllm
        self.max_rows: int = options.max_rows
        digest = weights_digest(options.model)
        sizes: dict[str, Any] = {"max_model_len": options.max_model_len or None}
        if options.kv_cache_gb:
            sizes["kv_cache_memory_bytes"] = int(options.kv_cache_gb * 2**30)
        if current_platform.is_cpu():
            # A prompt read in pieces takes back a number of its generator, which those on a CPU cannot (vLLM 0.32).
            sizes["enable_chunked_prefill"] = False
        if options.transfer == "ipc":
            sizes["weight_transfer_config"] = register()
        self._llm = vllm.LLM(
            model=options.model,
            dtype=options.dtype,
            enforce_eager=not options.compile,
            enable_prefix_caching=not options.no_prefix_caching,
            max_num_seqs=options.max_rows,
            skip_tokenizer_init=True,
            generation_config="vllm",
            logprobs_mode="processed_logprobs",
            disable_log_stats=True,
            trust_remote_code=False,
            seed=0,
            **{name: value for name, value in sizes.items() if value is not None},
        )
        self._engine = self._llm.llm_engine
        _report_whole_softmax(self._runner().sampler, torch)
        self.stamp = [0, digest]
        self._taken = 0

    def _runner(self) -> Any:
        return self._engine.model_executor.driver_worker.model_runner

    def facts(self) -> dict[str, Any]:
        import platform

        import transformers

        config = self._engine.vllm_config
        return {
            "protocol": PROTOCOL,
            "pid": os.getpid(),
            "model": str(Path(self.options.model).resolve()),
            "stamp": self.stamp,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "max_model_len": config.model_config.max_model_len,
            "max_rows": self.options.max_rows,
            "kv_cache_tokens": (config.cache_config.num_gpu_blocks or 0) * config.cache_config.block_size,
            "prefix_caching": not self.options.no_prefix_caching,
            "transfer": self.options.transfer,
            "device": config.device_config.device_type,
            "threads": self._torch.get_num_threads(),
            "vllm": self._vllm.__version__,
            "torch": self._torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        }

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        """Put other weights into the running model, forget cached keys and values, and read the probe.

        Weights that it has already, since another rank of the run brought them, are not read again.

        Raises:
            ValueError: fewer or more tensors arrived than were sent.
            RuntimeError: vLLM keeps what it computed with the old weights.
        """
        start = time.monotonic()
        wanted = [request["version"], request["digest"]]
        if self.stamp != wanted:
            self.stamp = [-1, "weights half loaded"]  # until all is done: an error leaves it so
            path = request["path"]
            arrived = sum(map(_count, weight_files(path))) if path else self._taken
            if arrived != request["tensors"]:
                raise ValueError(f"{arrived} tensors arrived, sent were {request['tensors']}")
            if path:
                self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": _tensors(path)})
            else:
                self._engine.collective_rpc("finish_weight_update")
            _pack_tied_weights(self._runner().get_model())
            if not self._engine.reset_prefix_cache():
                raise RuntimeError("vLLM did not forget the keys and values of the old weights")
        logps = self._read(request["probe"])
        self.stamp = wanted
        return {"loaded": True, "stamp": self.stamp, "seconds": time.monotonic() - start, "probe_logps": logps}

    def take(self, request: dict[str, Any]) -> dict[str, Any]:
        """Load a chunk of other weights into the running model."""
        if request["first"]:
            self._engine.collective_rpc("start_weight_update")
            self._taken = 0
        self.stamp = [-1, "weights half loaded"]
        chunk = request["chunk"]
        self._engine.collective_rpc("update_weights", kwargs={"update_info": chunk})
        self._taken += len(chunk["tensors"]) if "tensors" in chunk else _count(chunk["path"])
        return {"taken": self._taken}

    def _read(self, token_ids: list[int]) -> list[float]:
        """Log-probabilities of all tokens but the first."""
        params = self._vllm.SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        (output,) = self._llm.generate([{"prompt_token_ids": token_ids}], params, use_tqdm=False)
        return [place[token].logprob for token, place in zip(token_ids[1:], output.prompt_logprobs[1:], strict=True)]

    def step(self) -> list[Any]:
        """One step of all rows. Returns what vLLM has to say of some of them."""
        return self._engine.step()

    def abort(self, names: list[str]) -> None:
        """Stop sampling these rows."""
        self._engine.abort_request(names)

    def add(self, name: str, request: dict[str, Any], row: list[int]) -> None:
        """Sample a row of a request, under this name."""
        prompt, seed, max_tokens = row
        sampling = request["sampling"]
        params = self._vllm.SamplingParams(
            temperature=sampling["temperature"],
            top_p=sampling["top_p"],
            top_k=sampling["top_k"],
            seed=seed,
            max_tokens=max_tokens,
            logprobs=0 if sampling["logps"] else None,
            stop_token_ids=sampling["stop_ids"],
            ignore_eos=True,
            detokenize=False,
        )
        self._engine.add_request(name, {"prompt_token_ids": request["prompts"][prompt]}, params)


def _count(file: str | Path) -> int:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return len(list(opened.keys()))


def _tensors(folder: str) -> Iterator[tuple[str, Any]]:
    for file in weight_files(folder):
        yield from tensors_in_file(file)


def _pack_tied_weights(model: Any) -> None:
    """On a CPU vLLM multiplies by a packed copy of each matrix. Reloading does not renew the copy of an output layer
    that is tied to the embedding (seen in vLLM 0.32): it would keep the old weights."""
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if hasattr(module, "cpu_linear") and method is not None and module.weight.numel():
            method.process_weights_after_loading(module)


def _report_whole_softmax(sampler: Any, torch: Any) -> None:
    """Let log-probabilities be those of the whole softmax at the sampling temperature.

    vLLM's "processed" ones are, unless top-p or top-k is on: then they are of the renormalised rest, which the trainer
    cannot compute. What choosing among tokens is given is exactly the logits divided by the temperature.
    """
    choose = sampler.topk_topp_sampler
    original = choose.forward

    def forward(logits: Any, generators: Any, k: Any, p: Any, *rest: Any, **more: Any) -> Any:
        if k is None and p is None:
            return original(logits, generators, k, p, *rest, **more)
        whole = logits.log_softmax(dim=-1, dtype=torch.float32)
        chosen, _ = original(logits, generators, k, p, *rest, **more)
        return chosen, whole

    choose.forward = forward


class Door:
    """Lets clients in: those who know the token, of one run at a time."""

    def __init__(self, inbox: Inbox, token: str, clients: list[Client]):
        self.inbox, self.token, self.clients = inbox, token, clients
        self.run: Any = None
        self.lock = threading.Lock()
        self.number = len(clients)

    def open(self, listener: socket.socket) -> None:
        """Welcome whoever comes, each in a thread."""
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=self.welcome, args=(framed.Wire(sock),), daemon=True).start()

    def welcome(self, wire: Any) -> None:
        """Let a client in and read what it asks, or tell it why not."""
        try:
            hello = wire.receive(GREETING_SECONDS, LARGEST_GREETING) or {}
            if not hmac.compare_digest(str(hello.get("token")).encode(), self.token.encode()):
                raise PermissionError(f"wrong token: set {TOKEN_VARIABLE} to what the server was started with")
            client = self._admit(wire, hello.get("run"))
        except Exception as error:
            tell_failure(wire, error)
            wire.close()
            return
        self.inbox.put((client, hello))
        client.read(lambda: not client.gone)
        with self.lock:
            self.clients.remove(client)
        wire.close()

    def _admit(self, wire: Any, run: Any) -> Client:
        with self.lock:
            if self.clients and (run is None or run != self.run):
                raise RuntimeError("busy: the server has another client")
            self.number += 1
            client = Client(wire, self.inbox, self.number)
            self.clients.append(client)
            self.run = run
            return client


def serve_parent(options: argparse.Namespace) -> int:
    """Serve the process that started this one, and other ranks of its run; end with it."""
    parent = os.getppid()
    inbox: Inbox = queue.Queue()
    client = Client(framed.Wire(socket.socket(fileno=options.fd)), inbox)

    def watch() -> None:
        client.read(lambda: os.getppid() == parent)
        deadline = time.monotonic() + PARTING_SECONDS  # a socket closes a moment before its process has ended
        while os.getppid() == parent and time.monotonic() < deadline:
            time.sleep(0.02)
        if os.getppid() != parent:  # who would have removed them
            for folder in options.scratch:
                shutil.rmtree(folder, ignore_errors=True)
        # The engine started this process as the leader of a group, so that vLLM's children end with it.
        os.killpg(0, signal.SIGKILL) if os.getpgrp() == os.getpid() else os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        engine = VllmModel(options)
    except BaseException as error:
        client.fail(error)
        return 1
    if options.socket:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(options.socket)
        listener.listen()
        door = Door(inbox, os.environ[TOKEN_VARIABLE], [client])
        door.run = os.environ[TOKEN_VARIABLE]
        threading.Thread(target=door.open, args=(listener,), daemon=True).start()
    Service(engine, inbox).run(client)
    return 0


def serve_port(options: argparse.Namespace) -> int:
    """Serve the ranks of one run at a time on loopback, until interrupted."""
    token = os.environ.get(TOKEN_VARIABLE, "")
    if len(token) < 8:
        print(f"set {TOKEN_VARIABLE}, 8 characters or more, to the same text here and where thence runs")
        return 2
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", options.port))
    except OSError as error:
        print(f"port {options.port} on 127.0.0.1 cannot be used: {error.strerror}; give another --port")
        return 2
    listener.listen()
    engine = VllmModel(options)
    print(f"serving {options.model} on 127.0.0.1:{listener.getsockname()[1]}", flush=True)
    inbox: Inbox = queue.Queue()
    threading.Thread(target=Door(inbox, token, []).open, args=(listener,), daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):
        Service(engine, inbox).run()
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--fd", type=int, help=argparse.SUPPRESS)
    where.add_argument("--port", type=int)
    parser.add_argument("--socket", help=argparse.SUPPRESS)
    parser.add_argument("--model", required=True, help="Hugging Face folder with safetensors")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--max-model-len", type=int, default=0, help="longest prompt and response; 0: the model's")
    parser.add_argument("--max-rows", type=int, default=64, help="most responses sampled in parallel")
    parser.add_argument("--kv-cache-gb", type=float, default=2.0, help="memory for keys and values; 0: vLLM's choice")
    parser.add_argument("--threads", type=int, default=0, help="0: what OMP_NUM_THREADS says, else all cores")
    parser.add_argument("--compile", action="store_true", help="let vLLM compile the model")
    parser.add_argument("--no-prefix-caching", action="store_true")
    parser.add_argument("--transfer", default="files", choices=("files", "ipc"), help=argparse.SUPPRESS)
    parser.add_argument("--scratch", action="append", default=[], help=argparse.SUPPRESS)
    options = parser.parse_args()
    return serve_parent(options) if options.fd is not None else serve_port(options)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # os._exit: taking vLLM apart can hang, and there is nothing left to save.
    os._exit(code)
