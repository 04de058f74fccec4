"""The C kernels against torch."""

import pytest
import torch

from thence.kernels import attention
from thence.kernels.attention import packed_causal_attention
from thence.kernels.build import load_library


@pytest.fixture(autouse=True)
def compiler():
    if load_library("attention.c", 8) is None:
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


def test_without_a_compiler_the_result_is_the_same(monkeypatch):
    x = torch.randn(20, 2, 8, generator=torch.Generator().manual_seed(1))
    ours = packed_causal_attention(x, x, x, (13, 7), 1.0)
    monkeypatch.setattr(attention, "_library", lambda _: None)
    torch.testing.assert_close(packed_causal_attention(x, x, x, (13, 7), 1.0), ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compiler", ["/no/such/compiler", "false"])
def test_a_broken_compiler_means_no_kernels_and_no_error(compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert load_library.__wrapped__("decode.c", 16) is None


def test_kernels_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("THENCE_KERNELS", "off")
    assert load_library.__wrapped__("decode.c", 8) is None
