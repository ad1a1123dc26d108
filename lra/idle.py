"""Settings that would change nothing under the others of a run: on the command line they are an error."""

from dataclasses import fields
from typing import TYPE_CHECKING

from hydra.core.override_parser.types import Override

from lra import registry
from lra.errors import UserError

if TYPE_CHECKING:
    from lra.config import RunConfig

BLOCK_SETTINGS = (
    "ffn",
    "d_ff",
    "activation",
    "act_dropout",
    "prenorm",
    "dropout_kind",
    "drop_path",
)  # of each layer


def refuse_idle_settings(run: "RunConfig", values: list[Override]) -> None:
    """A setting on the command line that could not change anything under this mechanism is an error."""
    idle = {}
    if "attn_dropout" not in registry.accepts(run.model):
        idle["model.attn_dropout"] = f"model '{run.model.name}' has no attention weights to drop"
    if run.model.backbone.ffn == "none":
        idle |= {f"model.{k}": "model.ffn=none" for k in ("d_ff", "activation", "act_dropout")}
    if run.model.backbone.norm != "batch":
        idle["model.norm_stats"] = "only model.norm=batch has batch statistics"
    idle |= _idle_by_choice(run)
    if run.tracker.name == "none":
        idle |= {f"tracker.{f.name}": "tracker=none tracks nothing" for f in fields(run.tracker)}
    if run.model.name == "hybrid":
        layers = 1 if run.model.backbone.tied_layers else run.model.backbone.num_layers
        if len(run.model.own["layers"]) > layers and "model.layers" in {v.key_or_group for v in values}:
            raise UserError(
                f"model.layers names {len(run.model.own['layers'])} mixers for {layers} distinct "
                "layers (model.num_layers, model.tied_layers); name fewer"
            )
    if run.model.name != "search":
        idle["train.arch_lr"] = "only model=search chooses between mechanisms"
    if run.task.documents != 2:
        idle["model.pair"] = f"task '{run.task.name}' has one document a row"
    if registry.is_block(run.model):
        named = registry.accepts(run.model)
        reason = f"model '{run.model.name}' is a whole layer and has none"
        idle |= {f"model.{key}": reason for key in BLOCK_SETTINGS if key not in named}
    for override in values:
        key = override.key_or_group
        if key in idle and override.value() not in (None, 0, 0.0):
            raise UserError(f"{override.input_line} would change nothing: {idle[key]}; leave it away")


def _idle_by_choice(run: "RunConfig") -> dict[str, str]:
    """Settings that another setting puts out of use, with that reason."""
    backbone, train = run.model.backbone, run.train
    groups = [
        (
            train.micro_batch is not None and train.micro_batch > run.batch_size,
            f"a batch has {run.batch_size} rows",
            ["train.micro_batch"],
        ),
        (backbone.pool != "cls", "only model.pool=cls has a [CLS] token", ["model.cls_layer"]),
        (
            not backbone.head_widths,
            "model.head_widths is empty",
            ["model.head_activation", "model.head_dropout"],
        ),
        (
            train.schedule != "cosine_cycle",
            "only train.schedule=cosine_cycle has cycles",
            ["train.cycle_steps"],
        ),
        (
            train.schedule != "onecycle",
            "only train.schedule=onecycle moves momentum",
            ["train.cycle_momentum"],
        ),
        (
            train.schedule != "plateau",
            "only train.schedule=plateau waits for evaluations",
            ["train.plateau_patience", "train.plateau_factor"],
        ),
        (
            not train.warmup_steps or train.schedule in ("rsqrt", "onecycle", "cosine_cycle"),
            "this schedule has no such warm-up",
            ["train.warmup_init_lr"],
        ),
        (
            not train.warmup_steps or train.schedule == "onecycle",
            "this schedule has no such warm-up",
            ["train.warmup_power"],
        ),
    ]
    return {key: reason for idle, reason, keys in groups if idle for key in keys}
