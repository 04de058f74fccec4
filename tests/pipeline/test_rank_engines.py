"""RL on several ranks whose responses vLLM samples: who starts which engine, what it samples, and one that dies.

The stand-in for vLLM samples with thence's own sampler, so that its tokens are those of ranks that sample themselves.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from tests import ROOT
from tests.pipeline.on_ranks import assert_same, case, drive, lines
from thence.errors import RecipeError, UserError
from thence.pipeline.rollout_places import own_gpu, place_of, ranks_per_engine
from thence.rollout.vllm.chunks import check_names
from thence.rollout.vllm.settings import VllmSettings
from thence.rollout.vllm.weights import keeps_names, tensors_in, write_tensors
from thence.train.parallel.ranks import Ranks

FAKE = """
import os, sys
from types import SimpleNamespace as Some
sys.modules["vllm.platforms"] = Some(current_platform=Some(is_cpu=lambda: True))
transfer = Some(WeightTransferEngine=object, WeightTransferEngineFactory=Some(register_engine=lambda *_: None))
sys.modules |= {"vllm.distributed": Some(), "vllm.distributed.weight_transfer": transfer}
sys.modules |= {"vllm.model_executor": Some(), "vllm.model_executor.model_loader": Some(reload=None)}
import torch
from transformers import AutoModelForCausalLM
from thence.rollout.native import Sampling, sample
__version__ = "0.0"
torch.set_num_threads(1)

def SamplingParams(**values):
    return Some(**values)

class Engine:
    def __init__(self, options):
        self.model, self.rows = AutoModelForCausalLM.from_pretrained(options["model"], dtype=torch.float64), {}
        with open(os.environ["STARTED"], "a") as file:
            file.write("started\\n")
        no_layers = Some(modules=lambda: [])
        runner = Some(sampler=Some(topk_topp_sampler=Some(forward=None)), get_model=lambda: no_layers)
        self.model_executor = Some(driver_worker=Some(model_runner=runner))
        self.vllm_config = Some(
            model_config=Some(dtype="torch.float32", max_model_len=self.model.config.max_position_embeddings),
            cache_config=Some(num_gpu_blocks=4, block_size=16), device_config=Some(device_type="cpu"))

    def collective_rpc(self, name, kwargs={}):
        if name in ("start_weight_update", "finish_weight_update"):
            return
        if name == "update_weights":
            from transfer import tensors_in_file
            kwargs = {"weights_iterator": tensors_in_file(kwargs["update_info"]["path"])}
        own = self.model.state_dict()
        for name, values in kwargs["weights_iterator"]:
            own[name].copy_(values)

    def reset_prefix_cache(self):
        return True

    def add_request(self, name, prompt, params):
        self.rows[name] = (prompt["prompt_token_ids"], params)

    def abort_request(self, names):
        for name in names:
            self.rows.pop(name, None)

    def step(self):
        dying = os.environ.get("DIES", "")
        if dying and not os.path.exists(dying):
            open(dying, "w").close()
            os.kill(os.getpid(), 9)
        rows, self.rows = self.rows, {}
        done = []
        for name, (ids, asked) in rows.items():
            stop_ids = tuple(asked.stop_token_ids)
            how = Sampling(asked.max_tokens, asked.temperature, asked.top_p, asked.top_k, stop_ids=stop_ids)
            (found,) = sample(self.model, [ids], [asked.seed], how)
            logprobs = [{token: Some(logprob=logp)} for token, logp in zip(found.token_ids, found.logps)]
            output = Some(token_ids=found.token_ids, logprobs=logprobs, finish_reason=found.finish)
            done.append(Some(finished=True, request_id=name, outputs=[output]))
        return done

class LLM:
    def __init__(self, **options):
        self.llm_engine = Engine(options)
    def generate(self, prompts, params, use_tqdm):
        ids = torch.tensor([prompts[0]["prompt_token_ids"]])
        with torch.no_grad():
            logps = self.llm_engine.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        read = logps.gather(1, ids[0, 1:, None])[:, 0].tolist()
        return [Some(prompt_logprobs=[None, *({t: Some(logprob=x)} for t, x in zip(ids[0, 1:].tolist(), read))])]
"""
LAYOUTS: dict[str, dict[str, Any]] = {
    "copies": {"parallel": "ddp"},
    "shards, adapters": {"parallel": "fsdp2", "model": {"lora": {"rank": 2}}},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "one engine for two": ("shards, adapters", {"ranks_per_engine": 2}),
    "weights in chunks": ("shards, adapters", {"transfer": "ipc"}),
    "dies once": ("copies", {"environment": "dies"}),
}
if "THENCE_RANK_ENGINES" not in os.environ:  # all of them take minutes
    del CASES["dies once"]


@pytest.fixture(scope="module")
def ran(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    (folder / "vllm.py").write_text(FAKE)
    cases = []
    for name in {layout for layout, _ in CASES.values()}:
        settings = LAYOUTS[name]
        model = {**base["model"], **settings.get("model", {})}
        cases.append(case({**base, "model": model}, folder / f"{name}-native", 1, {"steps": 2}))
    for name, (layout, vllm) in CASES.items():
        settings = LAYOUTS[layout]
        recipe = {**base, "model": {**base["model"], **settings.get("model", {})}, "parallel": settings["parallel"]}
        environment = {"PYTHONPATH": f"{folder}:{ROOT / 'src'}", "STARTED": str(folder / f"{name}-started")}
        environment |= {"DIES": str(folder / "died")} if vllm.get("environment") == "dies" else {}
        own = {"python": sys.executable, **vllm, "environment": environment, "start_seconds": 60.0}
        cases.append(case(recipe, folder / name, 2, {"steps": 2, "engine": "vllm", "vllm": own}))
    drive(folder, cases)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_ranks_with_engines_sample_and_train_what_one_process_does(name: str, ran: Path) -> None:
    assert_same(ran / name, ran / f"{CASES[name][0]}-native")
    assert all(line["mismatch_kl"] < 1e-12 for line in lines(ran / name))
    started = (ran / f"{name}-started").read_text().split()
    assert len(started) == {"one engine for two": 1, "weights in chunks": 2, "dies once": 3}[name]


def ranks(rank: int, world: int) -> Ranks:
    return cast(Ranks, SimpleNamespace(rank=rank, world=world))


def test_ranks_are_dealt_to_engines_of_their_machine() -> None:
    hosts = ["a", "a", "b", "b"]
    own = [place_of(VllmSettings(), ranks(r, 4), hosts, "rl.vllm") for r in range(4)]
    assert [(place.leader, place.shared) for place in own] == [(0, False), (1, False), (2, False), (3, False)]
    pairs = [place_of(VllmSettings(ranks_per_engine=2), ranks(r, 4), hosts, "rl.vllm") for r in range(4)]
    assert [(place.leader, place.shared) for place in pairs] == [(0, True), (0, True), (2, True), (2, True)]
    two = VllmSettings(servers=("127.0.0.1:8001", "127.0.0.1:8002"))
    served = [place_of(two, ranks(r, 4), hosts, "rl.vllm") for r in range(4)]
    assert [place.settings.server[-1] for place in served] == ["1", "1", "2", "2"]
    one = place_of(VllmSettings(server="127.0.0.1:8001"), ranks(1, 2), ["a", "a"], "rl.vllm")
    assert one.settings.server and one.shared


@pytest.mark.parametrize(
    ("settings", "world", "said", "field"),
    [
        ({"ranks_per_engine": 2}, 3, "3 ranks cannot be dealt evenly to engines of 2 ranks", "ranks_per_engine"),
        ({"ranks_per_engine": 4}, 2, "2 ranks cannot be dealt evenly to engines of 4 ranks", "ranks_per_engine"),
        ({"servers": ("127.0.0.1:1", "127.0.0.1:2")}, 3, "3 ranks cannot be dealt evenly to 2 servers", "servers"),
        ({"servers": ("127.0.0.1:1", "127.0.0.1:2")}, 1, "1 ranks cannot be dealt evenly to 2 servers", "servers"),
    ],
)
def test_ranks_that_cannot_be_dealt_to_engines_are_refused(
    settings: dict[str, Any], world: int, said: str, field: str
) -> None:
    with pytest.raises(RecipeError, match=said) as caught:
        ranks_per_engine(VllmSettings(**settings), world, "rl.vllm")
    assert caught.value.field == f"rl.vllm.{field}"


def test_an_engine_is_not_shared_between_machines() -> None:
    with pytest.raises(RecipeError, match="ranks 0 to 1 share an engine, and are not on one machine"):
        place_of(VllmSettings(ranks_per_engine=2), ranks(0, 2), ["a", "b"], "rl.vllm")


def test_an_engine_gets_the_gpu_of_its_rank_unless_the_user_names_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert own_gpu(torch.device("cuda", 1), VllmSettings()) == {"CUDA_VISIBLE_DEVICES": "6"}
    assert own_gpu(torch.device("cpu"), VllmSettings()) == {}
    named = VllmSettings(environment={"CUDA_VISIBLE_DEVICES": "0"})
    assert own_gpu(torch.device("cuda", 1), named) == {}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert own_gpu(torch.device("cuda", 1), VllmSettings()) == {"CUDA_VISIBLE_DEVICES": "1"}


def test_tensors_are_written_in_files_of_bounded_size_and_all_ranks_iterate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    monkeypatch.setattr("thence.rollout.vllm.weights.FILE_BYTES", 100)
    tensors = {f"w{i}": torch.full((16,), float(i)) for i in range(5)}
    assert write_tensors(tensors.items(), tmp_path) == 5 == tensors_in(tmp_path)
    found = {name: value for file in tmp_path.glob("*.safetensors") for name, value in load_file(file).items()}
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in found)
    seen = []
    heard = ((name, seen.append(name) or value) for name, value in tensors.items())
    with pytest.raises(Exception, match="cannot be handed over to vLLM"):
        write_tensors(heard, tmp_path / "nowhere")
    assert len(seen) == 5  # the others gather with this rank to the end
    assert write_tensors(tensors.items(), None) == 5


def test_a_model_whose_files_have_other_names_is_known() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 16}
    assert keeps_names(LlamaForCausalLM(LlamaConfig(**sizes)))
    mixture = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=2))
    assert not keeps_names(mixture)
    with pytest.raises(UserError, match=r"MixtralForCausalLM under other names(.|\n)*set transfer = files"):
        check_names(mixture)
