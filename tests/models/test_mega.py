"""Mega: rows of scores, chunks, biases, how it starts, and what is its own in a layer."""

import pytest
import torch

from models import Place, build, mega
from models.mega import MovingAverage, mega_attention, moving_average

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 rounding
PLACE = Place(d_model=16, num_heads=2, max_len=20)
MASK = torch.arange(13) < torch.tensor([13, 4])[:, None]


def parts(length=13):
    return [torch.randn(2, length, width, dtype=torch.float64) for width in (6, 6, 10)]


@pytest.mark.parametrize("chunk", [None, 8])
@pytest.mark.parametrize("function", ["softmax", "relu2", "laplace"])
def test_how_many_rows_are_made_at_a_time_changes_nothing(monkeypatch, function, chunk):
    leaves = [x.requires_grad_() for x in (*parts(), torch.randn(39, dtype=torch.float64))]

    def run():
        *qkv, table = leaves
        out = mega_attention(*qkv, MASK, function=function, table=table, chunk=chunk)
        return out, torch.autograd.grad(out.square().sum(), leaves)

    whole, grads = run()
    monkeypatch.setattr(mega, "ROWS", 3)
    found, found_grads = run()
    torch.testing.assert_close(found, whole, **EXACT)
    for grad, found_grad in zip(grads, found_grads, strict=True):
        torch.testing.assert_close(found_grad, grad, **EXACT)
    monkeypatch.setattr(mega, "SCORES", 1)  # a row of every chunk at a time
    torch.testing.assert_close(run()[0], whole, **EXACT)


def kept(own, length):
    """Bytes that a layer keeps for its gradients."""
    layer, sizes = build("mega", Place(d_model=8, num_heads=1, max_len=2048), **own), {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t,
        lambda t: t,
    ):
        layer(torch.randn(1, length, 8, requires_grad=True), None, None)
    return sum(sizes.values())


@pytest.mark.parametrize(
    "own", [{}, {"attention": "laplace"}, {"position_bias": "rotary"}, {"chunk": 128}], ids=str
)
def test_what_is_kept_for_gradients_grows_with_the_length_and_not_its_square(own):
    assert kept(own, 2048) < 2.1 * kept(own, 1024)
    assert not build("mega", PLACE, **own).traits.quadratic_memory


@pytest.mark.parametrize("position_bias", ["simple", "rotary"])  # in rows, by torch's kernel
def test_attention_dropout_keeps_scores_without_chunks_and_says_so(position_bias):
    own = {"attn_dropout": 0.1, "position_bias": position_bias}
    assert kept(own, 1024) > 3 * kept(own, 512)
    assert "quadratic_memory" in build("mega", PLACE, **own).traits.exceptions()
    assert kept(own | {"chunk": 128}, 1024) < 2.1 * kept(own | {"chunk": 128}, 512)
    assert not build("mega", PLACE, **own, chunk=128).traits.quadratic_memory


def test_tokens_attend_within_their_chunk():
    q, k, v = parts()
    out = mega_attention(q, k, v.requires_grad_(), chunk=5)
    (reached,) = torch.autograd.grad(out[0, 5:10].sum(), v)
    seen = reached[0].abs().sum(dim=-1) > 0
    assert seen.tolist() == [False] * 5 + [True] * 5 + [False] * 3


@pytest.mark.parametrize("function", ["softmax", "laplace"])
def test_a_chunk_as_long_as_the_sequence_is_full_attention(function):
    q, k, v = parts()
    table = torch.randn(39, dtype=torch.float64)
    expected = mega_attention(q, k, v, MASK, function=function, table=table)
    found = mega_attention(q, k, v, MASK, function=function, table=table, chunk=20)
    torch.testing.assert_close(found, expected, **EXACT)


def test_element_wise_attention_divides_by_the_real_keys_of_the_chunk():
    q, k, v = parts()
    found = mega_attention(q, k, v, MASK, function="relu2", chunk=3)[1]
    for at, count in ((slice(0, 3), 3), (slice(3, 4), 1)):
        expected = (q[1, at] @ k[1, at].T / count).relu() ** 2 @ v[1, at]
        torch.testing.assert_close(found[at], expected, **EXACT)


@pytest.mark.parametrize("function", ["softmax", "relu2", "laplace"])
def test_a_chunk_of_padding_gives_zeros(function):
    out = mega_attention(*parts(), MASK, function=function, table=torch.ones(9).double(), chunk=5)
    assert out[1, :4].any() and not out[1, 5:].any()


def test_the_bias_of_a_key_is_that_of_its_offset_after_the_query():
    q = torch.zeros(1, 4, 6, dtype=torch.float64)
    table = torch.arange(-5.0, 6.0, dtype=torch.float64)  # the table of a longer limit
    weights = mega_attention(q, q, torch.eye(4, dtype=torch.float64)[None], function="relu2", table=table)
    positions = torch.arange(4.0, dtype=torch.float64)
    torch.testing.assert_close(weights[0], (positions - positions[:, None]).relu() ** 2, **EXACT)


@pytest.mark.parametrize(("truncation", "reach"), [(None, 6), (3, 2), (1, 0)])
def test_the_average_looks_as_far_as_its_truncation_and_counts_the_token_once_in_each_direction(
    truncation, reach
):
    average = MovingAverage(2, 3, truncation).double()
    one = torch.zeros(1, 13, 2, dtype=torch.float64)
    one[:, 6] = 1.0
    parameters = (average.alpha, average.delta, average.beta, average.gamma)
    found = moving_average(one, *parameters, truncation=truncation)[0]
    assert (found.abs().sum(dim=-1) > 1e-9).nonzero().flatten().tolist() == [*range(6 - reach, 7 + reach)]
    share = average.alpha.sigmoid()
    each = (share * average.beta * average.gamma).sum(dim=-1) / 3**0.5  # [2 d]
    torch.testing.assert_close(found[6], each.sum(dim=0), **EXACT)
    if reach:
        factor = 1 - share * average.delta.sigmoid()
        next_each = (share * average.beta * average.gamma * factor).sum(dim=-1) / 3**0.5
        torch.testing.assert_close(found[[7, 5]], next_each, **EXACT)


def test_parameters_start_as_published():
    gated = build("mega", Place(d_model=256, num_heads=1, max_len=2000)).gated
    average = gated.average
    for values, std in (
        (average.alpha, 0.2),
        (average.delta, 0.2),
        (average.gamma, 1.0),
        (average.omega, 1.0),
        (gated.value.weight, 0.02),
        (gated.hidden.weight, 0.02),
        (gated.out.weight, 0.02),
        (gated.gain, 0.02),
        (gated.table, 0.02),
    ):
        assert values.std().item() == pytest.approx(std, rel=0.3)
        assert abs(values.mean().item()) < 0.35 * std
    signs = torch.tensor([1.0, -1.0] * 8)
    assert (average.beta - signs).std().item() == pytest.approx(0.02, rel=0.2)
    assert not any(x.any() for x in (gated.value.bias, gated.hidden.bias, gated.out.bias, gated.offset))
    ffn = build("mega", PLACE).ffn
    assert ffn.up.weight.std().item() == pytest.approx(0.02, rel=0.3) and not ffn.down.bias.any()


def test_no_parameter_has_a_learning_rate_or_a_decay_of_its_own_as_in_the_released_code():
    for parameter in build("mega", PLACE).parameters():
        assert not hasattr(parameter, "lr_scale") and not hasattr(parameter, "no_weight_decay")


@pytest.mark.parametrize("norm", ["layer", "scale"])
def test_a_closed_update_gate_leaves_the_input_itself_also_where_the_norm_comes_first(norm):
    block = build("mega", PLACE, prenorm=True, norm=norm)
    block.gated.hidden.weight.data[:16], block.gated.hidden.bias.data[:16] = 0, -1e4
    block.ffn.down.weight.data.zero_()
    x = torch.randn(2, 13, 16)
    out, carry = block(x, MASK, None)
    assert torch.equal(out, x) and carry is None


DROPOUTS = ("dropout", "attn_dropout", "act_dropout")


def output(name, own, training=False, seed=0):
    """What a layer of fixed parameters makes of a fixed input, dropout drawn from `seed`."""
    torch.manual_seed(1)
    layer, x = build(name, PLACE, **own).train(training), torch.randn(2, 13, 16)
    with torch.no_grad():  # larger than at the start, so that what attention gives shows in the output
        layer.gated.value.weight.mul_(50)
        layer.gated.out.weight.mul_(50)
    torch.manual_seed(seed)
    return layer(x, MASK, None)[0][MASK] if name == "mega" else layer(x, MASK)[MASK]


@pytest.mark.parametrize("position_bias", ["simple", "rotary"])
@pytest.mark.parametrize("name", ["mega", "mega_mixer"])
def test_dropouts_change_training_each_by_itself_and_no_evaluation(name, position_bias):
    own = {"position_bias": position_bias}
    without = output(name, own)
    for dropouts in (DROPOUTS, *((one,) for one in DROPOUTS)):
        some = own | dict.fromkeys(dropouts, 0.3)
        for seed in (0, 1):
            assert torch.equal(output(name, some, seed=seed), without)
        trained = [output(name, some, training=True, seed=seed) for seed in (0, 1)]
        assert (trained[0] - trained[1]).abs().max() > 1e-3
    assert torch.equal(output(name, own, training=True), without)


def all_dropped(**own):
    """A block that drops with probability 1 in training, its biases far from zero, and its inputs."""
    block = build("mega", PLACE, norm="none", **own).train()
    for bias in (block.gated.hidden.bias, block.gated.out.bias, block.ffn.down.bias):
        bias.data.normal_()
    return block, torch.randn(2, 13, 16)


@pytest.mark.parametrize("prenorm", [True, False])
def test_dropout_is_of_the_average_the_candidate_and_the_feed_forward(prenorm):
    block, x = all_dropped(dropout=1.0, prenorm=prenorm)
    update = block.gated.hidden.bias[:16].sigmoid()  # of an average that is zero
    torch.testing.assert_close(block(x, MASK, None)[0], x - update * x, rtol=0, atol=1e-6)


def test_act_dropout_is_of_the_values_and_of_the_hidden_feed_forward():
    block, x = all_dropped(act_dropout=1.0)
    candidate = block.gated.hidden(block.gated.average(x, None))[..., -16:] + block.gated.out.bias
    torch.testing.assert_close(block.gated(x, None)[1], torch.nn.functional.silu(candidate))
    torch.testing.assert_close(block.ffn(x), block.ffn.down.bias.expand_as(x))


@pytest.mark.parametrize("prenorm", [True, False])
def test_statistics_of_a_batch_norm_leave_padding_out(prenorm):
    block, x = build("mega", PLACE, norm="batch", prenorm=prenorm).train(), torch.randn(2, 13, 16)
    poisoned = torch.where(MASK[..., None], x, 1e4)
    out, other = (block(inputs, MASK, None)[0][MASK] for inputs in (x, poisoned))
    torch.testing.assert_close(other, out, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["mega", "mega_mixer"])
def test_a_sequence_longer_than_the_table_of_biases_is_refused(name):
    x = torch.randn(1, 21, 16)
    arguments = (x, None, None) if name == "mega" else (x, None)
    with pytest.raises(ValueError, match="biases for at most 20 positions and got 21"):
        build(name, PLACE)(*arguments)
    for own in ({"chunk": 8}, {"position_bias": "rotary"}):
        build(name, PLACE, **own)(*arguments)


def test_weights_are_of_one_length_only_with_a_table_and_no_chunks():
    assert "fixed_length" in build("mega", PLACE).traits.exceptions()
    assert not build("mega", PLACE, chunk=8).traits.exceptions()
    assert not build("mega", PLACE, position_bias="rotary").traits.exceptions()
    assert build("mega", PLACE, chunk=8).gated.table.shape == (15,)


def test_state_is_what_attention_keeps_and_the_states_of_the_average():
    assert build("mega", PLACE, key_width=6, d_state=3).state_size(20) == 20 * (6 + 32) + 2 * 16 * 3
    assert build("mega", PLACE, key_width=6, d_state=3, chunk=8).state_size(20) == 8 * (6 + 32) + 2 * 16 * 3


def test_feed_forward_is_as_wide_as_the_gate_if_nothing_else_is_said():
    assert build("mega", PLACE).ffn.up.weight.shape == (32, 16)
    assert build("mega", PLACE, d_ff=5).ffn.up.weight.shape == (5, 16)


@pytest.mark.parametrize("name", ["mega", "mega_mixer"])
@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"key_width": 0}, "key_width of at least 1, got key_width=0"),
        ({"chunk": 0, "truncation": -1}, "chunk, truncation of at least 1, got chunk=0, truncation=-1"),
        ({"attention": "relu"}, "softmax, relu2, laplace"),
        ({"position_bias": "t5"}, "simple, rotary"),
        ({"key_width": 5, "position_bias": "rotary"}, "needs an even key_width, got 5"),
    ],
)
def test_values_that_make_no_sense_are_refused(name, own, message):
    with pytest.raises(ValueError, match=message):
        build(name, PLACE, **own)
