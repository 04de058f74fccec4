"""A stand-in for vLLM, as packages that a child process imports, and the model that it samples from."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from thence.errors import UserError
from thence.rollout.vllm.engine import VllmEngine
from thence.rollout.vllm.settings import VllmSettings

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

# What vLLM has for weights that come in chunks: it keeps them until all of a layer have come, here until the end.
ENGINES = {}

class TransferEngine:
    def __init__(self, config, vllm_config, device, model):
        self.device, self.model, self.model_config = device, model, vllm_config.model_config
    def parse_update_info(self, values):
        return self.update_info_cls(**values)

if MODE != "no chunks":
    sys.modules["vllm.distributed"] = Some()
    sys.modules["vllm.distributed.weight_transfer"] = Some(
        WeightTransferEngine=TransferEngine, WeightTransferEngineFactory=Some(register_engine=ENGINES.__setitem__))
    sys.modules["vllm.model_executor"] = Some()
    sys.modules["vllm.model_executor.model_loader"] = Some(reload=Some(
        initialize_layerwise_reload=lambda model: model.begin(),
        finalize_layerwise_reload=lambda model, config: model.end()))

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
    def begin(self):
        self.coming = {}
    def load_weights(self, weights):
        for name, values in weights:
            self.coming[name] = values
    def end(self):
        if MODE != "stale":
            self.weight[:] = self.coming.pop("head")
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
        made = options.get("weight_transfer_config", {}).get("backend")
        self.transfer = ENGINES[made](None, Some(model_config=None), Some(type="cpu"), self.head) if made else None
        self.runner = Some(sampler=Some(topk_topp_sampler=Some(forward=None)), get_model=lambda: self.head)
        self.model_executor = Some(driver_worker=Some(model_runner=self.runner))
        self.vllm_config = Some(
            model_config=Some(dtype="torch." + options["dtype"], max_model_len=options.get("max_model_len", 64)),
            cache_config=Some(num_gpu_blocks=4, block_size=16), device_config=Some(device_type="cpu"))
    def collective_rpc(self, name, kwargs={}):
        if name != "reload_weights":
            return getattr(self.transfer, name)(**kwargs)
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


def expected_logps(model: Unigram, temperature: float) -> torch.Tensor:
    return torch.log_softmax(model.head.detach() / (temperature or 1.0), -1)


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
