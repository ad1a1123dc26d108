"""Linformer: sharing, starts, and what it does with padding."""

import math

import pytest
import torch

from models import Place, build, linformer
from models.linformer import linformer_attention
from models.row_products import kernels

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding


def qkv(length=13):
    return torch.randn(3, 2, 2, length, 4, dtype=torch.float64).unbind(0)


def projections(num_heads=2, slots=5, longest=20):
    return torch.randn(2, num_heads, slots, longest, dtype=torch.float64).unbind(0)


@pytest.mark.parametrize("num_heads", [1, 2])
def test_masked_row_equals_the_row_cut_to_its_length(num_heads):
    q, k, v = qkv()
    proj_k, proj_v = projections(num_heads)
    mask = torch.arange(13) < torch.tensor([13, 6])[:, None]
    found = linformer_attention(q, k, v, mask, proj_k=proj_k, proj_v=proj_v)[1:, :, :6]
    cut = linformer_attention(*(x[1:, :, :6] for x in (q, k, v)), proj_k=proj_k, proj_v=proj_v)
    torch.testing.assert_close(found, cut, **EXACT)


def test_gradcheck():
    mask = torch.tensor([[True] * 3, [True, False, False]])
    leaves = [x.requires_grad_() for x in (*qkv(length=3), *projections(slots=2, longest=4))]
    attend = lambda q, k, v, e, f: linformer_attention(q, k, v, mask, proj_k=e, proj_v=f)  # noqa: E731
    assert torch.autograd.gradcheck(attend, leaves)


@pytest.mark.parametrize(
    ("share", "matrices"),
    [("none", 2 * 2 * 3), ("heads", 2 * 3), ("kv", 3), ("layers", 1), ("layers_per_head", 2)],
)
def test_share_says_how_many_matrices_a_model_has(share, matrices):
    shared = {}
    layers = [
        build(
            "linformer", Place(d_model=8, num_heads=2, max_len=30, layer_index=i, shared=shared), share=share
        )
        for i in range(3)
    ]
    unique = {p for layer in layers for name, p in layer.named_parameters() if name.startswith("proj")}
    assert sum(p.numel() for p in unique) == matrices * 256 * 30


@pytest.mark.parametrize("share", ["layers", "layers_per_head"])
def test_models_do_not_share_with_each_other(share):
    one, other = (
        build("linformer", Place(d_model=8, num_heads=2, max_len=30, shared={}), share=share)
        for _ in range(2)
    )
    assert one.proj_k is not other.proj_k


def test_layers_per_head_is_one_projection_of_keys_and_values_for_each_head():
    place = Place(d_model=8, num_heads=2, max_len=13)
    mechanism = build("linformer", place, share="layers_per_head", proj_len=3).double()
    assert mechanism.proj_k is mechanism.proj_v
    q, k, v = qkv()
    expected = [
        torch.softmax(q[:, h] @ (e @ k[:, h]).mT / 2, dim=-1) @ (e @ v[:, h])
        for h, e in enumerate(mechanism.proj_k)
    ]
    torch.testing.assert_close(mechanism.attend(q, k, v, None), torch.stack(expected, dim=1), **EXACT)


@pytest.mark.parametrize(("init_std", "expected"), [(None, 16**-0.5), (0.02, 0.02)])
def test_projections_start_with_the_spread_asked_for(init_std, expected):
    mechanism = build(
        "linformer", Place(d_model=8, num_heads=2, max_len=2000), proj_len=16, init_std=init_std
    )
    found = torch.stack([mechanism.proj_k.std(), mechanism.proj_v.std()]) / expected
    assert (found - 1).abs().max() < 0.015  # of 64,000 numbers: five standard errors


def test_without_mask_padding_is_mixed_in_and_the_traits_say_so():
    place = Place(d_model=8, num_heads=2, max_len=13)
    mechanism = build("linformer", place, proj_len=3, share="kv", use_mask=False).double()
    q, k, v = qkv()
    found = mechanism.attend(q, k, v, torch.arange(13) < torch.tensor([[13], [6]]))
    e = mechanism.proj_k[0]
    expected = torch.softmax(q @ (e @ k).mT / 2, dim=-1) @ (e @ v)
    torch.testing.assert_close(found, expected, **EXACT)
    assert {"content_invariant", "length_invariant"} <= mechanism.traits.exceptions().keys()
    assert not mechanism.traits.packed
    with_mask = build("linformer", place, proj_len=3).traits
    assert with_mask.content_invariant and with_mask.packed


def test_dropout_acts_in_training_only():
    mechanism = build("linformer", Place(d_model=8, num_heads=2, max_len=9), attn_dropout=0.5)
    x = torch.randn(2, 9, 8)
    assert not torch.equal(mechanism(x), mechanism(x))
    mechanism.eval()
    assert torch.equal(mechanism(x), mechanism(x))


def test_packed_attention_drops_its_weights_in_training_only():
    mechanism = build("linformer", Place(d_model=8, num_heads=2, max_len=9), attn_dropout=1.0)
    q, bounds = torch.randn(12, 2, 4), torch.tensor([0, 9, 12], dtype=torch.int32)
    assert not mechanism.attend_packed(q, q, q, bounds, 9).any()
    assert mechanism.eval().attend_packed(q, q, q, bounds, 9).all()


def test_input_past_the_longest_length_is_refused():
    mechanism = build("linformer", Place(d_model=8, num_heads=2, max_len=30))
    with pytest.raises(ValueError, match="at most 30 positions and got 31"):
        mechanism(torch.randn(1, 31, 8))


@pytest.mark.parametrize(
    "own",
    [
        {"share": "all"},
        {"proj_len": 0},
        {"proj_len": 1.5},
        *({"init_std": s} for s in (0.0, math.nan, math.inf)),
    ],
)
def test_values_that_make_no_sense_are_refused(own):
    with pytest.raises(ValueError, match="linformer"):
        build("linformer", Place(d_model=8, num_heads=2, max_len=30), **own)


@pytest.mark.parametrize("num_heads", [1, 2])
def test_fused_attention_to_the_mixtures_equals_explicit_attention(num_heads, monkeypatch):
    mask = torch.arange(13) < torch.tensor([13, 6])[:, None]
    leaves = [x.requires_grad_() for x in (*qkv(), *projections(num_heads))]

    def trained():
        q, k, v, proj_k, proj_v = leaves
        out = linformer_attention(q, k, v, mask, proj_k=proj_k, proj_v=proj_v)
        return out, *torch.autograd.grad(out.sin().sum(), leaves)

    expected = trained()
    monkeypatch.setattr(linformer, "flash_runs", lambda q, k, v: True)
    monkeypatch.delattr(linformer, "masked_softmax")  # of the explicit path
    for found, wanted in zip(trained(), expected, strict=True):
        torch.testing.assert_close(found, wanted, **EXACT)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_half_precision_on_a_gpu_equals_explicit_attention_captured_too(masked, dtype):
    draw = torch.Generator(device="cuda").manual_seed(0)
    qkv = torch.randn(4, 300, 3, 2, 32, device="cuda", generator=draw).to(dtype).unbind(2)
    weights = torch.randn(2, 2, 64, 400, device="cuda", generator=draw) / 8
    leaves = [*(x.transpose(1, 2) for x in qkv), *weights.unbind(0)]
    mask = torch.arange(300, device="cuda") < torch.tensor([[300], [1], [0], [77]], device="cuda")

    def step(leaves):
        q, k, v, proj_k, proj_v = leaves = [x.detach().requires_grad_() for x in leaves]
        attend = (
            torch.compile(linformer_attention, fullgraph=True) if q.dtype == dtype else linformer_attention
        )
        out = attend(q, k, v, mask if masked else None, proj_k=proj_k, proj_v=proj_v)
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    expected = step([x.double() for x in leaves])
    step(leaves)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(leaves)
    graph.replay()
    for found, wanted in zip(captured, expected, strict=True):
        assert (found.double() - wanted).norm() / wanted.norm() < 2e-2  # bfloat16 keeps 8 bits


@pytest.mark.gpu
@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize("slots", [16, 256])
def test_packed_rows_in_half_precision_on_a_gpu_equal_those_in_float64(slots, triton):
    lengths, draw = (300, 1, 0, 77), torch.Generator(device="cuda").manual_seed(0)
    bounds = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32), 300
    qkv = torch.randn(sum(lengths) + 9, 3, 2, 32, device="cuda", generator=draw)
    weights = torch.randn(2, 2, slots, 400, device="cuda", generator=draw) / 8
    results = []
    for dtype in (torch.float64, torch.float16):
        leaves = [x.to(dtype).requires_grad_() for x in (*qkv.unbind(1), *weights)]
        attend = linformer.linformer_attention_packed
        with kernels(triton):
            out = attend(*leaves[:3], *bounds, proj_k=leaves[3], proj_v=leaves[4])
            results.append((out, *torch.autograd.grad(out.double().square().sum(), leaves)))
    for wanted, found in zip(*results, strict=True):
        assert (found.double() - wanted).norm() / wanted.norm() < 1e-2  # float16 keeps 11 bits
    assert not any(x[sum(lengths) :].any() for x in results[1][:4])


@pytest.mark.gpu
def test_scores_are_not_stored_on_a_gpu_in_half_precision():
    place = Place(d_model=64, num_heads=8, max_len=4096)
    mechanism = build("linformer", place, attn_dropout=0.1).cuda()
    x = torch.randn(16, 4096, 64, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", torch.float16):
        mechanism(x).square().sum().backward()
    scores = 16 * 8 * 4096 * 256 * 4  # bytes in float32
    assert torch.cuda.max_memory_allocated() - before < scores
