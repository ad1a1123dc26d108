"""Global mean: softmax attention without scores."""

import torch

from models import Place, build
from models.common import dense_attention
from models.global_mean import global_mean, global_mean_packed

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding


def test_equals_dense_attention_with_equal_scores():
    v = torch.randn(2, 1, 13, 6, dtype=torch.float64)
    for mask in (None, torch.arange(13) < torch.tensor([13, 4])[:, None], torch.rand(2, 13) < 0.6):
        expected = dense_attention(torch.zeros_like(v), torch.zeros_like(v), v, mask)
        torch.testing.assert_close(global_mean(v[:, 0], mask), expected[:, 0], **EXACT)


def test_row_without_real_tokens_gives_zeros():
    x = torch.randn(2, 13, 6)
    assert not global_mean(x, torch.tensor([[True] * 13, [False] * 13]))[1].any()


def test_half_precision_mean_does_not_drift_over_a_long_sequence():
    x = torch.rand(1, 8000, 6).half()
    torch.testing.assert_close(global_mean(x)[:, 0].double(), x.double().mean(dim=1), rtol=1e-3, atol=0)


def test_gradcheck():
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: global_mean(x, mask), [x])


def test_packed_path_equals_each_sequence_alone():
    mechanism = build("global_mean", Place(d_model=8, num_heads=2, max_len=200)).double()
    x = torch.randn(180, 8, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 5, 5, 166, 167], dtype=torch.int32)  # one is empty, 13 rows are filler
    alone = [mechanism(part[None])[0] for part in x[:167].split(cu_seqlens.diff().tolist()) if len(part)]
    packed = mechanism.forward_packed(x, cu_seqlens, 200)
    torch.testing.assert_close(packed[:167], torch.cat(alone), **EXACT)
    assert packed.isfinite().all()


def test_autocast_leaves_the_packed_sum_in_float32():
    mechanism = build("global_mean", Place(d_model=8, num_heads=2, max_len=200))
    x, cu_seqlens = torch.randn(167, 8), torch.tensor([0, 166, 167], dtype=torch.int32)
    with torch.autocast("cpu", torch.bfloat16):
        packed = mechanism.forward_packed(x, cu_seqlens, 200)
        alone = mechanism(x[None, :166])[0]
    torch.testing.assert_close(packed[:166], alone, rtol=0, atol=4e-3)  # one rounding to bfloat16 at most


def test_half_precision_packed_mean_is_of_a_sum_that_float16_could_not_hold():
    x, cu_seqlens = (10 + torch.rand(8000, 6)).half(), torch.tensor([0, 7000, 8000], dtype=torch.int32)
    found = global_mean_packed(x, cu_seqlens)[[0, -1]].double()
    expected = torch.stack([part.double().mean(dim=0) for part in (x[:7000], x[7000:])])
    torch.testing.assert_close(found, expected, rtol=6e-4, atol=0)  # one rounding to float16 at most


def test_it_has_a_value_and_an_output_projection_only():
    names = {
        name for name, _ in build("global_mean", Place(d_model=8, num_heads=2, max_len=9)).named_parameters()
    }
    assert names == {"value.weight", "value.bias", "out.weight", "out.bias"}
