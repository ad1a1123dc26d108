"""Linformer: dense attention when its projections are the identity; sharing; what it does with padding."""

import pytest
import torch

from models import Place, build
from models.common import dense_attention
from models.linformer import linformer_attention

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding


def qkv(length=13):
    return torch.randn(3, 2, 2, length, 4, dtype=torch.float64).unbind(0)


def projections(num_heads=2, slots=5, longest=20):
    return torch.randn(2, num_heads, slots, longest, dtype=torch.float64).unbind(0)


def test_identity_projections_give_dense_attention():
    q, k, v = qkv()
    eye = torch.eye(13, dtype=torch.float64)[None]
    found = linformer_attention(q, k, v, proj_k=eye, proj_v=eye)
    torch.testing.assert_close(found, dense_attention(q, k, v), **EXACT)


@pytest.mark.parametrize("length", [32, 19])
@pytest.mark.parametrize("share_kv", [False, True])
def test_parity_with_the_linformer_package(length, share_kv):
    package = pytest.importorskip("linformer.linformer", exc_type=ImportError)
    oracle = package.LinformerSelfAttention(16, 32, k=6, heads=2, share_kv=share_kv).double().eval()
    x = torch.randn(3, length, 16, dtype=torch.float64)
    to_v = oracle.to_k if share_kv else oracle.to_v  # the package then has no value projection either
    q, k, v = (to(x).unflatten(-1, (2, 8)).transpose(1, 2) for to in (oracle.to_q, oracle.to_k, to_v))
    proj_v = oracle.proj_k if share_kv else oracle.proj_v
    mixed = linformer_attention(q, k, v, proj_k=oracle.proj_k.T[None], proj_v=proj_v.T[None])
    torch.testing.assert_close(oracle.to_out(mixed.transpose(1, 2).flatten(2)), oracle(x), **EXACT)


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
    ("share", "matrices"), [("none", 2 * 2 * 3), ("heads", 2 * 3), ("kv", 3), ("layers", 1)]
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


def test_models_do_not_share_with_each_other():
    one, other = (
        build("linformer", Place(d_model=8, num_heads=2, max_len=30, shared={}), share="layers")
        for _ in range(2)
    )
    assert one.proj_k is not other.proj_k


def test_dropout_acts_in_training_only():
    mechanism = build("linformer", Place(d_model=8, num_heads=2, max_len=9), attn_dropout=0.5)
    x = torch.randn(2, 9, 8)
    assert not torch.equal(mechanism(x), mechanism(x))
    mechanism.eval()
    assert torch.equal(mechanism(x), mechanism(x))


def test_input_past_the_longest_length_is_refused():
    mechanism = build("linformer", Place(d_model=8, num_heads=2, max_len=30))
    with pytest.raises(ValueError, match="at most 30 positions and got 31"):
        mechanism(torch.randn(1, 31, 8))


@pytest.mark.parametrize("own", [{"share": "all"}, {"proj_len": 0}])
def test_values_that_make_no_sense_are_refused(own):
    with pytest.raises(ValueError, match="linformer"):
        build("linformer", Place(d_model=8, num_heads=2, max_len=30), **own)
