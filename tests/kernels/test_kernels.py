"""The C kernels against torch."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from thence.kernels import attention, build, decode, layer
from thence.kernels.attention import packed_causal_attention
from thence.kernels.build import load_library
from thence.pipeline.numerics import numerics, say_other_numerics


@pytest.fixture(autouse=True)
def compiler():
    if attention._library(8) is None:
        pytest.skip("no C compiler")


@pytest.mark.parametrize(("heads", "kv"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("head_size", [8, 32, 64])
@pytest.mark.parametrize("lengths", [(1,), (5, 1, 33), (64, 31, 2, 100), (301,)])
def test_packed_attention_and_its_gradient_are_torchs(heads, kv, head_size, lengths, monkeypatch):
    generator = torch.Generator().manual_seed(0)

    def draw(n):
        return torch.randn(sum(lengths), n, head_size, generator=generator)

    inputs, upstream = (draw(heads), draw(kv), draw(kv)), draw(heads)

    def run(dtype):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = packed_causal_attention(*leaves, lengths, 0.3)
        return [out, *torch.autograd.grad(out, leaves, upstream.to(dtype))]

    for ours, exact in zip(run(torch.float32), run(torch.float64), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("rows", [1, 15, 16, 1000])
@pytest.mark.parametrize("width", [1, 31, 128])
def test_a_norm_and_its_gradient_are_torchs(rows, width):
    kernels, generator = layer.layer_kernels(8), torch.Generator().manual_seed(rows)
    x, weight, upstream = (torch.randn(*s, generator=generator) for s in ((2, rows, width), (width,), (2, rows, width)))
    inputs = (x, 1 + weight)
    ours = slopes(lambda a, b: kernels.norm(a, b, 1e-5), inputs, upstream)
    exact = slopes(
        lambda a, b: torch.nn.functional.rms_norm(a, (width,), b, 1e-5), [i.double() for i in inputs], upstream.double()
    )
    for found, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5 * rows**0.5)


@pytest.mark.parametrize("size", [1, 17, 5000])
def test_a_gate_and_its_gradient_are_torchs(size):
    kernels, generator = layer.layer_kernels(8), torch.Generator().manual_seed(size)
    gate, up, upstream = (torch.randn(3, size, generator=generator) for _ in range(3))
    gate[0] *= 40  # far into both ends
    inputs = (gate, up)
    ours = slopes(kernels.gated, inputs, upstream)
    exact = slopes(lambda a, b: torch.nn.functional.silu(a) * b, [i.double() for i in inputs], upstream.double())
    for found, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("width", [3, 32, 100])
def test_a_gate_far_below_zero_is_shut_while_sampling(width):
    gates = torch.tensor([-80.0, -88.0, -89.0, -200.0]).repeat_interleave(width).view(4, width)
    assert decode.decode_kernels(8).swiglu(torch.cat([gates, torch.ones(4, width)], 1)).abs().max() < 1e-30


@pytest.mark.parametrize("head_size", [2, 8, 32])
@pytest.mark.parametrize("tokens", [1, 33])
def test_heads_are_turned_as_in_torch(head_size, tokens):
    kernels, generator = layer.layer_kernels(head_size), torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(tokens, 3, head_size, generator=generator) for _ in range(2))
    angle = torch.randn(tokens, head_size // 2, generator=generator).repeat(1, 2)
    ours = slopes(lambda a: kernels.turned(a, angle.cos(), angle.sin()), (x,), upstream)
    wide = angle.double()
    exact = slopes(lambda a: layer.plainly_turned(a, wide.cos(), wide.sin()), (x.double(),), upstream.double())
    for found, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-6)


@pytest.fixture(params=[torch.float64, torch.bfloat16])
def other_default_numbers(request):
    """Type of the numbers that torch makes where none is named; the tensors at hand are float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(before)


def test_kernels_make_float32_numbers_whatever_torch_makes_by_default(other_default_numbers):
    kernels, decoding = layer.layer_kernels(8), decode.decode_kernels(8)
    x = torch.linspace(-1, 1, 37 * 40, dtype=torch.float32).view(37, 40)
    _, _, of_weight = slopes(lambda a, b: kernels.norm(a, b, 1e-5), (x, 1 + x[0]), x)
    _, _, expected = slopes(lambda a, b: torch.nn.functional.rms_norm(a, (40,), b, 1e-5), (x, 1 + x[0]), x)
    torch.testing.assert_close(of_weight, expected, rtol=2e-5, atol=2e-5)
    gate, up = x.chunk(2, 1)
    torch.testing.assert_close(decoding.swiglu(x), torch.nn.functional.silu(gate) * up)
    heads = x.view(37, 5, 8)
    out = packed_causal_attention(heads, heads, heads, (30, 7), 0.3)
    wide = heads.double()
    exact = packed_causal_attention(wide, wide, wide, (30, 7), 0.3)
    torch.testing.assert_close(out.double(), exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("mode", ["inference", "autocast"])
def test_a_first_use_in_another_mode_of_torch_finds_the_kernels(mode):
    head_size = {"inference": 22, "autocast": 26}[mode]  # of no other test, so that it is the first use
    with torch.inference_mode() if mode == "inference" else torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.layer_kernels(head_size) is not None
        assert attention._library(head_size) is not None


def test_a_second_derivative_is_refused_and_never_silently_wrong():
    kernels, x = layer.layer_kernels(8), torch.linspace(-1, 1, 48).view(3, 2, 8).requires_grad_()
    angle = torch.linspace(0, 1, 12).view(3, 4).repeat(1, 2)
    for function in (
        lambda a: kernels.norm(a, torch.ones(8), 1e-5),
        lambda a: kernels.gated(a, a),
        lambda a: kernels.turned(a, angle.cos(), angle.sin()),
        lambda a: packed_causal_attention(a, a, a, (2, 1), 0.3),
    ):
        out = (function(x) * x).sum()
        with pytest.raises(RuntimeError, match="THENCE_KERNELS=off"):
            torch.autograd.grad(out, x, create_graph=True)


def test_the_gradient_of_a_norm_does_not_follow_from_the_threads():
    kernels, generator = layer.layer_kernels(8), torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(301, 64, generator=generator) for _ in range(2))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(slopes(lambda a, b: kernels.norm(a, b, 1e-5), (x, x[0]), upstream))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    "spoil", [lambda x: x.bfloat16(), lambda x: x.double(), lambda x: x.t().contiguous().t(), lambda x: x.to("meta")]
)
def test_numbers_that_c_would_misread_are_refused(spoil):
    """C cannot see what a pointer points to: it would read and write beside the tensor."""
    kernels, layers = decode.decode_kernels(8), layer.layer_kernels(8)
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    for call in (kernels.swiglu, lambda a: kernels.rms_norm(a, 1e-6)):
        with pytest.raises(TypeError, match="a C kernel takes contiguous"):
            call(spoil(x))
    with pytest.raises(TypeError, match=r"not torch\.bfloat16"):
        layers.gated(x.bfloat16(), x.bfloat16())
    step, token, rows = make_step(4)
    with pytest.raises(TypeError, match=r"torch\.int64"):
        step(token, replace(rows, place=rows.place.int()))
    with pytest.raises(IndexError, match="one of the 50"):
        step(token.index_fill(0, torch.tensor([2]), 50), rows)
    with pytest.raises(IndexError, match="one of the 50"):
        step(token.index_fill(0, torch.tensor([2]), -1), rows)


def make_step(rows, seed=0):
    """A whole step of two layers with random weights, and what it needs of so many rows after 20 columns."""
    generator, kernels, size = torch.Generator().manual_seed(seed), decode.decode_kernels(8), 8

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    layers = [decode.Matrices(draw(64, 24), None, draw(24, 32), draw(80, 24), draw(24, 40)) for _ in range(2)]
    caches = [(draw(rows, 2, 2, size, decode.LANE), draw(rows, 2, 2, decode.LANE, size)) for _ in layers]
    step = decode.WholeStep(kernels, draw(50, 24), layers, draw(50, 24), caches, 1e-6)
    first = torch.randint(0, 20, (rows,), generator=generator)
    told = decode.Rows(draw(32, 4), draw(32, 4), torch.arange(rows), first, 20)
    return step, torch.randint(0, 50, (rows,), generator=generator), told


def test_a_row_of_a_whole_step_has_the_same_bits_in_any_company_and_with_any_threads():
    step, token, rows = make_step(77)
    before, all_at_once = torch.get_num_threads(), step(token, rows)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert torch.equal(step(token, rows), all_at_once)
            for chosen in ([5], [76, 0, 40], list(range(1, 77, 2)), list(range(33))):
                some = torch.tensor(chosen)
                told = replace(rows, place=rows.place[some], first=rows.first[some])
                assert torch.equal(step(token[some], told), all_at_once[some])
    finally:
        torch.set_num_threads(before)


def slopes(function, inputs, upstream):
    """The result, and the gradient for every input."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def test_without_a_compiler_the_result_is_the_same(monkeypatch):
    x = torch.randn(20, 2, 8, generator=torch.Generator().manual_seed(1))
    ours = packed_causal_attention(x, x, x, (13, 7), 1.0)
    monkeypatch.setattr(attention, "_library", lambda _: None)
    torch.testing.assert_close(packed_causal_attention(x, x, x, (13, 7), 1.0), ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compiler", ["/no/such/compiler", "false"])
def test_a_broken_compiler_means_no_kernels_and_no_error(compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert load_library.__wrapped__("decode.c", 16, lambda head_size, library: True) is None


def test_kernels_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("THENCE_KERNELS", "off")
    assert load_library.__wrapped__("decode.c", 8, lambda head_size, library: True) is None


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """Loads a kernel as a new process would, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "_failed", {})

    def load(test=lambda head_size, library: True, head_size=8):
        return load_library.__wrapped__("attention.c", head_size, test)

    load.cache = tmp_path / "thence"
    return load


def only_library(cache):
    (library,) = cache.glob("*.so")
    return library


def test_kernels_are_loaded_and_tested_once_though_every_batch_asks_for_them(monkeypatch):
    loaded = []
    monkeypatch.setattr(build, "_tested", lambda *arguments: loaded.append(arguments))
    load_library.cache_clear()
    for _ in range(3):
        decode.decode_kernels(8)
        attention._library.__wrapped__(8)
    load_library.cache_clear()
    assert [source for source, *_ in loaded] == ["decode.c", "attention.c"]


@pytest.mark.matrix(1)
@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "text"])
def test_a_damaged_library_is_built_again(fresh, damage, caplog):
    assert fresh() is not None
    library = only_library(fresh.cache)
    whole = library.read_bytes()
    broken = {
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "flipped": whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:],
        "text": b"not a library",
    }[damage]
    # a new file in its place: the bytes of a library that this process has mapped must not change under it
    library.unlink()
    library.write_bytes(broken)
    assert fresh() is not None
    assert only_library(fresh.cache).read_bytes() == whole
    assert "is damaged; it is built again" in caplog.text


def test_a_damaged_library_does_not_end_the_process(fresh, tmp_path):
    assert fresh() is not None
    library = only_library(fresh.cache)
    content = library.read_bytes()
    library.unlink()
    library.write_bytes(content[: len(content) // 3])  # loading it would end the process with SIGBUS
    code = "from thence.kernels.attention import _library; assert _library(8) is not None"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_library_whose_results_are_wrong_is_built_again_then_given_up(fresh, caplog):
    asked = []

    def wrong(head_size, library):
        asked.append(library)
        return False

    assert fresh() is not None  # kept
    assert fresh(wrong) is None
    assert len(asked) == 2  # the kept one and a new one
    assert not list(fresh.cache.glob("*.so"))
    assert "its results are not torch's; running in plain torch" in caplog.text
    assert build.kernel_facts() == "torch (attention.c: its results are not torch's)"


@pytest.mark.matrix(4)
@pytest.mark.parametrize(
    ("source", "right", "wrong"),
    [
        ("attention.c", "sum[b][l] += x[b][c]", "sum[b][l] += 1.001f * x[b][c]"),
        ("attention.c", "x holds the scale already */", "x holds it */\n to_value *= 1.001f;"),
        ("attention.c", "slope[j] = row[j] *", "slope[j] = 1.001f * row[j] *"),
        ("decode.c", "low[l] += query[i]", "low[l] += 1.001f * query[i]"),
        ("decode.c", "score[j] *= total", "score[j] *= 1.001f * total"),
        ("decode.c", "sum[i][1] += x", "sum[i][1] += 1.001f * x"),
        ("decode.c", "row[i] += now->bias[i]", "row[i] += 1.001f * now->bias[i]"),
        ("decode.c", "c.values = now->values", "c.values = m->layers->values"),
        ("decode.c", "token[begin + r]", "token[r]"),
        ("decode.c", "odd[i] += share", "odd[i] += 1.001f * share"),
        ("decode.c", "i++) even[i] += share[j]", "i++) even[i] += 0.9f * share[j]"),
        ("decode.c", "sum += row[i] * row[i]", "sum += 1.001f * row[i] * row[i]"),
        ("decode.c", "(1.0f + expf(power))", "(1.001f + expf(power))"),
        ("layer.c", "weight[i] * (scale * row[i])", "weight[i] * (1.001f * scale * row[i])"),
        ("layer.c", "dot * scale * scale * scale", "1.001f * dot * scale * scale * scale"),
        ("layer.c", "dw[i] += scale * g[i]", "dw[i] += 1.001f * scale * g[i]"),
        ("layer.c", "1.0f / (1.0f + expf(y))", "1.0f / (1.001f + expf(y))"),
        ("layer.c", "(1.0f - share)", "(1.001f - share)"),
        ("layer.c", "grad[i] * (gate[i] * share)", "grad[i] * (1.001f * gate[i] * share)"),
        ("layer.c", "+ way * s[i]", "+ 1.001f * way * s[i]"),
    ],
)
def test_the_self_test_sees_a_kernel_that_is_a_little_off(source, right, wrong, tmp_path, monkeypatch):
    """As a compiler's fault or another processor would make it."""
    for name in ("build.py", "trial.py", *build.SOURCES):
        shutil.copy(Path(build.__file__).with_name(name), tmp_path / name)
    code = (tmp_path / source).read_text()
    assert code.count(right) == 1
    (tmp_path / source).write_text(code.replace(right, wrong))
    monkeypatch.setattr(build, "__file__", str(tmp_path / "build.py"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "_failed", {})
    test = {"attention.c": attention, "decode.c": decode, "layer.c": layer}[source]._is_torchs
    assert load_library.__wrapped__(source, 8, test) is None
    assert build._failed == {source: "its results are not torch's"}


def test_a_library_that_ends_its_process_is_not_used(fresh, tmp_path, monkeypatch):
    for name in ("trial.py", "decode.c"):
        shutil.copy(Path(build.__file__).with_name(name), tmp_path / name)
    code = Path(build.__file__).with_name("attention.c").read_text()
    start = "    const int64_t group = heads / kv;\n"
    (tmp_path / "attention.c").write_text(code.replace(start, start + "    *(volatile int *)0 = 1;\n"))
    monkeypatch.setattr(build, "__file__", str(tmp_path / "build.py"))
    assert fresh() is None
    assert "it does not run here: exit status -11" in build._failed["attention.c"]


@pytest.mark.parametrize("at", [0, 37, 99])
def test_a_nan_does_not_vanish_in_a_kernel(at):
    """The kernels are compiled for speed: a compiler may assume that there is no NaN."""
    x = torch.randn(100, 2, 32, generator=torch.Generator().manual_seed(3))
    x[at, 0, 5] = float("nan")
    key = x.clone().requires_grad_()
    out = packed_causal_attention(torch.ones(100, 2, 32), key, torch.ones(100, 2, 32), (100,), 1.0)
    assert out[at:, 0].isnan().all()
    assert not out[:at].isnan().any() and not out[:, 1].isnan().any()
    (slope,) = torch.autograd.grad(out.sum(), key)
    assert slope[:, 0].isnan().any()


def test_without_a_home_or_a_place_to_keep_them_kernels_are_built_for_this_process(fresh, monkeypatch, tmp_path):
    place = tmp_path / "file"
    place.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "below"))
    assert fresh() is not None
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert fresh() is not None


def test_a_compiler_may_be_named_with_arguments(fresh, monkeypatch):
    monkeypatch.setenv("CC", "cc -g0")
    assert fresh() is not None
    assert build.kernel_facts().startswith("C ")


def test_what_numbers_follow_from_is_kept_and_a_resumed_run_says_what_differs(monkeypatch, caplog):
    kept = numerics()
    assert kept["kernels"].startswith("C ") and kept["threads"] == torch.get_num_threads()
    say_other_numerics(kept, "the checkpoint of step 3")
    say_other_numerics(None, "an older checkpoint")
    assert not caplog.records
    monkeypatch.setenv("THENCE_KERNELS", "off")
    say_other_numerics(kept, "the checkpoint of step 3")
    assert "the checkpoint of step 3 was made with other numerics (kernels C " in caplog.text
    assert "-> torch (THENCE_KERNELS=off)" in caplog.text
