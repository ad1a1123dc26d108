"""From the settings of a run to its model and its layout."""

from lra import registry
from lra.backbone import Backbone
from lra.config import RunConfig
from lra.errors import UserError


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
    )
