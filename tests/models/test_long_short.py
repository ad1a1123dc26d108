"""Transformer-LS: what a query sees, the projection over positions, the two norms and the order of them."""

import pytest
import torch
import torch.nn.functional as F

from models import Place, build
from models.common import dense_attention
from models.long_short import long_short_attention

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding
PLACE = Place(d_model=16, num_heads=2, max_len=60)


def qkv(length=24):
    return torch.randn(3, 2, 2, length, 8, dtype=torch.float64).unbind(0)


def layer(**own):
    module = build("long_short", PLACE, **own).double().eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


@pytest.mark.parametrize(("window", "around"), [(1, 1), (2, 1), (5, 2), (6, 3), (8, 4)])
def test_a_query_sees_its_segment_and_half_a_window_on_each_side(window, around):
    q, k, v = qkv()
    before = long_short_attention(q, k, v, None, window=window)
    for key in (0, 7, 16, 23):
        other = v.clone()
        other[:, :, key] += 1.0
        moved = (long_short_attention(q, k, other, None, window=window) - before).abs().amax(dim=(0, 1, 3))
        starts = [i // window * window for i in range(24)]
        expected = [i for i, s in enumerate(starts) if s - around <= key < s + window + around]
        assert (moved > 1e-9).nonzero().flatten().tolist() == expected


def test_projection_weighs_positions_and_leaves_padding_out():
    q, k, v = qkv()
    projection, mask = torch.zeros(2, 2, 24, 1).double(), torch.rand(2, 24) < 0.5
    mask[:, 0] = True
    found = long_short_attention(q, k, v, projection, mask, window=0)
    for b in range(2):  # one landmark is all there is to see: the mean of the real values
        expected = v[b][:, mask[b]].mean(dim=1, keepdim=True).expand(2, int(mask[b].sum()), 8)
        torch.testing.assert_close(found[b][:, mask[b]], expected, **EXACT)


def test_one_softmax_goes_over_landmarks_and_nearby_tokens_together():
    q, k, v = qkv(4)
    projection = torch.randn(2, 2, 4, 3, dtype=torch.float64)
    far = [projection.softmax(dim=2).mT @ x for x in (k, v)]
    weights = (q @ torch.cat([far[0], k], dim=2).mT / 8**0.5).softmax(dim=-1)
    expected = weights @ torch.cat([far[1], v], dim=2)
    torch.testing.assert_close(long_short_attention(q, k, v, projection, window=4), expected, **EXACT)


def test_norms_are_of_all_heads_of_a_token_together():
    module, x = layer(num_landmarks=0, window=60), torch.randn(2, 9, 16, dtype=torch.float64)
    q, k, v = module.qkv(x).chunk(3, dim=-1)
    k, v = (F.layer_norm(t, (16,), module.norm_near.weight, module.norm_near.bias) for t in (k, v))
    heads = [t.unflatten(-1, (2, 8)).transpose(1, 2) for t in (q, k, v)]
    expected = module.out(dense_attention(*heads).transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(x), expected, **EXACT)


def test_norm_before_projection_compresses_what_the_near_norm_made():
    """The released file: K = LN_l(W_k x), then LN_s(P^T K)."""
    module, x = layer(num_landmarks=3, window=0, norm_before_projection=True), torch.randn(2, 9, 16).double()
    q, k, v = module.qkv(x).chunk(3, dim=-1)
    p = module.projection(x).softmax(dim=1).unflatten(-1, (2, 3))  # [b l h r]
    norms = module.norm_near, module.norm_far
    k, v = (F.layer_norm(t, (16,), norms[0].weight, norms[0].bias).unflatten(-1, (2, 8)) for t in (k, v))
    far = [torch.einsum("blhr,blhd->brhd", p, t).flatten(2) for t in (k, v)]
    far = [F.layer_norm(t, (16,), norms[1].weight, norms[1].bias).unflatten(-1, (2, 8)) for t in far]
    heads = [q.unflatten(-1, (2, 8)).transpose(1, 2), *(t.transpose(1, 2) for t in far)]
    expected = module.out(dense_attention(*heads).transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(x), expected, **EXACT)


def test_a_bias_of_the_projection_would_cancel():
    q, k, v = qkv()
    projection = torch.randn(2, 2, 24, 3, dtype=torch.float64)
    found = long_short_attention(q, k, v, projection + torch.randn(3).double(), window=4)
    torch.testing.assert_close(found, long_short_attention(q, k, v, projection, window=4), **EXACT)
    assert layer().projection.bias is None


@pytest.mark.parametrize(
    ("own", "missing"),
    [
        ({"window": 0}, {"norm_near"}),
        ({"num_landmarks": 0}, {"norm_far", "projection"}),
        ({"dual_norm": False}, {"norm_near", "norm_far"}),
        ({"window": 0, "norm_before_projection": True}, set()),
    ],
)
def test_parameters_that_nothing_would_read_are_not_there(own, missing):
    module = build("long_short", PLACE, **own)
    assert {n for n in ("projection", "norm_near", "norm_far") if getattr(module, n) is None} == missing


def test_both_norms_get_eps():
    module = build("long_short", PLACE, eps=0.01)
    assert module.norm_near.eps == module.norm_far.eps == 0.01


def test_without_a_window_tokens_have_no_order():
    assert not build("long_short", PLACE, window=0).traits.uses_order
    assert build("long_short", PLACE).traits.uses_order


def test_autocast_leaves_weights_and_sums_in_float32():
    q, k, v = (x.float() for x in qkv())
    projection = 3 * torch.randn(2, 2, 24, 5)
    with torch.autocast("cpu", torch.bfloat16):
        found = long_short_attention(q, k, v, projection, window=4)
    expected = long_short_attention(q, k, v, projection, window=4)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_state_is_landmarks_and_the_nearby_tokens_of_one_segment():
    module = layer(num_landmarks=3, window=6)
    assert module.state_size(60) == 2 * (3 + 6 + 2 * 3) * 16
    assert module.state_size(5) == 2 * (3 + 5) * 16
    assert layer(num_landmarks=3, window=0).state_size(60) == 2 * 3 * 16


@pytest.mark.parametrize("num_landmarks", [0, 2])
def test_row_without_real_tokens_gives_zeros_whatever_its_norms_add(num_landmarks):
    q, k, v = qkv()
    norms = layer(num_landmarks=2).norm_near, layer(num_landmarks=2).norm_far
    projection = torch.randn(2, 2, 24, 2).double() if num_landmarks else None
    mask = torch.tensor([[True] * 24, [False] * 24])
    options = {"window": 4, "norm_near": norms[0], "norm_far": norms[1]}
    assert not long_short_attention(q, k, v, projection, mask, **options)[1].any()


@pytest.mark.parametrize("window", [0, 3])
def test_row_without_real_keys_gives_zeros_and_finite_gradients(window):
    q, k, v = (x.float().requires_grad_() for x in qkv())
    projection = torch.randn(2, 2, 24, 3, requires_grad=True)
    mask = torch.tensor([[True] * 24, [False] * 24])
    out = long_short_attention(q, k, v, projection, mask, window=window)
    assert not out[1].any()
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v, projection))


def test_gradcheck():
    mask = torch.arange(7) < torch.tensor([7, 2])[:, None]
    leaves = [x[..., :3].clone().requires_grad_() for x in (*qkv(7), torch.randn(2, 2, 7, 3).double())]
    norms = [torch.nn.LayerNorm(6).double() for _ in range(2)]

    def attend(q, k, v, p):
        return long_short_attention(q, k, v, p, mask, window=2, norm_near=norms[0], norm_far=norms[1])

    assert torch.autograd.gradcheck(attend, leaves, fast_mode=True)


@pytest.mark.parametrize(
    ("own", "told"),
    [
        ({"num_landmarks": 0, "window": 0}, "not both 0"),
        ({"num_landmarks": -1}, "num_landmarks=-1"),
        ({"window": -2}, "window=-2"),
        ({"eps": 0.0}, "eps=0.0"),
        ({"eps": float("nan")}, "finite eps > 0; got .*eps=nan"),
        ({"eps": float("inf")}, "eps=inf"),
        ({"eps": 1e-2, "dual_norm": False}, "eps=0.01 of long_short needs dual_norm=True"),
        ({"norm_before_projection": True, "dual_norm": False}, "needs dual_norm=True"),
        ({"norm_before_projection": True, "num_landmarks": 0}, "num_landmarks >= 1"),
    ],
)
def test_values_that_make_no_sense_are_refused(own, told):
    with pytest.raises(ValueError, match=told):
        build("long_short", PLACE, **own)
