"""From the settings of a run to its model, its layout and its step."""

import torch

from lra import parallel, registry
from lra.backbone import Backbone
from lra.capture import CapturedStep
from lra.config import RunConfig
from lra.errors import UserError
from lra.step import Step
from models.common import Mechanism

# Measured on an H200 at width 64: what compiling a captured step takes, and what it saves a step.
COMPILE_S, COMPILE_S_PER_LAYER = 10.0, 5.0
SAVED_MS_PER_LAYER, SAVED_MS_PER_NUMBER = 0.4, 2e-7  # the second for each row and each number of its width
MARGIN = 1.25


def choose_layout(config: RunConfig) -> str:
    """`packed`, unless a quirk of the recipe or of the mechanism needs padding; UserError if it is asked for
    while packed.
    """
    quirks = []
    if config.task.black == "padding":
        quirks.append("task.black=padding")
        if config.model.backbone.pool == "first":
            raise UserError(
                "model.pool=first would read a first pixel that task.black=padding may mask; "
                "use model.pool=cls or mean"
            )
    if not registry.traits(config.model).content_invariant:
        quirks.append(f"model={config.model.label}, as it is set, reads padding and")
    if config.model.backbone.norm == "batch" and config.model.backbone.norm_stats == "all":
        quirks.append("model.norm_stats=all")
    if config.model.backbone.pool == "mean_all":
        quirks.append("model.pool=mean_all")
    if quirks and config.train.layout == "packed":
        raise UserError(
            f"{quirks[0]} needs padding, which train.layout=packed does not have; use train.layout=padded"
        )
    if config.train.layout != "auto":
        return config.train.layout
    return "padded" if quirks else "packed"


def build_model(config: RunConfig, *, vocab_size: int | None) -> Backbone:
    """The model of a run on the CPU; `vocab_size` counts the padding id, None for continuous input."""
    return Backbone(
        config.model,
        num_classes=config.task.num_classes,
        padded_length=config.padded_length,
        vocab_size=vocab_size,
        channels=1 if vocab_size is None else None,
        documents=config.task.documents,
        recompute=config.train.activation_checkpointing,
    )


def choose_step(
    config: RunConfig,
    device: torch.device,
    rows: float,
    *,
    evaluations: float = 0.0,
    runs: int = 1,
) -> tuple[str, bool, str]:
    """The step mode, whether torch.compile takes part, and why. UserError for a mode that cannot be had.

    rows: packed or padded rows of a typical batch; evaluations: batches that the run evaluates, all in all;
    runs: how many that differ in the seed alone this process is likely to make.
    """
    train = config.train
    if train.compile is not None and train.step_mode in ("eager", "compiled"):
        raise UserError(
            f"train.compile={str(train.compile).lower()} is for captured steps and train.step_mode="
            f"{train.step_mode} says it already; leave train.compile away"
        )
    obstacle = cannot_capture(config, device)
    if train.step_mode == "captured":
        if obstacle:
            raise UserError(f"train.step_mode=captured: {obstacle}; use train.step_mode=auto or eager")
        return "captured", bool(train.compile), "as asked"
    if train.step_mode != "auto":
        return train.step_mode, train.step_mode == "compiled", "as asked"
    if obstacle:
        return ("compiled", True, "as asked") if train.compile else ("eager", False, obstacle)
    if train.compile is not None:
        return "captured", train.compile, "captured steps are the fastest; train.compile as asked"
    cost, saved = _compile_cost_and_gain(config, rows, evaluations)
    saved *= runs
    if saved > MARGIN * cost:
        return "captured", True, f"compiling takes about {cost:.0f} s and saves about {saved:.0f} s"
    return "captured", False, f"compiling would take about {cost:.0f} s and save about {saved:.0f} s"


def cannot_capture(config: RunConfig, device: torch.device) -> str | None:
    """Why a step of this run cannot be captured in a CUDA graph; None if it can."""
    if device.type != "cuda":
        return "CUDA graphs need a GPU"
    traits = registry.traits(config.model)
    if not traits.capturable:
        return f"model={config.model.label}: {traits.because.get('capturable', 'it says so')}"
    if config.model.name == "search":
        return "a search takes a second step, on validation batches, between two of its steps"
    if config.train.activation_checkpointing:
        return "activation checkpointing puts random numbers back, which a graph cannot do"
    return None


def check_recompute(model: Backbone, *, compiled: bool) -> None:
    """UserError where layers that run again in the backward pass cannot be compiled."""
    if not (compiled and model.recompute):
        return
    for module in model.modules():
        if isinstance(module, Mechanism) and parallel.has_own_loss(module):
            raise UserError(
                f"train.activation_checkpointing with torch.compile: {module.name} keeps a loss of its own "
                "beside its output, which compiled code cannot compute again; use train.step_mode=eager or "
                "leave one of them away"
            )


def make_step(config: RunConfig, model: Backbone, device: torch.device, mode: str, *, compiled: bool) -> Step:
    check_recompute(model, compiled=compiled)
    if mode != "captured":
        return Step(model, config.train, device, compiled=compiled)
    strict = config.train.step_mode == "captured"
    return CapturedStep(model, config.train, device, compiled=compiled, strict=strict)


def _compile_cost_and_gain(config: RunConfig, rows: float, evaluations: float) -> tuple[float, float]:
    """Seconds that compiling takes, and seconds that it saves in the whole run; of the batches evaluated
    about a third of what it saves in steps.
    """
    backbone = config.model.backbone
    cost = COMPILE_S + COMPILE_S_PER_LAYER * backbone.num_layers
    saved_ms = backbone.num_layers * (SAVED_MS_PER_LAYER + SAVED_MS_PER_NUMBER * rows * backbone.d_model)
    return cost, saved_ms / 1e3 * (config.train.num_steps + evaluations / 3)
