"""The search over mechanisms: who is trained on what, what it tells, and what is trained again."""

import pytest
import torch

from lra import cli, records, run
from lra.architecture import WARMUP_SHARE, ArchitectureStep
from lra.config import compose
from lra.data.prepare import prepare
from lra.errors import UserError
from lra.optimizer import is_architecture
from lra.search import Found, retraining, search, searching, told
from lra.train import Trainer

SEARCH = ["model=search", "model.candidates=[identity,softmax]"]


def trainer(overrides, folder) -> Trainer:
    config = compose(overrides)
    folder.mkdir(parents=True, exist_ok=True)
    return Trainer(config, prepare(config.task, config.length), folder)


def split_parameters(made) -> tuple[list, list]:
    every = list(made.model.parameters())
    return [p for p in every if is_architecture(p)], [p for p in every if not is_architecture(p)]


def take_architecture_step(made) -> None:
    held_out = made.batches["architecture"]
    made.architecture(held_out, held_out.plans(0, micro_batch=made.config.train.micro_batch))


def test_training_batches_move_mixers_alone_and_validation_batches_weights_alone(tiny, tmp_path):
    made = trainer(tiny(*SEARCH), tmp_path)
    sought, others = split_parameters(made)
    before = [p.detach().clone() for p in (*sought, *others)]
    made.step.train(made.batches["train"], made.batches["train"].plans(0), lr=0.1)
    assert all(torch.equal(p, b) for p, b in zip(sought, before, strict=False))
    assert any(not torch.equal(p, b) for p, b in zip(others, before[len(sought) :], strict=True))
    before = [p.detach().clone() for p in others]
    take_architecture_step(made)
    assert all(torch.equal(p, b) for p, b in zip(others, before, strict=True))
    assert made.model.mechanisms()[0].findings() != pytest.approx({"identity": 0.5, "softmax": 0.5})


def test_validation_rows_train_the_weights(tiny, tmp_path):
    made = trainer(tiny(*SEARCH), tmp_path)
    assert made.batches["architecture"].num_rows == made.batches["val"].num_rows == 100
    assert made.batches["architecture"].split is made.batches["val"].split


def test_no_optimizer_of_weights_where_nothing_is_sought(tiny, tmp_path):
    made = trainer(tiny(), tmp_path)
    assert made.architecture is None
    assert ArchitectureStep.of(made.step, made.config) is None
    grouped = len(made.step.optimizer.parameters)
    assert grouped == len(list(made.model.parameters()))


def test_the_weights_wait_until_the_mixers_have_begun_to_learn(tiny, tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(ArchitectureStep, "__call__", lambda self, *_: steps.append(made.state.step))
    made = trainer(tiny(*SEARCH), tmp_path)
    made.run()
    assert steps == list(range(round(WARMUP_SHARE * 20), 20))


def test_a_search_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tiny, tmp_path):
    whole = trainer(tiny(*SEARCH, "train.checkpoint_every=10"), tmp_path / "whole")
    whole.run()
    half = trainer(tiny(*SEARCH, "train.checkpoint_every=10"), tmp_path / "half")
    monkey = half._evaluate_and_keep

    def stop_at_ten():
        monkey()
        half._save()
        raise KeyboardInterrupt

    half._evaluate_and_keep = stop_at_ten
    with pytest.raises(KeyboardInterrupt):
        half.run()
    again = trainer(tiny(*SEARCH, "train.checkpoint_every=10"), tmp_path / "half")
    again.run()
    assert again.model.mechanisms()[0].findings() == whole.model.mechanisms()[0].findings()


def test_a_search_with_a_loss_scale_or_too_few_validation_rows_is_refused(tiny, tmp_path):
    with pytest.raises(UserError, match="precision=bf16"):
        trainer(tiny(*SEARCH, "train.precision=fp16"), tmp_path / "a")
    with pytest.raises(UserError, match="100 validation rows"):
        trainer(tiny(*SEARCH, "batch_size=200"), tmp_path / "b")


def test_the_record_holds_the_weights_of_every_layer(tiny):
    record = run.execute(compose(tiny(*SEARCH, "model.num_layers=2")))
    layers = records.read(records.runs_root() / record.run_id).extra["findings"]
    assert len(layers) == 2
    assert all(set(layer) == {"identity", "softmax"} for layer in layers)
    assert all(abs(sum(layer.values()) - 1) < 1e-3 for layer in layers)
    assert "findings" not in run.execute(compose(tiny())).extra


def test_a_search_takes_the_last_weights_unless_asked_otherwise():
    assert compose(searching(["length=32"])).train.selection == "last"
    assert compose(searching(["length=32", "train.selection=best_val"])).train.selection == "best_val"
    assert compose(searching(["length=32"])).model.name == "search"
    with pytest.raises(UserError, match="model.candidates="):
        searching(["model=softmax"])


def test_the_answer_is_trained_under_the_same_recipe():
    asked = [
        "length=32",
        "train.lr=0.01",
        "train.arch_lr=0.1",
        "model.candidates=[identity,local,softmax]",
        "model.settings={local:{window:3}}",
        "model.d_model=32",
    ]
    config = compose(retraining(asked, ["local", "softmax"]))
    assert config.model.name == "hybrid"
    assert config.model.own == {"layers": ["local", "softmax"], "settings": {"local": {"window": 3}}}
    assert (config.train.lr, config.model.backbone.d_model) == (0.01, 32)
    assert config.train.selection == "best_val"
    assert compose(retraining(asked, ["softmax", "softmax"])).model.own["settings"] == {}
    assert compose(retraining(asked, ["local"])).model.own["settings"] == {"local": {"window": 3}}


def test_a_search_tells_its_weights_and_trains_its_answer_again(tiny):
    (found,) = search(tiny("model.candidates=[identity,softmax]", "model.num_layers=2"), beside=True)
    assert [record.model for record in found.runs] == ["search", *["hybrid"] * 3]
    assert [r.extra["own"]["layers"] for r in found.beside] == [["identity"], ["softmax"]]
    assert found.again[0].extra["own"]["layers"] == found.chosen
    text = told(found)
    assert "inspired by Hao and Zhu 2021" in text
    assert len(text.splitlines()) == 3


def test_the_heaviest_candidate_is_chosen_and_a_failed_search_says_why():
    record = records.Record(
        kind="train",
        run_id="x",
        status="ok",
        model="search",
        task="listops",
        length=32,
        seed=0,
        extra={"findings": [{"softmax": 0.2, "local": 0.8}, {"softmax": 0.6, "local": 0.4}]},
    )
    assert Found(record).chosen == ["local", "softmax"]
    broken = records.Record(
        kind="train", run_id="x", status="oom", reason="too big", model="search", task="listops", length=32
    )
    assert "oom: too big" in told(Found(broken))


def test_micro_batches_make_one_update_of_the_same_size(tiny, tmp_path):
    found = []
    for micro in ("null", "8"):
        made = trainer(tiny(*SEARCH, f"train.micro_batch={micro}"), tmp_path / micro)
        made.model.eval()  # no dropout between the two
        take_architecture_step(made)
        found.append(made.model.mechanisms()[0].embeddings.detach().clone())
    torch.testing.assert_close(*found)


def test_validation_batches_leave_statistics_and_centroids_alone(tiny, tmp_path):
    own = ["model=search", "model.candidates=[routing,linear]", "model.norm=batch"]
    made = trainer(tiny(*own), tmp_path)
    made.model.train()
    before = {name: buffer.clone() for name, buffer in made.model.named_buffers()}
    take_architecture_step(made)
    assert len(before) > 4
    assert all(torch.equal(buffer, before[name]) for name, buffer in made.model.named_buffers())


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (["model.candidates=[identity,linear],[identity,foo]"], "'foo' is unknown"),
        (["model.candidates=identity,linear"], r"write model.candidates=\[softmax"),
        (["model.candidates=[identity,[linear]]"], "is no list of mixers"),
        (["seed=0,0"], "asked for twice"),
        (["model.settings=[1]"], "is no mapping from mixers"),
        (["model.settings={local:{window:abc}}"], "window='abc' is no int"),
        (["model.settings={local:{window:2.5}}"], "window=2.5 is no int"),
        (["model.settings={local:3}"], "settings of 'local' are 3"),
    ],
)
def test_what_is_wrong_is_told_before_the_first_run(tiny, own, message, monkeypatch):
    monkeypatch.setattr("lra.launch.sweep.train", lambda *args, **kwargs: pytest.fail("a run began"))
    with pytest.raises(UserError, match=message):
        search(tiny(*own))


def test_a_search_without_a_learning_rate_is_refused(tiny, tmp_path):
    with pytest.raises(UserError, match="arch_lr=0"):
        trainer(tiny(*SEARCH, "train.arch_lr=0"), tmp_path)


@pytest.mark.parametrize("settings", [["model.tied_layers=true"], ["model.num_layers=1"]])
def test_a_hybrid_names_no_more_mixers_than_there_are_layers(settings):
    with pytest.raises(UserError, match="2 mixers for 1 distinct layers"):
        compose(["model=hybrid", "model.layers=[softmax,linear]", *settings])


def test_weights_that_are_hardly_apart_are_called_undecided():
    def text(weights):
        facts = {"status": "ok", "model": "search", "task": "listops", "length": 32, "seed": 0}
        return told(Found(records.Record(kind="train", run_id="x", extra={"findings": [weights]}, **facts)))

    assert "undecided" in text({"softmax": 0.505, "identity": 0.495})
    assert "undecided" not in text({"softmax": 0.52, "identity": 0.48})


def test_the_verb_prints_weights_and_table(tiny, capsys):
    assert cli.main(["search", *tiny("model.candidates=[identity,linear]")]) == 0
    printed = capsys.readouterr().out
    assert "layer 0: " in printed
    assert "hybrid" in printed
    assert cli.main(["search", *tiny("model=linear")]) == 2
    assert "model.candidates=" in capsys.readouterr().err
