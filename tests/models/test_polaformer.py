"""PolaFormer: signs, powers, halves, convolution and gate, one by one."""

import math

import pytest
import torch

from models import Place, build
from models.polaformer import polar, polar_attention, short_convolution, short_convolution_packed

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding
PLACE = Place(d_model=8, num_heads=2, max_len=40)
ONES = torch.ones(2, 4, dtype=torch.float64)


def qkv(length=13, d=4):
    return torch.randn(3, 2, 2, length, d, dtype=torch.float64).unbind(0)


def test_positive_and_negative_parts_are_kept_apart():
    x = torch.tensor([[2.0, -3.0]]).double()[None]
    one = torch.ones(1, 2, dtype=torch.float64)
    assert polar(x, one, 2 * one).tolist() == [[[4.0, 0.0, 0.0, 9.0]]]
    assert polar(x, 2 * one, one).tolist() == [[[1.0, 0.0, 0.0, 1.5]]]


def test_the_first_half_of_values_follows_equal_signs_and_the_second_opposite_ones():
    q = torch.tensor([1.0, 1.0]).double().view(1, 1, 1, 2)
    k = torch.tensor([[1.0, 1.0], [-1.0, -1.0]]).double().view(1, 1, 2, 2)
    v = torch.tensor([[10.0, 10.0], [20.0, 20.0]]).double().view(1, 1, 2, 2)
    found = polar_attention(q, k, v, scale=ONES[:1, :2], power=ONES[:1, :2], eps=1e-15)
    torch.testing.assert_close(found.flatten(), torch.tensor([10.0, 20.0]).double(), **EXACT)


def test_a_higher_power_spikes_the_weights():
    q, k = torch.ones(1, 1, 1, 2).double(), torch.tensor([[1.0, 1.0], [2.0, 2.0]]).double().view(1, 1, 2, 2)
    v = torch.tensor([[0.0, 0.0], [1.0, 1.0]]).double().view(1, 1, 2, 2)
    for power, weight in [(1, 2 / 3), (3, 8 / 9)]:
        found = polar_attention(q, k, v, scale=ONES[:1, :2], power=power * ONES[:1, :2], eps=1e-15)
        assert found[0, 0, 0, 0].item() == pytest.approx(weight)


def test_powers_start_in_the_middle_of_1_and_1_plus_alpha_and_scales_at_log_2():
    options = build("polaformer", PLACE, alpha=6.0).options
    torch.testing.assert_close(options["power"], torch.full((2, 4), 4.0))
    torch.testing.assert_close(options["scale"], torch.full((2, 4), 2.0).log())


def test_eps_is_added_to_the_mean_of_weights_over_real_keys():
    q, k = (torch.full((1, 1, 3, 2), 0.1, dtype=torch.float64) for _ in range(2))
    v = torch.ones(1, 1, 3, 2, dtype=torch.float64)
    mask = torch.tensor([[True, True, False]])
    found = polar_attention(q, k, v, mask, scale=ONES[:1, :2], power=ONES[:1, :2], eps=0.01)
    assert found[0, 0, 0, 0].item() == pytest.approx(0.02 / (0.02 + 0.01))  # each weight is 2 * 0.1 * 0.1


def test_the_convolution_is_torch_s_depthwise_one_shared_by_heads():
    _, _, v = qkv()
    weight, bias = torch.randn(5, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    rows = v.flatten(0, 1).mT
    expected = torch.nn.functional.conv1d(rows, weight.T[:, None], bias, padding=2, groups=4)
    torch.testing.assert_close(short_convolution(v, weight, bias), expected.mT.view_as(v), **EXACT)


def test_padding_enters_the_convolution_as_zeros():
    _, _, v = qkv()
    weight, bias = torch.randn(5, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    mask = (torch.arange(13) < 9).expand(2, 13)
    found = short_convolution(v, weight, bias, mask)[:, :, :9]
    torch.testing.assert_close(found, short_convolution(v[:, :, :9], weight, bias), **EXACT)


def test_the_gate_multiplies_what_is_mixed_before_the_last_projection():
    mixer = build("polaformer", PLACE, kernel_size=0).double()
    x = torch.randn(2, 13, 8, dtype=torch.float64)
    q, k, v = (part.transpose(1, 2) for part in mixer.qkv(x).unflatten(-1, (3, 2, 4)).unbind(2))
    mixed = polar_attention(q, k, v, **mixer.options).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mixer(x), mixer.out(mixed * mixer.gate(x)), **EXACT)


def test_only_a_convolution_over_neighbours_makes_order_matter():
    claims = {size: build("polaformer", PLACE, kernel_size=size).traits.uses_order for size in (0, 1, 3)}
    assert claims == {0: False, 1: False, 3: True}


@pytest.mark.parametrize("kernel_size", [0, 5])
def test_row_without_real_keys_gives_zeros_and_finite_gradients(kernel_size):
    mixer = build("polaformer", PLACE, kernel_size=kernel_size)
    x, mask = torch.randn(2, 13, 8, requires_grad=True), torch.tensor([[True] * 13, [False] * 13])
    q, k, v = (part.transpose(1, 2) for part in mixer.qkv(x).unflatten(-1, (3, 2, 4)).unbind(2))
    mixed = mixer.attend(q, k, v, mask)
    assert mixed[0].any() and not mixed[1].any()
    out = mixer(x, mask)
    out.square().sum().backward()
    assert all(t.isfinite().all() for t in (out, x.grad, *(p.grad for p in mixer.parameters())))


def test_scales_have_a_floor_so_that_powers_stay_finite():
    mixer = build("polaformer", PLACE)
    with torch.no_grad():
        mixer.scale.fill_(-20.0)
    torch.testing.assert_close(mixer.options["scale"], torch.full((2, 4), 0.01))
    x = torch.randn(2, 40, 8, requires_grad=True)
    out = mixer(x)
    out.square().sum().backward()
    assert all(t.isfinite().all() for t in (out, x.grad, *(p.grad for p in mixer.parameters())))


def test_filler_rows_reach_no_real_row_through_the_convolution_even_if_they_are_not_numbers():
    v, weight, bias = torch.randn(9, 2, 4), torch.randn(5, 4, requires_grad=True), torch.randn(4)
    cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32)
    clean = short_convolution_packed(v, weight, bias, cu_seqlens)
    v[7:] = math.nan
    found = short_convolution_packed(v, weight, bias, cu_seqlens)
    assert torch.equal(found, clean) and not found[7:].any()
    found[:7].sum().backward()
    assert weight.grad.isfinite().all()


def test_zero_queries_and_keys_have_finite_gradients_by_the_power_too():
    q, k, power = torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2), torch.full((1, 2), 3.0)
    leaves = [x.requires_grad_() for x in (q, k, power)]
    polar_attention(q, k, torch.ones(1, 1, 3, 2), scale=torch.ones(1, 2), power=power).sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves)


@pytest.mark.parametrize("own", [{}, {"kernel_size": 7, "gate": False}])
def test_packed_path_equals_each_sequence_alone(own):
    mechanism = build("polaformer", PLACE, **own).double()
    x = torch.randn(20, 8, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 5, 5, 6, 20], dtype=torch.int32)
    alone = torch.cat([mechanism(part[None])[0] for part in x.split([5, 1, 14])])
    torch.testing.assert_close(mechanism.forward_packed(x, cu_seqlens, 40), alone, **EXACT)


@pytest.mark.parametrize(
    "own",
    [
        *({"alpha": value} for value in (-1.0, 0.0, math.nan, math.inf)),
        *({"eps": value} for value in (0.0, math.nan, math.inf)),
        *({"kernel_size": value} for value in (4, -1, 5.0)),
    ],
)
def test_values_that_make_no_sense_are_refused(own):
    with pytest.raises(ValueError, match="polaformer needs"):
        build("polaformer", PLACE, **own)


def test_an_odd_head_width_is_refused():
    with pytest.raises(ValueError, match="got an odd head width 3"):
        build("polaformer", Place(d_model=6, num_heads=2, max_len=40))
