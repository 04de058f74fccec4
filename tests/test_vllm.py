"""The vLLM engine: its process and protocol against a stand-in for vLLM and, where there is one, vLLM itself."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thence.errors import UserError
from thence.framed import Wire
from thence.objective.kl import kl_estimate
from thence.rollout.correction import truncated_importance
from thence.rollout.native import Sampling, sample
from thence.rollout.vllm import settings as settings_module
from thence.rollout.vllm import weights as weights_module
from thence.rollout.vllm.engine import VllmEngine
from thence.rollout.vllm.settings import CHILD, PYTHON_VARIABLE, VllmSettings
from thence.rollout.vllm.wire import TOKEN_VARIABLE

VOCAB = 12
TOKEN = "a token for tests"

# A stand-in for vLLM whose model gives every token the same probability everywhere: softmax(head / temperature). Like
# vLLM on a CPU it multiplies by a packed copy of the head, which loading weights alone does not renew.
FAKE_VLLM = """
import json, math, os, random, sys, time
from types import SimpleNamespace as Some
sys.modules["vllm.platforms"] = Some(current_platform=Some(is_cpu=lambda: True))
__version__ = "0.0"
MODE = os.environ.get("FAKE_MODE", "")

def SamplingParams(**values):
    return Some(**values)

class Values(list):
    def numel(self):
        return len(self)

class Head:
    cpu_linear = None
    def __init__(self, values):
        self.weight, self.quant_method = Values(values), self
        self.process_weights_after_loading(self)
    def process_weights_after_loading(self, layer):
        self.packed = list(layer.weight)
    def modules(self):
        return [self, object()]
    def logps(self, temperature):
        scaled = [value / (temperature or 1.0) for value in self.packed]
        total = math.log(sum(map(math.exp, scaled)))
        return [value - total for value in scaled]

def read_head(folder):
    from safetensors import safe_open
    return safe_open(os.path.join(folder, "model.safetensors"), framework="pt").get_tensor("head")

class Engine:
    def __init__(self, options):
        self.head, self.active, self.cache = Head(read_head(options["model"])), {}, True
        self.runner = Some(sampler=Some(topk_topp_sampler=Some(forward=None)), get_model=lambda: self.head)
        self.model_executor = Some(driver_worker=Some(model_runner=self.runner))
        self.vllm_config = Some(
            model_config=Some(dtype="torch." + options["dtype"], max_model_len=options.get("max_model_len", 64)),
            cache_config=Some(num_gpu_blocks=4, block_size=16), device_config=Some(device_type="cpu"))
    def collective_rpc(self, name, kwargs):
        assert name == "reload_weights"
        for name, values in kwargs["weights_iterator"]:
            if MODE != "stale":
                self.head.weight[:] = values
    def reset_prefix_cache(self):
        return MODE != "clinging"
    def add_request(self, name, prompt, params):
        self.active[name] = Some(params=params, ids=[], logps=[], random=random.Random(params.seed))
    def abort_request(self, names):
        for name in names:
            del self.active[name]
    def step(self):
        if MODE == "dies":
            os.kill(os.getpid(), 9)
        if MODE == "hangs":
            time.sleep(60)
        if MODE == "raises":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 bytes")
        if MODE == "slow":
            time.sleep(0.02)
        done = []
        for name, row in list(self.active.items()):
            params, logps = row.params, self.head.logps(row.params.temperature)
            token = row.random.choices(range(len(logps)), [math.exp(x) for x in logps])[0]
            if params.temperature == 0:
                token = max(range(len(logps)), key=logps.__getitem__)
            row.ids.append(token)
            row.logps.append({token: Some(logprob=logps[token] if MODE != "infinite" else -math.inf)})
            stopped = token in params.stop_token_ids
            if stopped or len(row.ids) == params.max_tokens:
                del self.active[name]
                output = Some(token_ids=row.ids, logprobs=row.logps if params.logprobs is not None else None,
                              finish_reason="stop" if stopped else "length")
                done.append(Some(finished=True, request_id=name, outputs=[output]))
            elif MODE != "stuck":
                done.append(Some(finished=False, request_id=name, outputs=[]))
        return done

class LLM:
    def __init__(self, **options):
        if MODE == "no room":
            raise ValueError("To serve at least one request with the models's max seq len (64), 9 GiB KV cache is "
                             "needed, which is larger than the available KV cache memory (1 GiB).")
        print("this is the log")
        if MODE == "never starts":
            time.sleep(60)
        self.llm_engine = Engine(options)
    def generate(self, prompts, params, use_tqdm):
        logps = self.llm_engine.head.logps(0)
        ids = prompts[0]["prompt_token_ids"]
        return [Some(prompt_logprobs=[None, *({token: Some(logprob=logps[token])} for token in ids[1:])])]
"""
FAKE_SAFETENSORS = """
import json, struct
class safe_open:
    def __init__(self, file, framework):
        data = open(file, "rb").read()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        self.values = {}
        for name, about in header.items():
            begin, end = (8 + length + offset for offset in about["data_offsets"])
            self.values[name] = list(struct.unpack(f"<{(end - begin) // 4}f", data[begin:end]))
    def __enter__(self):
        return self
    def __exit__(self, *_):
        pass
    def keys(self):
        return self.values.keys()
    def get_tensor(self, name):
        return self.values[name]
"""


class Unigram(torch.nn.Module):
    """The trainer's side of the stand-in's model."""

    def __init__(self, seed: int = 0):
        super().__init__()
        self.head = torch.nn.Parameter(torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)))
        self.config: Any = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=VOCAB))

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        return SimpleNamespace(logits=self.head.expand(*input_ids.shape, VOCAB))

    def save_pretrained(self, folder: Path) -> None:
        from safetensors.torch import save_file

        save_file({"head": self.head.data}, folder / "model.safetensors")


Make = Callable[..., VllmSettings]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The stand-in's model as it would lie on disk."""
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text("{}")
    Unigram().save_pretrained(made)
    return made


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A folder with the stand-ins of what is installed in vLLM's environment."""
    made = tmp_path / "packages"
    made.mkdir()
    (made / "vllm.py").write_text(FAKE_VLLM)
    (made / "safetensors.py").write_text(FAKE_SAFETENSORS)
    (made / "torch.py").write_text('__version__, float32 = "0.0", None\ndef get_num_threads():\n    return 1\n')
    (made / "transformers.py").write_text('__version__ = "0.0"\n')
    return made


@pytest.fixture
def fake(packages: Path) -> Make:
    """``fake(mode, **settings)``: settings that start the stand-in, which misbehaves in the way named."""

    def make(mode: str = "", **more: Any) -> VllmSettings:
        environment = {"PYTHONPATH": str(packages), "FAKE_MODE": mode}
        values = {"python": sys.executable, "environment": environment, "start_seconds": 20, "silence_seconds": 20}
        return VllmSettings(**{**values, **more})

    return make


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], VllmSettings]:
    """``script(body)``: settings whose Python is a program that plays the other side of the protocol by itself.

    In the body: `ask()` gives the next request, `tell(message)` answers, `sock` is the bare socket.
    """

    def make(body: str) -> VllmSettings:
        file = tmp_path / "player"
        file.write_text(
            f"#!{sys.executable}\nimport sys, socket\nsys.path.insert(0, {str(CHILD.parents[3])!r})\n"
            "from thence.framed import Wire\n"
            "sock = socket.socket(fileno=int(sys.argv[sys.argv.index('--fd') + 1]))\nwire = Wire(sock)\n"
            "ask, tell = (lambda: wire.receive(20)), wire.send\n"
            "ready = {'protocol': 2, 'model': sys.argv[sys.argv.index('--model') + 1], 'stamp': [0, 'd'],\n"
            "         'dtype': 'float32', 'max_model_len': 64}\n" + textwrap.dedent(body)
        )
        file.chmod(0o755)
        return VllmSettings(python=str(file), start_seconds=20, silence_seconds=2)

    return make


def expected_logps(model: Unigram, temperature: float) -> torch.Tensor:
    return torch.log_softmax(model.head.detach() / (temperature or 1.0), -1)


# --- Sampling ---------------------------------------------------------------------------------------------------------


def test_responses_come_in_the_order_of_their_prompts_with_the_log_probabilities_of_the_model(
    fake: Make, folder: Path
) -> None:
    prompts = [[1], [1, 2, 3], [1], [4, 5]]
    with VllmEngine(fake(max_rows=1), folder) as engine:
        for temperature in (1.0, 0.5):
            sampling = Sampling(8, temperature, stop_ids=(0,))
            found = engine.sample(prompts, [3, 4, 5, 6], sampling)
            alone = [engine.sample([p], [s], sampling)[0] for p, s in zip(prompts, [3, 4, 5, 6], strict=True)]
            assert found == alone
            logps = expected_logps(Unigram(), temperature)
            for response in found:
                assert response.logps == pytest.approx(logps[response.token_ids].tolist(), abs=1e-5)
                assert response.finish == ("stop" if response.token_ids[-1] == 0 else "length")
                assert len(response.token_ids) == 8 or response.finish == "stop"
        assert {len(r.token_ids) for r in engine.sample(prompts, range(4), Sampling(3))} == {3}
        assert engine.sample([], [], Sampling(3)) == []


@pytest.mark.parametrize("taken", [1, 2])
def test_a_response_is_given_as_soon_as_it_ends_and_leaving_early_stops_the_rest(
    fake: Make, folder: Path, taken: int
) -> None:
    with VllmEngine(fake("slow", max_rows=4), folder) as engine:
        start = time.monotonic()
        stream = engine.stream([[1], [2], [3]], [1, 2, 3], Sampling(2000), limits=[1500, 4, 2])
        assert [next(stream)[0] for _ in range(taken)] == [2, 1][:taken]
        stream.close()
        # 1500 tokens would take 30 s; what is left of them must not reach the next request
        assert [len(r.token_ids) for r in engine.sample([[1], [2]], [1, 2], Sampling(3))] == [3, 3]
        assert time.monotonic() - start < 8


def test_log_probabilities_can_be_left_out(fake: Make, folder: Path) -> None:
    with VllmEngine(fake(), folder) as engine:
        ((_, response),) = engine.stream([[1]], [1], Sampling(3), logps=False)
        assert len(response.token_ids) == 3 and response.logps == []


def test_what_cannot_be_sampled_is_refused_before_vllm_hears_of_it(fake: Make, folder: Path) -> None:
    with VllmEngine(fake(max_model_len=16), folder) as engine:
        assert engine.max_model_len == 16
        with pytest.raises(UserError, match=r"16 tokens, and vLLM was started for 16(.|\n)*max_model_len"):
            engine.sample([[1] * 16], [0], Sampling(4))
        with pytest.raises(ValueError, match="no token"):
            engine.sample([[]], [0], Sampling(4))
        with pytest.raises(ValueError, match="2 seeds"):
            engine.sample([[1]], [0, 1], Sampling(4))
        assert len(engine.sample([[1] * 15], [0], Sampling(4))) == 1


def test_the_whole_softmax_is_reported_under_top_p_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(CHILD.parent))
    child = importlib.import_module("child")
    kept: list[Any] = []

    def renormalised(logits: torch.Tensor, generators: Any, k: Any, p: Any) -> tuple[torch.Tensor, torch.Tensor]:
        kept.append((k, p))
        logits[:, 1:] = -math.inf  # in place, as vLLM does
        return logits.argmax(-1), logits.log_softmax(-1)

    sampler = SimpleNamespace(topk_topp_sampler=SimpleNamespace(forward=renormalised))
    child._report_whole_softmax(sampler, torch)
    logits = torch.tensor([[1.0, 2.0, 0.5]])
    token, logps = sampler.topk_topp_sampler.forward(logits.clone(), {}, None, torch.tensor([0.5]))
    assert token.tolist() == [0] and kept == [(None, torch.tensor([0.5]))]
    torch.testing.assert_close(logps, torch.log_softmax(logits, -1))
    # with nothing cut off vLLM's own numbers are right, and are left alone
    assert sampler.topk_topp_sampler.forward(logits.clone(), {}, None, None)[1].tolist() == [
        [0.0, -math.inf, -math.inf]
    ]


# --- Weights ----------------------------------------------------------------------------------------------------------


def test_pushed_weights_are_sampled_with_and_stamped(fake: Make, folder: Path) -> None:
    with VllmEngine(fake(), folder) as engine:
        first = engine.facts()["weights"]
        for version, seed in ((1, 7), (5, 8)):
            model = Unigram(seed)
            engine.push_weights(model, version)
            assert engine.version == version and engine.last_push is not None
            assert engine.last_push.probe_difference < 1e-5
            (response,) = engine.sample([[1]], [0], Sampling(20))
            assert response.logps == pytest.approx(expected_logps(model, 1.0)[response.token_ids].tolist(), abs=1e-5)
            assert engine.facts()["weights_version"] == version and engine.facts()["weights"] != first
        assert not [p for root in engine._scratch for p in root.rglob("*.safetensors")]


def test_weights_that_did_not_take_effect_are_refused(fake: Make, folder: Path) -> None:
    engine = VllmEngine(fake("stale"), folder)
    with pytest.raises(UserError, match="version 1 did not take effect"):
        engine.push_weights(Unigram(7), 1)
    with pytest.raises(UserError, match="has been closed"):
        engine.sample([[1]], [0], Sampling(2))


def test_a_cache_of_old_keys_and_values_is_refused(fake: Make, folder: Path) -> None:
    engine = VllmEngine(fake("clinging"), folder)
    with pytest.raises(UserError, match="did not forget the keys and values"):
        engine.push_weights(Unigram(7), 1)


def test_weights_altered_on_the_way_are_refused(fake: Make, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thence.rollout.vllm.engine.weights_digest", lambda folder: "of other bytes")
    engine = VllmEngine(fake(), folder)
    with pytest.raises(UserError, match="arrived with digest"):
        engine.push_weights(Unigram(7), 1)


def test_weights_go_over_disk_where_shared_memory_is_too_small(
    fake: Make, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.mkdir()
    large.mkdir()
    free = {small: 10, large: 10**9}
    monkeypatch.setattr(weights_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=free[path]))
    assert weights_module.folder_for(Unigram(), [small, large]).parent == large
    free[small] = 10**9
    assert weights_module.folder_for(Unigram(), [small, large]).parent == small


def test_a_response_of_other_weights_is_refused(script: Callable[[str], VllmSettings], folder: Path) -> None:
    settings = script("""
        ask(); tell({"ready": ready})
        ask(); tell({"done": 0, "stamp": [4, "d"], "token_ids": [1], "logps": [-1.0], "finish": "length"})
        ask()
    """)
    with pytest.raises(UserError, match=r"\[4, 'd'\], not with \[0, 'd'\](.|\n)*push weights before sampling"):
        VllmEngine(settings, folder).sample([[1]], [0], Sampling(1))


# --- Failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("dies", r"ended unexpectedly while sampling \(SIGKILL\)(.|\n)*this is the log(.|\n)*needs too much memory"),
        ("raises", r"failed while sampling(.|\n)*can't allocate memory(.|\n)*remedy: there is too little memory"),
        ("hangs", r"said nothing for 0.5 s while sampling"),
        ("infinite", "without a finite log-probability"),
    ],
)
def test_an_engine_that_fails_while_sampling_gives_an_error_with_a_remedy(
    fake: Make, folder: Path, mode: str, message: str
) -> None:
    settings = fake(mode, silence_seconds=0.5 if mode == "hangs" else 20)
    with VllmEngine(settings, folder) as engine:
        pid = engine._link.pid
        with pytest.raises(UserError, match=message):
            engine.sample([[1]], [0], Sampling(4))
        assert pid is not None and not alive(pid)
    assert not any(root.exists() for root in engine._scratch)


def test_an_engine_that_does_not_start_gives_an_error_with_a_remedy(fake: Make, folder: Path) -> None:
    with pytest.raises(
        UserError, match=r"failed while starting(.|\n)*remedy: the cache for keys and values is too small"
    ):
        VllmEngine(fake("no room"), folder)
    with pytest.raises(UserError, match=r"said nothing for 0.5 s while starting(.|\n)*this is the log"):
        VllmEngine(fake("never starts", start_seconds=0.5), folder)


def test_a_python_without_vllm_is_named_with_what_to_do(
    fake: Make, folder: Path, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (packages / "vllm.py").unlink()
    if importlib.util.find_spec("vllm") is None:
        with pytest.raises(UserError, match=r"No module named 'vllm'(.|\n)*install vLLM in a separate environment"):
            VllmEngine(fake(), folder)
    with pytest.raises(UserError, match="no such Python"):
        VllmEngine(fake(python="/nowhere/bin/python"), folder)
    monkeypatch.delenv(PYTHON_VARIABLE, raising=False)
    monkeypatch.setattr(settings_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=PYTHON_VARIABLE):
        VllmEngine(fake(python=""), folder)
    monkeypatch.setenv(PYTHON_VARIABLE, sys.executable)
    assert fake(python="").interpreter() == sys.executable


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("sock.sendall(b'HTTP/1.1 400 Bad Request')", "does not speak thence's protocol"),
        ("sock.sendall(b'\\0\\0\\0\\x05hello'); ask()", "does not speak thence's protocol"),
        ("sock.sendall(b'\\0\\0'); sock.close()", r"ended unexpectedly while starting \(exit code 0\)"),
        ("ask(); tell({'ready': {**ready, 'protocol': 99}})", "not of this version"),
        ("ask(); tell({'ready': {**ready, 'dtype': 'bfloat16'}})", "computes in bfloat16, asked for was float32"),
    ],
)
def test_a_program_that_speaks_something_else_is_refused(
    script: Callable[[str], VllmSettings], folder: Path, body: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        VllmEngine(script(body), folder)


def test_responses_that_are_left_out_are_noticed(script: Callable[[str], VllmSettings], folder: Path) -> None:
    settings = script("""
        ask(); tell({"ready": ready})
        ask(); tell({"end": 1, "stamp": [0, "d"]}); ask()
    """)
    with pytest.raises(UserError, match="left out 1 of 1"):
        VllmEngine(settings, folder).sample([[1]], [0], Sampling(1))


def test_a_folder_that_vllm_cannot_open_is_named(fake: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="safetensors"):
        VllmEngine(fake(), tmp_path / "nothing")


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until(done: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not done() and time.monotonic() < deadline:
        time.sleep(0.05)
    return done()


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_the_engine_ends_with_a_parent_that_is_killed_while_it_samples(packages: Path, folder: Path) -> None:
    program = f"""
        from pathlib import Path
        from thence.rollout.native import Sampling
        from thence.rollout.vllm.engine import VllmEngine
        from thence.rollout.vllm.settings import VllmSettings
        environment = {{"PYTHONPATH": {str(packages)!r}, "FAKE_MODE": "hangs"}}
        engine = VllmEngine(VllmSettings(python={sys.executable!r}, environment=environment), Path({str(folder)!r}))
        print(engine._link.pid, *engine._scratch, flush=True)
        engine.sample([[1]], [0], Sampling(4))
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid, *scratch = parent.stdout.readline().split()
    time.sleep(0.2)
    assert alive(int(pid))
    parent.kill()
    parent.communicate()
    assert wait_until(lambda: not alive(int(pid)), 10)
    assert not any(Path(root).exists() for root in scratch)


# --- A server ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def served(packages: Path, folder: Path, port: int = 0, token: str = TOKEN) -> Iterator[tuple[int, str]]:
    """A server on some port: the port it listens on (0: it does not), and what it said."""
    environment = {**os.environ, "PYTHONPATH": str(packages), TOKEN_VARIABLE: token, "FAKE_MODE": "slow"}
    command = [sys.executable, str(CHILD), "--port", str(port), "--model", str(folder)]
    popen = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert popen.stdout is not None
    said = ""
    try:
        while not said.startswith("serving"):
            line = popen.stdout.readline()
            if not line:
                break
            said = line.strip()
        yield (int(said.rsplit(":", 1)[1]) if said.startswith("serving") else 0), said
    finally:
        popen.terminate()
        popen.communicate()


def test_a_server_keeps_its_weights_and_serves_one_client_at_a_time(
    packages: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    with served(packages, folder) as (port, _):
        settings = VllmSettings(server=f"127.0.0.1:{port}", start_seconds=20, silence_seconds=20)
        with VllmEngine(settings, folder) as engine:
            assert len(engine.sample([[1]], [0], Sampling(4))[0].token_ids) == 4
            with pytest.raises(UserError, match=r"busy(.|\n)*wait until"):
                VllmEngine(settings, folder)
            engine.push_weights(Unigram(7), 3)
            assert engine.facts()["server"] == settings.server
        # the server lives on with weights that this client has not pushed
        with pytest.raises(UserError, match=r"weights \[3, (.|\n)*push weights before sampling"):
            again(settings, folder).sample([[1]], [0], Sampling(4))
        with again(settings, None) as engine:
            engine.push_weights(Unigram(8), 1)
            assert engine.sample([[1]], [0], Sampling(4))
        with pytest.raises(UserError, match="has the model"):
            again(settings, folder.parent)
        monkeypatch.setenv(TOKEN_VARIABLE, "another token")
        with pytest.raises(UserError, match=r"wrong token(.|\n)*same token"):
            VllmEngine(settings, folder)


def again(settings: VllmSettings, folder: Path | None) -> VllmEngine:
    """A new client, as soon as the server has noticed that the last one is gone."""
    for _ in range(50):
        try:
            return VllmEngine(settings, folder)
        except UserError as error:
            if "busy" not in str(error):
                raise
            time.sleep(0.1)
    raise AssertionError("the server is busy for ever")


def test_a_port_in_use_and_a_missing_server_are_named(
    packages: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        settings = VllmSettings(server=f"127.0.0.1:{port}", start_seconds=0.5)
        with pytest.raises(
            UserError, match=rf"no vLLM server answers at 127.0.0.1:{port}(.|\n)*child.py --port {port}"
        ):
            VllmEngine(settings, folder)
        other.listen()
        with served(packages, folder, port) as (_, said):
            assert said == f"port {port} on 127.0.0.1 cannot be used: Address already in use; give another --port"
        with pytest.raises(UserError, match="said nothing"):
            VllmEngine(settings, folder)
    with served(packages, folder, token="") as (_, said):
        assert TOKEN_VARIABLE in said
    monkeypatch.delenv(TOKEN_VARIABLE)
    with pytest.raises(UserError, match=TOKEN_VARIABLE):
        VllmEngine(settings, folder)


@pytest.mark.parametrize("server", ["10.0.0.1:8000", "example.org:80", "127.0.0.1", "http://127.0.0.1:8000"])
def test_a_server_elsewhere_is_refused(server: str) -> None:
    with pytest.raises(ValueError, match="not a port of this machine"):
        VllmSettings(server=server)


def test_messages_survive_any_cutting_and_a_pause_in_the_middle() -> None:
    left, right = socket.socketpair()
    with left, right:
        wire = Wire(right)
        recorder, reader = socket.socketpair()
        Wire(recorder).send({"text": "ünï\ud800"})
        Wire(recorder).send({"next": 1})
        data = reader.recv(1000)
        left.sendall(data[:7])
        with pytest.raises(TimeoutError):
            wire.receive(0.01)
        left.sendall(data[7:])
        assert wire.receive(1) == {"text": "ünï\ud800"}
        assert wire.receive(1) == {"next": 1}
        left.close()
        assert wire.receive(1) is None
        recorder.close()
        reader.close()


# --- Correction -------------------------------------------------------------------------------------------------------


def test_truncated_importance_is_the_ratio_up_to_the_bound() -> None:
    trainer = torch.tensor([-1.0, -1.0, -2.0, -0.1, 0.0], requires_grad=True)
    sampler = torch.tensor([-1.0, -1.5, -1.0, -3.0, -1000.0])
    weights = truncated_importance(trainer, sampler)
    torch.testing.assert_close(weights, torch.tensor([1.0, math.exp(0.5), math.exp(-1.0), 2.0, 2.0]))
    assert not weights.requires_grad
    with pytest.raises(ValueError, match="shapes"):
        truncated_importance(trainer, sampler[:3])
    with pytest.raises(ValueError, match="finite"):
        truncated_importance(trainer, torch.full((5,), -math.inf))
    with pytest.raises(ValueError, match="bound"):
        truncated_importance(trainer, sampler, bound=0.0)


@given(st.integers(2, 6), st.integers(0, 1000), st.sampled_from([0.5, 1.0, 2.0, 100.0]))
def test_truncated_importance_makes_the_sampler_s_mean_that_of_the_trainer(n: int, seed: int, bound: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    trainer, sampler = (torch.log_softmax(torch.randn(n, generator=generator).double(), -1) for _ in range(2))
    value = torch.randn(n, generator=generator).double()
    weights = truncated_importance(trainer, sampler, bound)
    ratio = (trainer - sampler).exp()
    assert weights.max() <= bound
    torch.testing.assert_close(weights, ratio.clamp(max=bound))
    if ratio.max() <= bound:
        torch.testing.assert_close((sampler.exp() * weights * value).sum(), (trainer.exp() * value).sum())


# --- vLLM itself ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[VllmEngine, Any]]:
    """vLLM with a random Llama whose output layer is tied to its embedding, and the same model here."""
    if PYTHON_VARIABLE not in os.environ:
        pytest.skip(f"set {PYTHON_VARIABLE} to the Python of an environment with vLLM")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 256}
    config = LlamaConfig(
        vocab_size=512, intermediate_size=128, initializer_range=0.2, tie_word_embeddings=True, **sizes
    )
    model = LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("real")
    model.save_pretrained(folder)
    with VllmEngine(VllmSettings(kv_cache_gb=0.25, max_rows=32, threads=1), folder) as engine:
        yield engine, model


PROMPTS = [[5, 9, 400, 17], [5, 9, 400, 17], [33, 2, 250, 8, 90, 77, 61], [7]]


def trainer_logps(model: Any, prompt: list[int], ids: list[int], temperature: float) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].double()
    return torch.log_softmax(logits / (temperature or 1.0), -1).gather(1, torch.tensor(ids)[:, None])[:, 0]


def check_log_probabilities(engine: VllmEngine, model: Any, sampling: Sampling) -> None:
    for prompt, response in zip(PROMPTS, engine.sample(PROMPTS, [1, 2, 3, 4], sampling), strict=True):
        theirs = torch.tensor(response.logps).double()
        ours = trainer_logps(model, prompt, response.token_ids, sampling.temperature)
        assert float((theirs - ours).abs().max()) < 1e-3
        assert float(kl_estimate(theirs, ours).mean()) < 1e-6


@pytest.mark.vllm
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(24),
        Sampling(24, temperature=0.6),
        Sampling(24, temperature=0.6, top_p=0.8),
        Sampling(24, temperature=1.3, top_k=5),
        Sampling(24, temperature=0.0),
    ],
    ids=str,
)
def test_vllm_reports_the_log_probabilities_that_the_trainer_computes(
    real: tuple[VllmEngine, Any], sampling: Sampling
) -> None:
    engine, model = real
    engine.push_weights(model, 0)
    check_log_probabilities(engine, model, sampling)


@pytest.mark.vllm
def test_vllm_s_greedy_responses_are_the_native_sampler_s(real: tuple[VllmEngine, Any]) -> None:
    engine, model = real
    engine.push_weights(model, 0)
    greedy = Sampling(24, temperature=0.0)
    ours = sample(model, PROMPTS, [0] * 4, greedy)
    stop = (ours[0].token_ids[3], ours[2].token_ids[5])
    for stops in ((), stop):
        sampling = Sampling(24, temperature=0.0, stop_ids=stops)
        native = sample(model, PROMPTS, [0] * 4, sampling)
        theirs = engine.sample(PROMPTS, [0] * 4, sampling)
        assert [(r.token_ids, r.finish) for r in theirs] == [(r.token_ids, r.finish) for r in native]


@pytest.mark.vllm
def test_vllm_repeats_a_seed_and_ends_at_its_context(real: tuple[VllmEngine, Any]) -> None:
    engine, _ = real
    first, again = (engine.sample(PROMPTS, [1, 2, 3, 4], Sampling(16)) for _ in range(2))
    assert [r.token_ids for r in first] == [r.token_ids for r in again]
    assert first[0].token_ids != first[1].token_ids
    assert engine.max_model_len == 256
    (cut,) = engine.sample([[5] * 250], [1], Sampling(32))
    assert len(cut.token_ids) == 6 and cut.finish == "length"


@pytest.mark.vllm
def test_vllm_takes_more_prompt_tokens_than_it_reads_at_once(real: tuple[VllmEngine, Any]) -> None:
    engine, model = real
    engine.push_weights(model, 0)
    prompts = [[(7 * i + 11 * j) % 500 + 2 for j in range(200)] for i in range(40)]
    found = engine.sample(prompts, range(40), Sampling(8))
    again = engine.sample(prompts, range(40), Sampling(8))
    assert [r.token_ids for r in found] == [r.token_ids for r in again]
    for prompt, response in zip(prompts, found, strict=True):
        ours = trainer_logps(model, prompt, response.token_ids, 1.0)
        assert float((torch.tensor(response.logps).double() - ours).abs().max()) < 1e-3


@pytest.mark.vllm
@pytest.mark.parametrize("part", ["embed_tokens", "self_attn", "mlp", "norm"])
def test_vllm_samples_with_the_weights_that_were_pushed(real: tuple[VllmEngine, Any], part: str) -> None:
    engine, model = real
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    try:
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if part in name:
                    weight.mul_(1.3)
        engine.push_weights(model, 2)
        assert engine.last_push is not None and engine.last_push.probe_difference < 1e-3
        check_log_probabilities(engine, model, Sampling(16))
    finally:
        model.load_state_dict(before)


@pytest.mark.vllm
def test_vllm_without_room_for_its_cache_is_an_error_with_a_remedy(
    real: tuple[VllmEngine, Any], tmp_path: Path
) -> None:
    _, model = real
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"remedy: the cache for keys and values is too small"):
        VllmEngine(VllmSettings(kv_cache_gb=0.00001, threads=1), tmp_path)


@pytest.mark.vllm
def test_vllm_killed_in_the_middle_is_an_error_with_a_remedy(real: tuple[VllmEngine, Any], tmp_path: Path) -> None:
    _, model = real
    model.save_pretrained(tmp_path)
    engine = VllmEngine(VllmSettings(kv_cache_gb=0.25, threads=1), tmp_path)
    stream = engine.stream([[5]] * 4, range(4), Sampling(200), limits=[2, 200, 200, 200])
    next(stream)
    assert engine._link.pid is not None
    os.kill(engine._link.pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"SIGKILL(.|\n)*run the same command again"):
        list(stream)
