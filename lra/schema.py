"""What a run is made of: typed settings with their defaults, choices and meaning. No values live elsewhere.

`semantic` fields decide the result and so enter the run's identity; values equal to the default here are
left out of it, so that a new setting does not rename old runs.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from lra.errors import UserError, unknown


def setting(
    default: Any,
    *,
    choices: tuple = (),
    low: float | None = None,
    high: float = math.inf,
    semantic: bool = True,
) -> Any:
    """A dataclass field with what is allowed in it: one of `choices`, or a number from `low` to `high`."""
    return field(
        default=default, metadata={"choices": choices, "low": low, "high": high, "semantic": semantic}
    )


@dataclass(frozen=True)
class BackboneConfig:
    """The model around the mechanism. Dropouts left at None follow `dropout`."""

    d_model: int = setting(64, low=1)
    num_layers: int = setting(2, low=1)
    num_heads: int = setting(2, low=1)
    d_head: int | None = setting(None, low=1)  # None: d_model / num_heads
    d_ff: int = setting(128, low=1)
    bias: bool = True  # of the query, key, value and output projections
    ffn: str = setting("mlp", choices=("mlp", "glu", "none"))
    activation: str = setting("gelu", choices=("gelu", "relu", "silu", "tanh"))
    norm: str = setting("layer", choices=("layer", "batch", "scale", "none"))
    norm_stats: str = setting("real", choices=("real", "all"))  # batch norm over real tokens, or padding too
    norm_eps: float = setting(1e-5, low=0.0)
    prenorm: bool = True
    final_norm: bool = True
    positions: str = setting("learned", choices=("sinusoidal", "learned", "rotary", "none"))
    embedding_std: float = setting(0.02, low=0.0)
    position_std: float = setting(0.02, low=0.0)
    scale_embedding: bool = False  # times sqrt(d_model)
    init: str = setting("torch", choices=("torch", "xavier", "normal"))
    tied_layers: bool = False
    pool: str = setting("mean", choices=("cls", "first", "mean", "mean_padded", "mean_all", "max"))
    cls_layer: int = setting(0, low=-1)  # before which layer [CLS] is put in; -1: the last
    head_widths: list[int] = field(
        default_factory=list
    )  # hidden layers of the classifier; [] is a linear one
    head_activation: str = setting("relu", choices=("relu", "gelu"))
    head_dropout: float = setting(0.0, low=0.0, high=1.0)
    head_bias: bool = True
    pair: str = setting("nli", choices=("concat", "swapped", "nli"))  # how two documents are joined
    dropout: float = setting(0.0, low=0.0, high=1.0)  # of residual branches
    dropout_kind: str = setting("element", choices=("element", "tied"))
    emb_dropout: float | None = setting(None, low=0.0, high=1.0)
    act_dropout: float | None = setting(None, low=0.0, high=1.0)  # inside the feed-forward
    attn_dropout: float = setting(0.0, low=0.0, high=1.0)  # of attention weights, where a mechanism has them
    drop_path: float = setting(0.0, low=0.0, high=1.0)

    @property
    def input_dropout(self) -> float:
        return self.dropout if self.emb_dropout is None else self.emb_dropout

    @property
    def inner_dropout(self) -> float:
        return self.dropout if self.act_dropout is None else self.act_dropout


@dataclass(frozen=True)
class ModelConfig:
    """A mechanism by name (or `target`, for 'custom'), its own parameters, and the backbone around it."""

    name: str
    target: str | None = None
    own: dict[str, Any] = field(default_factory=dict)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)

    @property
    def label(self) -> str:
        """What tables and run folders call it: the class of a mechanism from outside, else the name."""
        return self.target.rpartition(":")[2] if self.target else self.name


@dataclass(frozen=True)
class TrainConfig:
    """How a run is trained and which of its weights are scored."""

    num_steps: int = setting(1000, low=1)
    optimizer: str = setting("adamw", choices=("adamw", "adam"))
    lr: float = setting(1e-3, low=0.0)
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = setting(1e-8, low=0.0)
    weight_decay: float = setting(0.0, low=0.0)
    schedule: str = setting(
        "linear",
        choices=(
            "constant",
            "linear",
            "cosine",
            "cosine_cycle",
            "rsqrt",
            "inverse_sqrt",
            "onecycle",
            "plateau",
        ),
    )
    warmup_steps: int = setting(0, low=0)
    warmup_init_lr: float = setting(0.0, low=0.0)
    warmup_power: float = setting(1.0, low=0.0)
    cycle_steps: int | None = setting(None, low=1)  # cosine_cycle; None: num_steps
    cycle_momentum: bool = False  # onecycle moves beta1 between 0.95 and 0.85, as torch's default does
    plateau_patience: int = setting(5, low=0)  # evaluations without a better val accuracy before lr is cut
    plateau_factor: float = setting(0.5, low=0.0)
    arch_lr: float = setting(1e-2, low=0.0)  # of the parameters that choose between mechanisms (model=search)
    clip_norm: float | None = setting(None, low=0.0)
    clip_value: float | None = setting(None, low=0.0)
    micro_batch: int | None = setting(None, low=1)  # rows per forward; None: the whole batch
    precision: str = setting("fp32", choices=("fp32", "tf32", "bf16", "fp16"))
    layout: str = setting("auto", choices=("auto", "packed", "padded"))
    step_mode: str = setting("auto", choices=("auto", "eager", "compiled", "captured"))
    compile: bool | None = None  # torch.compile within a captured step; None: where it pays for its time
    activation_checkpointing: bool = False  # recompute each layer in the backward pass instead of keeping it
    data: str = setting("auto", choices=("auto", "device", "stream"), semantic=False)  # where the store lies
    eval_every: int | None = setting(None, low=1)  # steps; None: ten times a run
    eval_batch_size: int | None = setting(None, low=1, semantic=False)
    selection: str = setting("best_val", choices=("best_val", "last"))
    deterministic: bool = False
    checkpoint_every: int | None = setting(None, low=1, semantic=False)  # steps; None: at each evaluation
    log_every: int = setting(50, low=1, semantic=False)
    device: str = setting("auto", semantic=False)  # auto, cpu, cuda, cuda:1


@dataclass(frozen=True)
class TaskDeviation:
    """What a task's recipe does otherwise than the paper, as long as the task has the settings `when`."""

    text: str = ""
    when: dict[str, Any] = field(default_factory=dict)

    def holds(self, task: Any) -> bool:
        return all(getattr(task, name) == value for name, value in self.when.items())


@dataclass(frozen=True)
class PaperConfig:
    """A named recipe: where it is from, its version, and what it knowingly does otherwise."""

    name: str = "none"
    title: str = ""
    source: str = ""
    version: int = 0
    tolerance: float = 1.0  # points of accuracy within which a published number counts as reproduced
    published: str | None = None  # the table's name in lra/report/published.csv
    tasks: list[str] = field(default_factory=list)
    models: list[str] = field(default_factory=list)
    deviations: list[str] = field(default_factory=list)
    task_deviations: list[TaskDeviation] = field(default_factory=list)  # the same, of one task's recipe


@dataclass(frozen=True)
class TrackerConfig:
    """Where runs are shown while they go on; no part of what they are. A None is left to wandb's own
    settings, as is mode=auto.
    """

    name: str = setting("none", choices=("none", "wandb"), semantic=False)
    mode: str = setting("auto", choices=("auto", "online", "offline", "disabled"), semantic=False)
    project: str | None = setting(None, semantic=False)
    entity: str | None = setting(None, semantic=False)
    group: str | None = setting(None, semantic=False)  # None: the sweep
    tags: list[str] = field(default_factory=list, metadata={"semantic": False})
    notes: str | None = setting(None, semantic=False)
    figures: bool = setting(True, semantic=False)  # of a sweep, when it has ended


def check(config: Any, prefix: str) -> None:
    """Raises UserError for a value outside the choices or bounds of its field, and for NaN and infinity."""
    for f in dataclasses.fields(config):
        value, allowed, low = getattr(config, f.name), f.metadata.get("choices"), f.metadata.get("low")
        if allowed and value not in allowed:
            raise unknown(f"{prefix}{f.name}", str(value), allowed)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"{prefix}{f.name}={number} is not a finite number; give one")
        high = f.metadata.get("high", math.inf)
        if low is not None and value is not None and not low <= value <= high:
            bound = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise UserError(f"{prefix}{f.name}={value} is out of range; it must be {bound}")


def semantic(config: Any) -> dict[str, Any]:
    """The semantic fields whose values differ from the defaults, by name."""
    chosen = {}
    for f in dataclasses.fields(config):
        if not f.metadata.get("semantic", True):
            continue
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        if getattr(config, f.name) != default:
            chosen[f.name] = getattr(config, f.name)
    return chosen
