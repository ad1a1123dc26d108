"""Adam on one flat buffer against torch's own optimizers, clipping and loss scaler."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lra import checkpoint, optimizer
from lra.optimizer import Adam
from lra.schema import TrainConfig

CPU = torch.device("cpu")
CLOSE = {"rtol": 2e-6, "atol": 1e-6}  # float32 rounding of 50 steps, whose operations come in another order


class Few(nn.Module):
    """Parameters of awkward sizes, a complex one, and one that no loss depends on."""

    def __init__(self, *, complex_too: bool = True) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(5, 13))
        self.odd = nn.Parameter(torch.randn(67))
        self.scalar = nn.Parameter(torch.randn(()))
        self.unused = nn.Parameter(torch.randn(3))
        if complex_too:
            self.turned = nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))


def adam(model: nn.Module, **settings) -> Adam:
    return Adam(model, TrainConfig(**{"lr": 1e-2, "eps": 1e-6, **settings}), CPU)


def gradients(model: nn.Module, step: int) -> list[Tensor | None]:
    """Those of step `step`, from small to large over the steps; None for what is not used."""
    generator = torch.Generator().manual_seed(step)
    return [
        None if name == "unused" else torch.randn(p.shape, dtype=p.dtype, generator=generator) * 1.1**step
        for name, p in model.named_parameters()
    ]


def reference(model: nn.Module, made: Adam, **of_tag) -> torch.optim.Optimizer:
    """torch's optimizer of the same settings, one group per parameter."""
    config = made.config
    cls = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    groups = [
        {"params": [p], "weight_decay": config.weight_decay, "share": 1.0, **of_tag.get(name, {})}
        for name, p in model.named_parameters()
    ]
    return cls(groups, lr=config.lr, betas=tuple(config.betas), eps=config.eps)


def follow(model: nn.Module, made: Adam, theirs: nn.Module, torchs, *, steps: int = 50, clip=None) -> None:
    """Both take the same steps, of a learning rate and a first beta that move; then they must be equal.

    A parameter without a gradient counts here as one whose gradient is zero.
    """
    start = {name: p.detach().clone() for name, p in theirs.named_parameters()}
    for step in range(steps):
        lr, beta1 = 1e-2 * (1 - step / 60), 0.95 - 0.002 * step
        drawn = gradients(model, step)
        made.set_rates(lr, beta1)
        made.collect(drawn)
        made.step()
        for p, gradient in zip(theirs.parameters(), drawn, strict=True):
            p.grad = torch.zeros_like(p) if gradient is None else gradient.clone()
        if clip is not None:
            clip(list(theirs.parameters()))
        for group in torchs.param_groups:
            group["lr"], group["betas"] = lr * group["share"], (beta1, 0.999)
        torchs.step()
    for (name, mine), other in zip(model.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
    assert (model.matrix - start["matrix"]).abs().max() > 0.1, "they moved"


@pytest.mark.parametrize("kind", ["adam", "adamw"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_fifty_steps_are_those_of_torch(kind, weight_decay):
    model = Few()
    theirs = copy.deepcopy(model)
    made = adam(model, optimizer=kind, weight_decay=weight_decay)
    follow(model, made, theirs, reference(theirs, made))


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_tags_are_learning_rates_and_decays_of_their_own(kind):
    model = Few()
    theirs = copy.deepcopy(model)
    model.odd.lr_scale, model.turned.lr_scale = 0.1, 0.5
    model.matrix.no_weight_decay = model.turned.no_weight_decay = True
    made = adam(model, optimizer=kind, weight_decay=0.1)
    tags = {"odd": {"share": 0.1}, "turned": {"share": 0.5, "weight_decay": 0.0}}
    follow(model, made, theirs, reference(theirs, made, matrix={"weight_decay": 0.0}, **tags))


@pytest.mark.parametrize(
    "settings", [{"clip_norm": 5.0}, {"clip_value": 1.5}, {"clip_norm": 5.0, "clip_value": 1.5}]
)
def test_clipping_is_that_of_torch_by_value_before_by_norm(settings):
    """Gradients grow hundredfold on the way, so that some steps are clipped and others are not."""
    model = Few(complex_too="clip_value" not in settings)  # torch clips no complex value
    theirs = copy.deepcopy(model)
    made = adam(model, **settings)
    norms = []

    def clip(parameters: list[nn.Parameter]) -> None:
        if "clip_value" in settings:
            nn.utils.clip_grad_value_(parameters, settings["clip_value"])
        if "clip_norm" in settings:
            norms.append(nn.utils.clip_grad_norm_(parameters, settings["clip_norm"]).item())

    follow(model, made, theirs, reference(theirs, made), clip=clip)
    assert not norms or max(norms) > settings["clip_norm"]


def test_values_of_complex_gradients_are_clipped_part_by_part():
    model = Few()
    made = adam(model, clip_value=0.5)
    made.set_rates(0.0)
    made.collect([torch.full_like(p, 2) for p in model.parameters()])
    made.step()
    parts = made.views(made.mean)[-1] / (1 - made.config.betas[0])
    torch.testing.assert_close(parts, torch.tensor([0.5, 0.0]).expand_as(parts))


def test_gradients_of_parts_add_up():
    made, parts = adam(Few()), adam(Few())
    drawn = [gradients(Few(), step) for step in range(3)]
    made.collect([None if g[0] is None else sum(g) for g in zip(*drawn, strict=True)])
    for index, few in enumerate(drawn):
        parts.collect(few, first=not index)
    torch.testing.assert_close(parts.gradients, made.gradients)
    parts.collect([None] * len(parts.parameters))
    assert not parts.gradients.any(), "what the step before collected is gone"


def test_loss_scaling_and_its_steps_are_those_of_torch(monkeypatch):
    """Overflows at the start, in a row, and in the middle; in between the scale grows every four steps."""
    monkeypatch.setattr(optimizer, "GROWTH_INTERVAL", 4)
    model = Few(complex_too=False)  # torch's scaler takes no complex gradient
    theirs = copy.deepcopy(model)
    made = adam(model, precision="fp16", clip_norm=2.0)
    torchs = reference(theirs, made)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=4)
    scaler.scale(torch.ones(()))  # makes its tensors
    overflows = {0: float("inf"), 1: float("nan"), 12: float("-inf")}
    for step in range(20):
        drawn = [g if g is None else g * made.scale for g in gradients(model, step)]
        if step in overflows:
            drawn[1][66] = overflows[step]
        before = made.weights.clone(), made.mean.clone(), made.square.clone(), made.count.clone()
        made.set_rates(1e-2)
        made.collect(drawn)
        made.step()
        for p, gradient in zip(theirs.parameters(), drawn, strict=True):
            p.grad = torch.zeros_like(p) if gradient is None else gradient.clone()
        scaler.unscale_(torchs)
        nn.utils.clip_grad_norm_(list(theirs.parameters()), 2.0)
        scaler.step(torchs)
        scaler.update()
        assert made.scale.item() == scaler.get_scale(), step
        assert made.good.item() == scaler._get_growth_tracker(), step
        after = made.weights, made.mean, made.square, made.count
        assert all(map(torch.equal, before, after)) == (step in overflows), step
    assert made.count == 17 and made.scale == 2.0**16 / 4 * 2**2 / 2 * 2
    for mine, other in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, **CLOSE)


def test_the_scale_doubles_after_two_thousand_steps_without_overflow():
    made = adam(Few(), precision="fp16")
    made.good.fill_(1998)
    for scale in (2.0**16, 2.0**17, 2.0**17):
        made.step()
        assert made.scale == scale
    assert made.good == 1


def test_a_state_loaded_into_another_one_goes_on_as_the_first():
    first, second = Few(), Few()
    made, other = (adam(model, precision="fp16", weight_decay=0.1) for model in (first, second))

    def walk(model: nn.Module, its: Adam, steps: range) -> None:
        for step in steps:
            its.set_rates(1e-2)
            its.collect([g if g is None else g * its.scale for g in gradients(model, step)])
            its.step()

    walk(first, made, range(5))
    saved = copy.deepcopy((first.state_dict(), made.state()))
    walk(first, made, range(5, 9))
    second.load_state_dict(saved[0])
    other.load(saved[1])
    walk(second, other, range(5, 9))
    assert torch.equal(made.weights, other.weights)
    assert all(torch.equal(tensor, other.state()[name]) for name, tensor in made.state().items())


def test_parameters_are_parts_of_one_buffer_and_a_model_like_any_other():
    model = Few()
    before = copy.deepcopy(model.state_dict())
    made = adam(model)
    place = made.weights.untyped_storage().data_ptr()
    assert all(p.untyped_storage().data_ptr() == place for p in model.parameters())
    assert all(p.data_ptr() % 256 == place % 256 for p in model.parameters()), "each begins a line"
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name

    twin = copy.deepcopy(model)
    adam(twin).weights.zero_()
    assert not any(p.any() for p in twin.parameters())
    assert torch.equal(model.odd, before["odd"]), "a copy shares nothing"
    model.load_state_dict(twin.state_dict())
    assert not made.weights.any(), "loading writes into the buffer"


def test_a_model_with_real_and_complex_parts_of_the_buffer_goes_into_a_checkpoint(tmp_path):
    model = Few()
    adam(model)
    owner = {"config_hash": "0", "seed": 0}
    checkpoint.save({**owner, "model": model.state_dict()}, tmp_path / "last.pt")
    saved = checkpoint.load(tmp_path / "last.pt", **owner)["model"]
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


def test_architecture_parameters_and_frozen_ones_are_left_alone():
    model = Few()
    model.odd.architecture, model.matrix.requires_grad = True, False
    made = adam(model)
    assert {id(p) for p in made.parameters} == {id(model.scalar), id(model.unused), id(model.turned)}


def test_parameters_of_other_precisions_are_refused():
    with pytest.raises(ValueError, match="float32 and complex64 parameters, got torch.float64"):
        adam(Few().double())


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_compiled_update_is_the_plain_one(precision):
    plain, compiled = Few(), Few()
    compiled.load_state_dict(plain.state_dict())
    plain.odd.lr_scale = compiled.odd.lr_scale = 0.1
    settings = {"precision": precision, "weight_decay": 0.1, "clip_norm": 2.0, "clip_value": 1.0}
    both = adam(plain, **settings), adam(compiled, **settings)
    both[1].compile()
    for step in range(10):
        drawn = [g if g is None else g * both[0].scale for g in gradients(plain, step)]
        if step == 3 and precision == "fp16":
            drawn[0][0, 0] = float("inf")
        for made in both:
            made.set_rates(1e-2, 0.9 - 0.01 * step)
            made.collect(drawn)
            made.step()
    torch.testing.assert_close(both[1].weights, both[0].weights, **CLOSE)
    torch.testing.assert_close(both[1].state(), both[0].state(), **CLOSE)
