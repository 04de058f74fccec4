"""How a recipe is laid out over ranks, and what a rank then holds: exact, and the same choice that a run makes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.accounting.test_accounting import SMALL, recipe
from thence.accounting.budget import Plan, StagePlan, plan
from thence.accounting.flops import parameters, training_flops
from thence.accounting.layout import FITS, choose_layout, parts_of
from thence.accounting.lora import adapter_parameters
from thence.accounting.memory import (
    Held,
    Line,
    Memory,
    Reference,
    reference_memory,
    rollout_memory,
    state_memory,
    whole_copy,
)
from thence.cli import main
from thence.pages.plan import fit_lines
from thence.pipeline import layout as run_layout
from thence.recipe import Lora, load_recipe

LLAMA = parameters(SMALL | {"model_type": "llama"})
N, LAYER, ROOT = LLAMA.total, LLAMA.per_layer, LLAMA.embedding + LLAMA.head
GPU = 80e9


def sizes(*lines: Any) -> dict[str, tuple[int, str]]:
    return {line.name: (line.bytes, line.phase) for line in lines}


def test_what_a_rank_holds_of_a_whole_copy() -> None:
    expected = {
        "weights": (4 * N, "always"),
        "AdamW moments": (8 * N, "always"),
        "gradients": (4 * N, "training"),
    }
    assert sizes(*state_memory(LLAMA)) == sizes(*state_memory(LLAMA, Held("ddp"))) == expected
    rounded = sizes(*state_memory(LLAMA, Held("ddp", compute_bytes=2)))
    assert rounded == expected | {"weights, rounded": (2 * N, "always")}
    wide = sizes(*state_memory(LLAMA, Held(compute_bytes=8, width=8)))
    assert wide == {name: (2 * size, phase) for name, (size, phase) in expected.items()}


@pytest.mark.parametrize(("layout", "ranks", "replicas", "parts"), [("fsdp2", 8, 1, 8), ("hsdp", 8, 2, 4)])
def test_what_a_rank_holds_of_weights_that_are_cut(layout: Any, ranks: int, replicas: int, parts: int) -> None:
    assert parts_of(layout, ranks, replicas) == parts
    held = Held(layout, parts, compute_bytes=2)
    found = sizes(*state_memory(LLAMA, held))
    assert found == {
        "weights": (-(-4 * N // parts), "always"),
        "AdamW moments": (-(-8 * N // parts), "always"),
        "gradients": (-(-4 * N // parts), "training"),
        "gathered weights": ((ROOT + 2 * LAYER) * 2, "training"),
        "gradients of a layer": (LAYER * (2 + 4), "training"),
        "gradients of embedding and head": (ROOT * (2 + 4), "sum"),
    }
    assert sizes(*whole_copy(LLAMA, held)) == {"whole copy to sample": (4 * N, "rollout")}
    assert sizes(reference_memory(LLAMA, held)) == {"reference": (-(-4 * N // parts), "always")}
    assert whole_copy(LLAMA, Held("ddp")) == ()


def test_the_choices_of_sharding_change_what_is_held() -> None:
    lazy = sizes(*state_memory(LLAMA, Held("fsdp2", 4, reshard=False, sum_every_pass=False)))
    assert lazy["gathered weights"] == (4 * N, "training")
    assert lazy["gradients before the sum"] == (4 * N, "training")
    away = state_memory(LLAMA, Held("fsdp2", 4, offload=True))
    assert {line.name for line in away if line.phase == "host"} == {"weights", "AdamW moments", "gradients"}
    gathered = sum(line.bytes for line in away if line.phase in ("training", "sum"))
    assert Memory(away).peak == gathered, "what is in host memory is not on the device"


@pytest.mark.parametrize(
    ("parallel", "ranks", "state", "layout"),
    [
        ("auto", 1, 1e15, "none"),
        ("auto", 2, FITS * GPU, "ddp"),
        ("auto", 2, FITS * GPU + 1, "fsdp2"),
        ("ddp", 1, 0, "none"),
        ("ddp", 2, 1e15, "ddp"),
        ("fsdp2", 1, 0, "fsdp2"),
        ("hsdp", 4, 0, "hsdp"),
        ("none", 1, 0, "none"),
    ],
)
def test_the_layout_that_is_chosen(parallel: str, ranks: int, state: float, layout: str) -> None:
    assert choose_layout(parallel, ranks, state, GPU) == layout


@pytest.mark.parametrize("more", [{}, {"model_type": "qwen2", "tie_word_embeddings": True}])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_plan_chooses_what_a_run_chooses(more: Any, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = {"init": {"model_type": "llama", **SMALL, **more}, "tokenizer": "t", "compute_dtype": dtype}
    given = recipe(stages=["sft"], model=model)
    state = 4 * {"float32": 4, "float64": 8}[dtype] * parameters(model["init"]).total
    ranks: Any = SimpleNamespace(rank=0, world=2, gather=lambda value: [value, value])
    for room in (state / FITS - 2, state / FITS + 2):
        monkeypatch.setattr(run_layout, "memory_of", lambda device, room=room: room)
        in_run = run_layout.layout_of(given, "sft", given.model, ranks, torch.device("cpu"))
        planned = plan(given, ranks=2, device_bytes=room)
        assert planned.layout == in_run == ("fsdp2" if room < state / FITS else "ddp")


@pytest.mark.parametrize("name", ["paper-qwen", "paper-llama"])
@pytest.mark.parametrize("ranks", [8, 16])
def test_the_papers_recipes_are_cut_over_gpus(name: str, ranks: int) -> None:
    planned = plan(load_recipe(name), ranks=ranks, device_bytes=GPU)
    assert planned.layout == "fsdp2" and planned.counts is not None
    sft, rl = (stage for stage in planned.stages if stage.kind != "eval")
    assert sft.memory is not None and rl.memory is not None
    lines = sizes(*rl.memory.lines)
    total = planned.counts.total
    assert lines["weights"][0] == -(-4 * total // ranks)
    assert lines["whole copy to sample"] == (4 * total, "rollout")
    assert sft.memory.peak < GPU
    told = fit_lines(planned)
    assert told[0] == f"Layout: fsdp2 over {ranks} ranks, 74.5 GiB each"
    assert "does not fit" not in told[1] and told[1].startswith("  sft: ")


def test_a_stage_that_does_not_fit_says_how_many_rows_would() -> None:
    rows, length = 64, 100
    state, sampling = state_memory(LLAMA), rollout_memory(LLAMA, rows, length)
    memory = Memory((*state, *sampling))
    one = sum(line.bytes for line in sampling if line.name != "sampler's weights") // rows
    stage = StagePlan("rl", "rl", memory=memory, rollout_rows=rows)
    assert stage.most_rows(memory.peak) == rows
    assert stage.most_rows(memory.peak - one) == rows - 1
    assert stage.most_rows(memory.peak - one + 1) == rows - 1
    assert stage.most_rows(0) == 0
    told = fit_lines(Plan("m", LLAMA, (stage,), 1, (), "none", memory.peak - 10 * one))
    assert told[1].endswith(f"does not fit; sampling fits with rollout_rows up to {rows - 10}")
    told = fit_lines(Plan("m", LLAMA, (stage,), 1, (), "none", 4.0 * N))
    assert "sampling does not fit with any rollout_rows" in told[1]
    assert "training needs a smaller micro_batch_tokens" in told[1]


def test_without_the_memory_of_a_device_the_plan_says_what_it_assumed() -> None:
    planned = plan(recipe(stages=["sft"]), ranks=2)
    assert planned.layout == "ddp"
    assert any("parallel = auto is counted as ddp" in text for text in planned.assumptions)


def test_a_frozen_reference_and_a_sampler_elsewhere_are_counted() -> None:
    rl = {"engine": "vllm"}
    planned = plan(recipe(stages=["rl"], rl=rl), references={"rl": Reference()})
    (stage,) = planned.stages
    assert stage.memory is not None
    found = sizes(*stage.memory.lines)
    assert found["reference"] == (4 * N, "always") and "key-value cache" not in found
    assert any("vLLM's own memory is not counted" in text for text in planned.assumptions)


def test_passes_of_a_reference_in_sft_are_counted() -> None:
    facts: dict[str, Any] = {"n_examples": 64, "mean_prompt_tokens": 10, "mean_response_tokens": 20}
    alone, once, twice = (
        plan(recipe(stages=["sft"]), **facts, references={} if not n else {"sft": Reference(n, whole=True)}).stages[0]
        for n in range(3)
    )
    assert alone.memory and once.memory and alone.rule_flops and once.rule_flops and twice.rule_flops
    assert once.rule_flops / alone.rule_flops == pytest.approx(8 / 6)
    assert twice.rule_flops / alone.rule_flops == pytest.approx(10 / 6)
    assert alone.exact_flops and once.exact_flops and twice.exact_flops
    assert once.exact_flops / alone.exact_flops == pytest.approx(4 / 3)  # a forward pass beside one and its backward
    assert twice.exact_flops - once.exact_flops == pytest.approx(once.exact_flops - alone.exact_flops)
    plain, compared = sizes(*alone.memory.lines), sizes(*once.memory.lines)
    assert compared["reference"] == (4 * N, "always") and "reference" not in plain
    assert compared["logits, one chunk"][0] == 2 * plain["logits, one chunk"][0]


def test_a_dry_run_plans_for_ranks_that_are_not_here(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    flags = ["--ranks", "4", "--device-gb", "0.01", "--folder", str(tmp_path / "run")]
    assert main(["run", "quickstart", "--dry-run", *flags, "--rl.options", "kl=0.1"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Layout: fsdp2 over 4 ranks, 9.5 MiB each" in printed
    assert "Sent by a rank in one optimizer step of sft" in printed
    assert "one rank of 4 (fsdp2)" in printed and "reference" in printed and "whole copy to sample" in printed
    assert main(["run", "quickstart", "--dry-run", "--parallel", "none", *flags]) == 2
    assert "parallel = none, but 4 processes" in capsys.readouterr().err
    assert main(["run", "quickstart", "--ranks", "4"]) == 2
    assert "--ranks: it is for --dry-run" in capsys.readouterr().err


def test_a_rank_holds_gradients_and_moments_of_adapters_alone() -> None:
    adapters = adapter_parameters(LLAMA, Lora(rank=4))
    for held in (Held(adapters=adapters), Held("fsdp2", 2, adapters=adapters)):
        found, share = sizes(*state_memory(LLAMA, held)), held.parts
        assert found["weights"] == (-(-4 * (N + adapters) // share), "always")
        assert found["AdamW moments"] == (-(-8 * adapters // share), "always")
        assert found["gradients"] == (-(-4 * adapters // share), "training")
    assert whole_copy(LLAMA, Held(adapters=adapters))[0].bytes == 4 * LLAMA.matmul


@pytest.mark.parametrize(
    "settings",
    [{}, {"targets": ["q_proj", "self_attn.o_proj"]}, {"targets": ["up_proj"], "modules_to_save": ["lm_head"]}],
)
def test_adapters_are_counted_as_they_are_made(settings: dict[str, Any]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from thence.train.lora import add_adapters, trained_tensors

    config = SMALL | {"model_type": "llama", "tie_word_embeddings": False}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    lora = Lora(rank=3, **settings)
    add_adapters(model, lora, 0)
    made = sum(p.numel() for p in trained_tensors(model).values())
    assert adapter_parameters(parameters(config), lora) == made


def test_a_plan_with_adapters_needs_less_memory_and_fewer_flops_by_the_count() -> None:
    plain = recipe()
    adapted = plain.model_copy(update={"model": plain.model.model_copy(update={"lora": Lora(rank=4)})})
    found = [plan(r, SMALL | {"model_type": "llama"}, 100, 10, 20).stages[0] for r in (plain, adapted)]
    assert found[0].rule_flops == found[1].rule_flops
    plain_flops, adapted_flops = (stage.exact_flops or 0 for stage in found)
    assert 0 < adapted_flops < plain_flops
    plain_memory, adapted_memory = (stage.memory or Memory(()) for stage in found)
    assert 0 < adapted_memory.held("always") < 0.8 * plain_memory.held("always")


def test_flops_of_adapters_are_what_torch_counts_but_for_the_first_inputs() -> None:
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    from thence.train.lora import add_adapters

    config, length, rank = SMALL | {"model_type": "llama"}, 11, 4
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config, attn_implementation="eager"))
    add_adapters(model, Lora(rank=rank), 0)
    counts = parameters(config)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, length, dtype=torch.int64), use_cache=False).logits.sum().backward()
    # below the first adapters nothing is trained: no gradient goes to what queries, keys and values are made of
    width = (counts.heads + 2 * counts.kv_heads) * counts.head_dim
    below = 2 * length * counts.hidden * (width + 3 * rank)
    adapters = adapter_parameters(counts, Lora(rank=rank))
    assert counter.get_total_flops() == training_flops(counts, length, length**2, length, adapters=adapters) - below


def test_the_two_moments_of_training_do_not_add_up() -> None:
    lines = [Line("kept", 5, "", "always"), Line("layer", 7, "", "training"), Line("activations", 3, "", "loss")]
    assert Memory((*lines, Line("gradients of the head", 2, "", "sum"))).peak == 5 + 7 + 3
    assert Memory((*lines, Line("gradients of the head", 4, "", "sum"))).peak == 5 + 7 + 4


def test_a_plan_says_what_a_rank_sends() -> None:
    cut, config = recipe(stages=["sft"], parallel="fsdp2"), SMALL | {"model_type": "llama"}
    assert plan(cut, config).stages[0].sent == (), "one rank sends nothing"
    found = plan(cut, config, 64, mean_response_tokens=10, ranks=4).stages[0].sent
    assert [line.name for line in found] == ["weights, forward", "weights, backward", "gradients"]
    assert found[0].bytes == N * 4 * 3 // 4
    whole = recipe(stages=["sft"], parallel="ddp")
    sums = plan(whole, config, 64, mean_response_tokens=10, ranks=4).stages[0].sent
    assert [(line.name, line.bytes) for line in sums] == [("gradients", 2 * N * 4 * 3 // 4)]


def test_a_plan_counts_matrices_in_4_bits_by_what_is_kept_of_them() -> None:
    plain = recipe(stages=["sft"])
    lora = Lora(rank=4, targets=["q_proj", "up_proj"], quantize="nf4")
    packed = plain.model_copy(update={"model": plain.model.model_copy(update={"lora": lora})})
    adapters = adapter_parameters(LLAMA, lora)
    width = LLAMA.heads * LLAMA.head_dim
    matrices = LLAMA.layers * LLAMA.hidden * (width + LLAMA.intermediate)
    config = SMALL | {"model_type": "llama"}
    memory = plan(packed, config, 64, mean_response_tokens=10).stages[0].memory or Memory(())
    found = sizes(*memory.lines)
    assert found["weights in 4 bits"] == (matrices // 2 + 4 * matrices // 64, "always")
    assert found["weights"] == (4 * (N + adapters - matrices), "always")
    assert found["AdamW moments"] == (8 * adapters, "always")
    assert found["one matrix, whole"] == (4 * LLAMA.hidden * max(width, LLAMA.intermediate), "training")
    assert found["weights before they are quantized"] == (4 * N, "host")
    # where the model is opened in the memory that it is trained in, that is a peak of its own
    opened = plan(packed, config, 64, mean_response_tokens=10, on_host=True).stages[0].memory or Memory(())
    assert sizes(*opened.lines)["weights before they are quantized"] == (4 * N, "loading")
    assert Memory((Line("opened", 9, "", "loading"), Line("kept", 5, "", "always"))).peak == 9
    # auto cuts what no device can hold, but not what cannot be cut
    assert plan(packed, config, ranks=4, device_bytes=1.0).layout == "ddp"
    assert plan(plain, config, ranks=4, device_bytes=1.0).layout == "fsdp2"
