"""Every setting of training does what it says: precision, clipping, selection, tags, extra losses, timing."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lra.config import compose
from lra.data.prepare import prepare
from lra.train import Trainer
from models.common import Mixer, Place


class Tagged(Mixer):
    """Scales its input by a sum of vectors that start equal, so all get one gradient and only tags differ."""

    def __init__(self, place: Place, *, aux_weight: float = 0.0) -> None:
        super().__init__(place, projections=False)
        self.aux_weight = aux_weight
        self.plain = nn.Parameter(torch.ones(place.d_model))
        self.frozen = nn.Parameter(torch.ones(place.d_model))
        self.slow = nn.Parameter(torch.ones(place.d_model))
        self.undecayed = nn.Parameter(torch.ones(place.d_model))
        self.frozen.lr_scale, self.slow.lr_scale = 0.0, 0.1
        self.undecayed.no_weight_decay = True

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x * (self.plain + self.frozen + self.slow + self.undecayed)

    def aux_loss(self) -> Tensor | None:
        return self.aux_weight * self.plain.square().sum() if self.aux_weight else None


TAGGED = ["model=custom", f"model.target={__name__}:Tagged"]


def trainer(overrides, folder) -> Trainer:
    config = compose(overrides)
    folder.mkdir(parents=True, exist_ok=True)
    return Trainer(config, prepare(config.task, config.length), folder)


def take_step(made: Trainer, lr: float) -> float:
    """One step on the first training batch; returns its loss."""
    batches = made.batches["train"]
    made.step.train(batches, batches.plans(0, micro_batch=made.config.train.micro_batch), lr=lr)
    return made.step.read()[0]


def tagged_after_a_step(overrides, folder, *, lr: float) -> Tagged:
    made = trainer(overrides, folder)
    take_step(made, lr)
    return made.model.mechanisms()[0]


def gradients(made: Trainer) -> Tensor:
    """All that moved the weights in the first step as one vector: Adam's first mean is a share of them."""
    return made.step.optimizer.mean / (1 - made.config.train.betas[0])


def gradient_of(made: Trainer, parameter: nn.Parameter) -> Tensor:
    optimizer = made.step.optimizer
    parts = zip(optimizer.parameters, optimizer.views(gradients(made)), strict=True)
    return next(part for mine, part in parts if mine is parameter)


def logits_and_product_dtype(overrides, folder) -> tuple[Tensor, torch.dtype]:
    """The logits of eight test rows, and the dtype that a linear map inside the mechanism gave out."""
    made = trainer(overrides, folder)
    made.model.eval()
    seen = []
    made.model.mechanisms()[0].qkv.register_forward_hook(lambda _, inputs, output: seen.append(output.dtype))
    with torch.no_grad():
        logits = made.step.logits(made.batches["test"].gather(np.arange(8)))
    return logits, seen[0]


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precisions_compute_products_in_half_and_logits_in_float32(tiny, tmp_path, precision, dtype):
    exact, full = logits_and_product_dtype(tiny(), tmp_path / "fp32")
    rounded, half = logits_and_product_dtype(tiny(f"train.precision={precision}"), tmp_path / precision)
    assert (full, half, rounded.dtype) == (torch.float32, dtype, torch.float32)
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.05)  # bf16 keeps 8 bits of numbers near 1


def test_tf32_changes_nothing_on_the_cpu(tiny, tmp_path):
    settings = tiny("train.device=cpu")
    exact, _ = logits_and_product_dtype(settings, tmp_path / "fp32")
    found, dtype = logits_and_product_dtype([*settings, "train.precision=tf32"], tmp_path / "tf32")
    assert dtype == torch.float32 and torch.equal(found, exact)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_clip_norm_bounds_the_norm_of_all_gradients_together(tiny, tmp_path, precision):
    """In fp16 the loss is scaled by 65,536, so the bound also shows that clipping sees unscaled gradients."""
    free = trainer(tiny(), tmp_path / "free")
    take_step(free, lr=0.0)
    assert gradients(free).norm() > 0.1, "else there is nothing to clip"
    clipped = trainer(tiny("train.clip_norm=0.1", f"train.precision={precision}"), tmp_path / "clipped")
    take_step(clipped, lr=0.0)
    # The sum of squares is rounded in float32, and clipping divides by the norm + 1e-6.
    assert gradients(clipped).norm().item() == pytest.approx(0.1, rel=1e-4)


def test_clip_value_bounds_every_gradient_and_leaves_smaller_ones_alone(tiny, tmp_path):
    free, clipped = trainer(tiny(), tmp_path / "a"), trainer(tiny("train.clip_value=0.01"), tmp_path / "b")
    take_step(free, lr=0.0)
    take_step(clipped, lr=0.0)
    assert gradients(free).abs().max() > 0.01, "else there is nothing to clip"
    torch.testing.assert_close(gradients(clipped), gradients(free).clamp(-0.01, 0.01), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("selection", "chosen"), [("best_val", 20), ("last", 30)])
def test_test_is_scored_with_the_weights_that_selection_names(tiny, tmp_path, monkeypatch, selection, chosen):
    val_accuracy = {10: 0.3, 20: 0.5, 30: 0.4}
    weights: dict[int | str, Tensor] = {}
    measure = Trainer.evaluate

    def scripted(self: Trainer, split: str):
        step = self.state.step if split == "val" else split
        weights[step] = self.model.head.layers[-1].weight.detach().clone()
        accuracy, *rest = measure(self, split)
        return (val_accuracy[step] if split == "val" else accuracy, *rest)

    monkeypatch.setattr(Trainer, "evaluate", scripted)
    settings = tiny("train.num_steps=30", "train.eval_every=10", f"train.selection={selection}")
    found = trainer(settings, tmp_path / "run").run()
    assert (found["best_step"], found["val_accuracy"]) == (chosen, val_accuracy[chosen])
    assert [step for step in val_accuracy if torch.equal(weights[step], weights["test"])] == [chosen]


def test_weight_decay_shrinks_what_is_not_tagged_no_weight_decay(tiny, tmp_path):
    kept = tagged_after_a_step([*tiny(*TAGGED), "train.weight_decay=0"], tmp_path / "kept", lr=0.1)
    decayed = tagged_after_a_step([*tiny(*TAGGED), "train.weight_decay=0.5"], tmp_path / "decayed", lr=0.1)
    # AdamW takes lr * decay * weight away, and every weight was 1.
    torch.testing.assert_close(decayed.plain, kept.plain - 0.1 * 0.5, rtol=0, atol=1e-6)
    torch.testing.assert_close(decayed.undecayed, kept.undecayed, rtol=0, atol=0)


def test_lr_scale_scales_the_learning_rate_of_its_parameter(tiny, tmp_path):
    found = tagged_after_a_step(tiny(*TAGGED), tmp_path / "run", lr=0.1)
    moved = found.plain.detach() - 1
    assert moved.abs().min() > 0.05, "Adam's first step is about the learning rate"
    torch.testing.assert_close(found.slow.detach() - 1, 0.1 * moved, rtol=1e-4, atol=1e-6)  # rounding near 1
    assert torch.equal(found.frozen, torch.ones_like(found.frozen))


@pytest.mark.parametrize("micro_batch", [16, 5])
def test_the_auxiliary_loss_is_trained_on_once_a_step(tiny, tmp_path, micro_batch):
    settings = tiny(*TAGGED, f"train.micro_batch={micro_batch}")
    without = take_step(trainer(settings, tmp_path / "without"), lr=0.0)
    made = trainer([*settings, "model.aux_weight=0.25"], tmp_path / "with")
    loss, found = take_step(made, lr=0.0), made.model.mechanisms()[0]
    # 0.25 * sum(plain ** 2) at plain = 1; the other vectors have the gradient of the cross-entropy alone.
    assert loss == pytest.approx(without + 0.25 * found.plain.numel(), rel=1e-5)
    plain, slow = gradient_of(made, found.plain), gradient_of(made, found.slow)
    torch.testing.assert_close(plain, slow + 0.5, rtol=0, atol=1e-5)


def test_cycled_momentum_is_the_optimizers_first_beta_at_every_step(tiny, tmp_path):
    settings = tiny("train.schedule=onecycle", "train.cycle_momentum=true", "train.warmup_steps=5")
    made = trainer(settings, tmp_path / "run")
    seen = []
    update = made.step.optimizer.step
    made.step.optimizer.step = lambda: (seen.append(made.step.optimizer.rates[1].item()), update())
    made.run()
    assert seen == pytest.approx([made.schedule.beta1(step) for step in range(20)])
    assert min(seen) < 0.86 < 0.94 < max(seen), "it moves, and not only between neighbours of the default"


@pytest.mark.parametrize("eval_every", [25, 4])
def test_the_first_ten_steps_of_a_run_are_not_timed(tiny, tmp_path, eval_every):
    made = trainer(tiny("train.num_steps=25", f"train.eval_every={eval_every}"), tmp_path / "run")
    found = made.run()
    batches = made.batches["train"]
    assert made.state.timed_steps == 15
    assert made.state.timed_tokens == sum(batches.train(step)[0].num_tokens for step in range(10, 25))
    assert found["step_ms"] == pytest.approx(found["train_s"] / 15 * 1e3)


def test_seconds_of_compiling_count_neither_as_training_nor_as_evaluation(tiny, tmp_path, monkeypatch):
    made = trainer(tiny(), tmp_path / "run")

    def compiling(name: str) -> None:
        call = getattr(made.step, name)

        def slow(*arguments, **rates):
            made.step.compile_s += 1000.0  # said to have passed, so it must be taken off
            return call(*arguments, **rates)

        monkeypatch.setattr(made.step, name, slow)

    compiling("train")
    made._loop()
    assert made.state.train_s == pytest.approx(-10_000, abs=100) and made.state.eval_s > 0
    compiling("predict")
    made.state.eval_s = 0.0
    made.evaluate("val")  # 7 batches
    assert made.state.eval_s == pytest.approx(-7000, abs=100)
    assert made.how()["compile_s"] == 27_000
