"""Overrides to settings: precedence, sweeps, recipes, identity, and what is refused."""

import dataclasses

import pytest
from omegaconf import OmegaConf

from lra import config, registry, schema
from lra.config import compose, expand
from lra.errors import UserError


def test_comma_lists_expand_to_every_combination_with_the_last_key_fastest():
    assert expand(["seed=0,1", "model=softmax,linear", "length=32"]) == [
        ["seed=0", "model=softmax", "length=32"],
        ["seed=0", "model=linear", "length=32"],
        ["seed=1", "model=softmax", "length=32"],
        ["seed=1", "model=linear", "length=32"],
    ]


def test_a_list_value_is_no_sweep():
    assert expand(["model.head_widths=[64,32]"]) == [["model.head_widths=[64,32]"]]
    assert compose(["model.head_widths=[64,32]"]).model.backbone.head_widths == [64, 32]


def test_precedence_is_defaults_then_recipe_then_command_line():
    plain = compose([])
    recipe = compose(["paper=nystromformer2021"])
    mine = compose(["paper=nystromformer2021", "train.lr=3e-4"])
    assert plain.train.lr == schema.TrainConfig().lr != recipe.train.lr == 1e-4
    assert mine.train.lr == 3e-4 and mine.train.schedule == "onecycle"
    assert recipe.padded_length == 2048 and plain.padded_length == 2000


def test_a_model_overlay_of_a_recipe_comes_after_the_recipe_of_the_task():
    assert compose(["paper=nystromformer2021", "model=nystrom"]).model.own["num_landmarks"] == 64
    assert compose(["paper=nystromformer2021", "model=linformer", "task=text"]).model.own["proj_len"] == 256


def test_what_differs_from_the_recipe_is_a_deviation():
    as_published = compose(["paper=nystromformer2021"])
    changed = compose(["paper=nystromformer2021", "model.attn_dropout=0", "train.precision=bf16"])
    new = set(changed.deviations) - set(as_published.deviations)
    assert new == {"model.attn_dropout=0.0 (recipe: 0.1)", "train.precision=bf16 (recipe: fp16)"}
    assert not compose(["model.attn_dropout=0.1"]).deviations


def test_another_length_than_the_recipes_drops_the_recipes_padded_length():
    assert compose(["paper=nystromformer2021", "length=512"]).padded_length == 512
    assert compose(["paper=nystromformer2021", "length=2000"]).padded_length == 2048


def test_an_empty_list_asks_for_no_run():
    with pytest.raises(UserError, match="asks for no run"):
        expand(["seed=range(0,0)"])


def test_a_quoted_group_choice_is_the_choice():
    assert compose(["task='listops'"]).task.name == "listops"


def test_defaults_leave_no_trace_in_the_identity():
    assert compose(["model.d_model=64", "train.num_steps=1000"]).identity() == compose([]).identity()


def test_the_hash_depends_on_the_data_and_the_recipe():
    run = compose([])
    assert run.config_hash("a" * 12) != run.config_hash("b" * 12)
    named = dataclasses.replace(run, paper=schema.PaperConfig(name="x", version=1))
    newer = dataclasses.replace(run, paper=schema.PaperConfig(name="x", version=2))
    assert len({r.config_hash("a") for r in (run, named, newer)}) == 3


REFUSED = [
    (["task=lisops"], "did you mean 'listops'"),
    (["model=nystom"], "did you mean 'nystrom'"),
    (["paper=nystromformer"], "did you mean 'nystromformer2021'"),
    (["model=nystrom", "model.num_landmark=3"], "did you mean 'model.num_landmarks'"),
    (["trian.lr=1"], "unknown setting 'trian.lr'"),
    (["train.optimizer=sgd"], "available: adam, adamw"),
    (["train.lr=fast"], "train.lr"),
    (["train.lr=-1"], "at least 0"),
    (["batch_size=0"], "at least 1"),
    (["batch_size=2.5"], "whole number"),
    (["seed=-1"], "at least 0"),
    (["seed=0,1"], "add -m"),
    (["length=33000"], "length"),
    (["model=linear", "model.attn_dropout=0.1"], "would change nothing"),
    (["model.norm_stats=all"], "would change nothing"),
    (["model.ffn=none", "model.d_ff=64"], "would change nothing"),
    (["model=custom"], "model.target"),
    (["model=custom", "model.target=nowhere"], "pkg.mod:Class"),
    (["model=custom", "model.target=no.such:Thing"], "cannot import"),
    (["~seed"], "delete"),
    (["task"], "cannot read"),
    (["paper=nystromformer2021", "task=nothing"], "unknown task"),
    (["model.own_secret=1"], "unknown setting"),
    (["paper=nystromformer2021", "train=quick"], "both say how to train"),
    (["model@x=softmax"], "names a package"),
    (["seed=99999999999999999999"], "seed"),
    (["model.dropout=1.5"], "from 0.0 to 1.0"),
    (["train.lr=nan"], "not a finite number"),
    (["train.betas=[0.9]"], "two numbers"),
    (["model.head_widths=[0]"], "empty layer"),
    (["model.pool=cls", "model.cls_layer=2"], "-1 is the last"),
    (["model.cls_layer=-1"], "would change nothing"),
    (["batch_size=8", "train.micro_batch=9"], "a batch has 8 rows"),
    (["train.cycle_steps=10"], "would change nothing"),
    (["task.padded_length=16"], "shorter than length"),
]


@pytest.mark.parametrize(
    ("overrides", "message"), REFUSED, ids=lambda x: " ".join(x) if isinstance(x, list) else ""
)
def test_bad_input_gets_a_message_with_what_is_allowed(overrides, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        compose(overrides)


def test_a_paper_without_a_recipe_for_the_task_is_refused(monkeypatch):
    monkeypatch.setattr(config, "options", lambda group: ["none", "ghost2020", "listops", "softmax"])
    with pytest.raises(UserError, match="no recipe for task 'listops'"):
        compose(["paper=ghost2020"])


def test_a_mechanism_outside_the_repository_runs_by_its_target(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from models import Mixer\n"
        "class Doubler(Mixer):\n"
        "    def __init__(self, place, *, times: float = 2.0):\n"
        "        super().__init__(place, projections=False)\n"
        "        self.times = times\n"
        "    def forward(self, x, mask=None):\n"
        "        return x * self.times\n"
    )
    monkeypatch.chdir(tmp_path)
    for target in ("mine:Doubler", "mine.py:Doubler"):
        run = compose(["model=custom", f"model.target={target}", "model.times=3"])
        assert run.model.own == {"times": 3.0}
    with pytest.raises(UserError, match="model.times"):
        compose(["model=custom", "model.target=mine:Doubler", "model.time=3"])
    with pytest.raises(UserError, match="did you mean 'Doubler'"):
        compose(["model=custom", "model.target=mine:Dubler"])


def combinations():
    """Every task, model and paper that has a recipe for the task."""
    from lra import tasks

    for task in tasks.names():
        for paper in config.options("paper"):
            if paper == "none" or (config.conf_dir() / "recipe" / paper / f"{task}.yaml").is_file():
                yield from ((task, model, paper) for model in registry.names())


def assert_composes(task, model, paper):
    run = compose([f"task={task}", f"model={model}", f"paper={paper}"])
    assert (run.task.name, run.model.name, run.paper.name) == (task, model, paper)


def test_every_model_task_and_recipe_composes_with_some_others():
    """One combination in nineteen, which leaves out no model, no task, no paper and no recipe of a model."""
    chosen = list(combinations())[::19]
    with_recipe = [
        (task, model, paper)
        for task, model, paper in combinations()
        if (config.conf_dir() / "recipe_model" / paper / f"{task}_{model}.yaml").is_file()
    ]
    seen = [set(names) for names in zip(*chosen, strict=True)]
    assert seen == [set(names) for names in zip(*combinations(), strict=True)]
    for combination in {*chosen, *with_recipe}:
        assert_composes(*combination)


@pytest.mark.slow
def test_every_model_composes_with_every_task_and_recipe():
    for combination in combinations():
        assert_composes(*combination)


def test_every_overlay_of_a_recipe_holds_known_settings_only():
    backbone = set(schema.BackboneConfig.__dataclass_fields__)
    train = set(schema.TrainConfig.__dataclass_fields__)
    for path in (config.conf_dir() / "recipe").rglob("*.yaml"):
        overlay = OmegaConf.to_container(OmegaConf.load(path))
        assert path.read_text().startswith("# @package _global_"), path
        assert set(overlay) <= {"defaults", "batch_size", "length", "task", "model", "train", "paper"}, path
        assert set(overlay.get("model", {})) <= backbone, path
        assert set(overlay.get("train", {})) <= train, path
    for path in (config.conf_dir() / "recipe_model").rglob("*.yaml"):
        model = path.stem.split("_", 1)[1]
        own = set(registry.own_names(model)) | backbone
        assert set(OmegaConf.to_container(OmegaConf.load(path)).get("model", {})) <= own, path


def test_a_recipe_names_what_it_does_otherwise_under_these_settings_only():
    def deviations(*overrides):
        return " ".join(compose([*overrides, "paper=nystromformer2021"]).deviations)

    assert "held out" in deviations("task=text")
    assert "held out" not in deviations("task=text", "task.val=test")
    assert "last one of the source's own order" in deviations("task=image")
    assert "last one of" not in deviations("task=image", "task.split=random")
    assert "generated here" in deviations("task=pathfinder32")
    assert "generated here" not in deviations("task=pathfinder32", "task.source=files")
    for task in ("image", "pathfinder32"):
        assert "black pixels are tokens like others" in deviations(f"task={task}")


def test_the_settings_that_a_deviation_depends_on_exist():
    from lra import tasks

    for path in (config.conf_dir() / "recipe").rglob("*.yaml"):
        overlay = OmegaConf.to_container(OmegaConf.load(path))
        for deviation in overlay.get("paper", {}).get("task_deviations", []):
            fields = {f.name for f in dataclasses.fields(tasks.get(path.stem))}
            assert set(deviation.get("when", {})) <= fields and deviation["text"], path


def test_names_of_files_classes_and_settings_are_one():
    models = registry.load_models()
    assert registry.names() == models.names()
    assert set(config.options("model")) == {*registry.names(), "custom"}


def test_a_foreign_package_called_models_is_refused_by_its_path(tmp_path, monkeypatch):
    import sys
    import types

    foreign = types.ModuleType("models")
    foreign.__file__ = str(tmp_path / "models" / "__init__.py")
    monkeypatch.setitem(sys.modules, "models", foreign)
    with pytest.raises(UserError, match=str(tmp_path)):
        registry.load_models()


QUIRKS = {
    "softmax": set(),
    "linear": {"normalise"},
    "performer": {"coupled_stabiliser", "double_scaling", "zero_padding"},
    "linformer": {"share", "init_std"},
    "nystrom": {"count_padding", "coupled_start"},
    "reformer": {"across_buckets", "score_scale"},
}


@pytest.mark.parametrize("task", ["listops", "text", "retrieval", "image", "pathfinder32"])
@pytest.mark.parametrize("model", QUIRKS)
def test_the_released_recipe_differs_by_its_quirks_alone(task, model):
    published, released = (
        compose([f"paper={paper}", f"task={task}", f"model={model}"])
        for paper in ("nystromformer2021", "nystromformer2021_released")
    )
    own = {key for key, value in released.model.own.items() if published.model.own[key] != value}
    assert own == QUIRKS[model]
    assert released.model.backbone == published.model.backbone and released.train == published.train
    black = {task: "padding" for task in ("image", "pathfinder32")}.get(task, "pixel")
    assert released.task.black == black and published.task.black == "pixel"
    assert len(published.deviations) - len(released.deviations) == (black == "padding")
