"""The model around a mechanism: layouts agree, options do what they say."""

import dataclasses

import pytest
import torch

from lra.backbone import Backbone, Dropout
from lra.errors import UserError
from lra.layout import Packed, Padded
from lra.schema import BackboneConfig, ModelConfig

LENGTHS = (5, 12, 1, 9)
LENGTH, VOCAB, CLASSES = 12, 11, 3
FILLER = 7


def make(name: str = "softmax", *, documents: int = 1, own: dict | None = None, **backbone) -> Backbone:
    torch.manual_seed(0)
    settings = {"d_model": 16, "d_ff": 24, **backbone}
    model = ModelConfig(name=name, own=own or {}, backbone=BackboneConfig(**settings))
    made = Backbone(model, num_classes=CLASSES, padded_length=LENGTH, vocab_size=VOCAB, documents=documents)
    return made.double().eval()


def padded_batch() -> tuple[torch.Tensor, Padded]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCAB, (len(LENGTHS), LENGTH), generator=generator)
    mask = torch.arange(LENGTH) < torch.tensor(LENGTHS)[:, None]
    return ids * mask, Padded(len(LENGTHS), LENGTH, mask, ids.device)


def packed_batch() -> tuple[torch.Tensor, Packed]:
    ids, layout = padded_batch()
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    rows = torch.cat([ids[layout.mask], torch.full((FILLER,), 3)])
    return rows, Packed(cu_seqlens, len(rows), LENGTH)


OPTIONS = [
    {},
    {"prenorm": False},
    {"norm": "batch"},
    {"norm": "scale"},
    {"norm": "none", "final_norm": False},
    {"positions": "sinusoidal", "scale_embedding": True},
    {"positions": "rotary"},
    {"positions": "none"},
    {"pool": "cls"},
    {"pool": "cls", "cls_layer": -1},
    {"pool": "first"},
    {"pool": "mean_padded"},
    {"pool": "max"},
    {"head_widths": [8, 4], "head_activation": "gelu"},
    {"ffn": "glu", "activation": "silu"},
    {"ffn": "none"},
    {"tied_layers": True, "num_layers": 3},
    {"init": "xavier", "bias": False, "d_head": 6},
]


@pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()) or "default"
)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_packed_and_padded_layouts_give_the_same_logits_and_gradients(options, training):
    packed_model, padded_model = make(**options).train(training), make(**options).train(training)
    packed, padded = packed_model(*packed_batch()), padded_model(*padded_batch())
    torch.testing.assert_close(packed, padded)
    packed.square().sum().backward()
    padded.square().sum().backward()
    for (name, one), other in zip(packed_model.named_parameters(), padded_model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", ["linear", "luna", "nystrom", "fnet", "identity"])
def test_layouts_agree_for_mechanisms_with_and_without_a_packed_path(name):
    torch.testing.assert_close(make(name)(*packed_batch()), make(name)(*padded_batch()))


def test_filler_rows_reach_nothing():
    model = make(norm="batch").train()
    ids, layout = packed_batch()
    other = ids.clone()
    other[-FILLER:] = 9
    torch.testing.assert_close(model(ids, layout), model(other, layout), rtol=0, atol=0)


def test_full_rows_packed_equal_the_padded_batch_without_mask():
    ids = torch.randint(1, VOCAB, (3, LENGTH))
    cu_seqlens = torch.arange(4, dtype=torch.int32) * LENGTH
    full = make(pool="cls")(ids.flatten(), Packed(cu_seqlens, ids.numel(), LENGTH, full=True))
    padded = make(pool="cls")(ids, Padded(3, LENGTH, None, ids.device))
    torch.testing.assert_close(full, padded)


def test_batch_norm_over_all_positions_differs_from_real_ones_on_a_padded_batch():
    real, every = make(norm="batch").train(), make(norm="batch", norm_stats="all").train()
    assert not torch.allclose(real(*padded_batch()), every(*padded_batch()))


def test_mean_over_padded_length_is_the_mean_scaled_by_the_share_of_real_tokens():
    x = torch.randn(len(LENGTHS), LENGTH, 4, dtype=torch.double)
    layout = padded_batch()[1]
    share = torch.tensor(LENGTHS, dtype=torch.double)[:, None] / LENGTH
    torch.testing.assert_close(layout.pool(x, "mean_padded"), layout.pool(x, "mean") * share)


def test_mean_over_all_positions_counts_padding():
    x = torch.ones(len(LENGTHS), LENGTH, 4) * (~padded_batch()[1].mask[..., None])
    assert padded_batch()[1].pool(x, "mean_all")[2, 0] == pytest.approx(11 / 12)


def test_tied_layers_share_their_parameters():
    def count(**options):
        return sum(p.numel() for p in make(**options).parameters())

    assert count(num_layers=1) == count(num_layers=3, tied_layers=True) < count(num_layers=3)


@pytest.mark.parametrize(("num_layers", "cls_layer"), [(1, 0), (1, -1), (2, 0), (2, 1), (2, -1), (3, 1)])
def test_the_class_token_is_read_wherever_it_is_put_in(num_layers, cls_layer):
    model = make(pool="cls", num_layers=num_layers, cls_layer=cls_layer)
    model(*packed_batch()).sum().backward()
    assert model.embedding.cls.grad.abs().sum() > 0


@pytest.mark.parametrize(("pair", "factor"), [("concat", 2), ("swapped", 2), ("nli", 4)])
def test_two_documents_are_joined_before_the_head(pair, factor):
    model = make(documents=2, pair=pair)
    assert model.head.layers[0].in_features == 16 * factor
    pooled = torch.randn(4, 16, dtype=torch.double)  # rows of documents: (a1, a2, b1, b2)
    first, second = pooled[0::2], pooled[1::2]
    joined = {
        "concat": torch.cat([first, second], -1),
        "swapped": torch.cat([second, first], -1),
        "nli": torch.cat([first, second, first * second, first - second], -1),
    }[pair]
    torch.testing.assert_close(model.head(pooled), model.head.layers(joined))


def test_continuous_input_goes_through_a_linear_map():
    model = ModelConfig(name="softmax", backbone=BackboneConfig(d_model=16))
    backbone = Backbone(model, num_classes=CLASSES, padded_length=LENGTH, channels=1)
    assert backbone(torch.randn(2, LENGTH, 1), Padded(2, LENGTH, None, torch.device("cpu"))).shape == (
        2,
        CLASSES,
    )


def test_tied_dropout_uses_one_mask_for_all_positions_of_a_sequence():
    torch.manual_seed(0)
    ids, layout = packed_batch()
    kept = Dropout(0.5, kind="tied").train()(torch.ones(len(ids), 8), layout)
    for start, stop in zip(layout.cu_seqlens[:-1], layout.cu_seqlens[1:], strict=True):
        assert (kept[start:stop] == kept[start]).all()
    assert set(kept.unique().tolist()) == {0.0, 2.0}


def test_drop_path_drops_whole_sequences():
    torch.manual_seed(0)
    x = Dropout(0.0, drop_path=0.5).train()(
        torch.ones(64, LENGTH, 4), Padded(64, LENGTH, None, torch.device("cpu"))
    )
    per_sequence = x.flatten(1)
    assert ((per_sequence == 0).all(1) | (per_sequence == 2).all(1)).all()
    assert 10 < (per_sequence[:, 0] == 0).sum() < 54


def test_rotary_positions_need_queries_and_keys():
    with pytest.raises(UserError, match="whose queries and keys do not rotate"):
        make("fnet", positions="rotary")


def test_rotary_scores_depend_on_the_distance_alone():
    from models.common import rotate

    q, k = torch.randn(2, 1, 8, dtype=torch.double)

    def score(i: int, j: int) -> torch.Tensor:
        return (rotate(q, torch.tensor([i]), base=1e4) * rotate(k, torch.tensor([j]), base=1e4)).sum()

    torch.testing.assert_close(score(3, 1), score(10, 8))
    assert not torch.allclose(score(3, 1), score(3, 2))


def test_a_mechanism_gets_the_backbone_settings_its_constructor_names():
    model = make("softmax", attn_dropout=0.25)
    assert model.mechanisms()[0].attn_dropout.p == 0.25
    assert "attn_dropout" not in {f.name for f in dataclasses.fields(type(model.mechanisms()[0].place))}


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(UserError, match="equal heads"):
        make(d_model=16, num_heads=3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["softmax", "linear", "performer", "local", "luna", "global_mean"])
def test_filler_rows_reach_neither_outputs_nor_gradients_in_half_precision(name, dtype):
    """The variable-length kernel leaves rows it was not given unwritten; memory is poisoned to show it."""
    poison = torch.full((1 << 24,), float("nan"), device="cuda")
    del poison
    ids, layout = packed_batch()
    gradients = []
    for rows in (len(ids) - FILLER, len(ids)):
        model = make(name).float().cuda().train()
        on_card = Packed(layout.cu_seqlens.cuda(), rows, LENGTH)
        with torch.autocast("cuda", dtype=dtype):
            model(ids[:rows].cuda(), on_card).float().square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for n, gradient in gradients[0].items():
        assert torch.isfinite(gradients[1][n]).all(), n
        scale = gradient.abs().max().item()
        torch.testing.assert_close(gradient, gradients[1][n], rtol=0, atol=2e-2 * scale + 1e-6, msg=n)


def test_the_maximum_over_a_row_of_padding_is_zero():
    x = torch.randn(2, 3, 4, requires_grad=True)
    layout = Padded(2, 3, torch.tensor([[True, True, False], [False] * 3]), x.device)
    pooled = layout.pool(x, "max")
    pooled.sum().backward()
    assert torch.equal(pooled[0], x[0, :2].amax(0)) and not pooled[1].any()
    assert x.grad.isfinite().all() and not x.grad[1].any()
