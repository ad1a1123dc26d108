"""The runs of a page: one table of all, each of which opens to its settings, environment and command."""

import re
from html import escape
from typing import Any

from lra.report.cells import number, si
from lra.report.groups import TASK_TITLES, data_title, extra_of, own_of, recipe_title, value_text
from lra.report.page_command import config_of, repeat

COLUMNS = (  # title, whether it holds words
    ("mechanism", True),
    ("task", True),
    ("length", False),
    ("seed", False),
    ("status", True),
    ("accuracy", False),
    ("step ms", False),
    ("peak MiB", False),
    ("wall s", False),
    ("kind", True),
)
SETTING = (  # what defines a run, also where its config.yaml is not at hand
    "task", "model", "paper", "recipe_version", "length", "seed", "batch_size", "d_model", "num_layers",
    "selection", "data_variant", "data_origin", "data_hash", "config_hash",
)  # fmt: skip
ENVIRONMENT = (
    "device", "num_devices", "host", "precision", "step_mode", "layout", "step_reason", "recurrence_kernel",
    "peak_mem_method", "torch", "git_revision",
)  # fmt: skip
FOUND = (
    "test_accuracy", "val_accuracy", "num_test", "majority_accuracy", "best_step", "num_steps", "num_params",
    "state_size", "flops_per_step", "step_ms", "step_ms_quartiles", "examples_per_s", "tokens_per_s",
    "peak_mem_mib", "memory_mib", "reserved_mib", "largest_length", "train_s", "eval_s", "data_s",
    "compile_s", "wall_s",
)  # fmt: skip
IN_FULL = ("seed", "best_step", "num_steps", "num_test", "num_devices", "length", "batch_size")


def kind(run: dict) -> str:
    """`train`, or what was measured."""
    return "train" if run["kind"] == "train" else f"measure {extra_of(run, 'mode') or 'train'}"


def name(run: dict) -> str:
    """The mechanism and its parameters that are not at their default."""
    own = value_text("own", own_of(run))
    return f"{run['model']} ({own})" if own else run["model"]


def ids(runs: list[dict], taken: set[str]) -> list[str]:
    """An id in the page for each run: its run_id as an address holds it, numbered where another has it."""
    found = []
    for run in runs:
        plain = re.sub(r"[^\w.:-]+", "-", run["run_id"]) or "run"
        one, count = plain, 1
        while one in taken:
            count += 1
            one = f"{plain}-{count}"
        taken.add(one)
        found.append(one)
    return found


def runs_table(runs: list[dict], run_ids: list[str]) -> str:
    """The table of all runs; each is a <tbody> of two rows, the second of which holds a <details>."""
    head = "".join(f'<th scope="col"{_class(title, words)}>{title}</th>' for title, words in COLUMNS)
    bodies = [_body(run, one) for run, one in zip(runs, run_ids, strict=True)]
    return (
        '<section class="lra-table">\n<div class="wide">\n<table class="runs">\n'
        f"<thead>\n<tr>{head}</tr>\n</thead>\n" + "\n".join(bodies) + "\n</table>\n</div>\n</section>"
    )


def marks(**values: str | None) -> str:
    """Attributes by which the script filters a row: `data-task`, `data-model`, `data-status`."""
    return "".join(f' data-{key}="{escape(value)}"' for key, value in values.items() if value)


def _class(title: str, words: bool) -> str:
    names = ["left"] * words + ["status"] * (title == "status")
    return f' class="{" ".join(names)}"' if names else ""


def _body(run: dict, run_id: str) -> str:
    accuracy = run["test_accuracy"]
    cells = (
        TASK_TITLES.get(run["task"], run["task"]),
        "-" if run["length"] is None else f"{run['length']:,}",
        "-" if run["seed"] is None else str(run["seed"]),
        run["status"],
        "-" if accuracy is None else f"{100 * accuracy:.1f}",
        number(run["step_ms"]),
        number(run["peak_mem_mib"]),
        number(run["wall_s"]),
        kind(run),
    )
    row = "".join(
        f"<td{_class(title, words)}>{escape('–' if text == '-' else text)}</td>"
        for text, (title, words) in zip(cells, COLUMNS[1:], strict=True)
    )
    filters = marks(task=run["task"], model=run["model"], status=run["status"])
    link = f'<a href="#{escape(run_id)}">{escape(name(run))}</a>'
    return (
        f'<tbody{filters}>\n<tr><th scope="row" class="left">{link}</th>{row}</tr>\n'
        f'<tr class="more"><td colspan="{len(COLUMNS)}">{_details(run, run_id)}</td></tr>\n</tbody>'
    )


def _details(run: dict, run_id: str) -> str:
    config = config_of(run)
    parts = [_reason(run), _command(run, config)]
    own = [("own parameters", value_text("own", own_of(run)))] if own_of(run) else []
    facts = (
        ("Settings", _facts(run, SETTING) + own),
        ("What it found", _facts(run, FOUND)),
        ("Environment", _facts(run, ENVIRONMENT) + _versions(run)),
    )
    parts.append(f'<div class="facts">{"".join(_list(title, rows) for title, rows in facts if rows)}</div>')
    if run["deviations"]:
        items = "".join(f"<li>{escape(str(text))}</li>" for text in run["deviations"])
        parts.append(f"<h4>Otherwise than the recipe</h4><ul>{items}</ul>")
    if config is not None:
        parts.append(f'<h4>config.yaml</h4><pre class="config" tabindex="0">{escape(config)}</pre>')
    title = f"<b>{escape(name(run))}</b> {escape(data_title(run))} <code>{escape(run['run_id'])}</code>"
    inside = "\n".join(part for part in parts if part)
    return f'<details id="{escape(run_id)}" class="run">\n<summary>{title}</summary>\n{inside}\n</details>'


def _reason(run: dict) -> str:
    if run["status"] == "ok":
        return ""
    reason = run["reason"] or "no reason on record"
    return f'<p class="reason"><strong>{escape(run["status"])}</strong>: {escape(str(reason))}</p>'


def _command(run: dict, config: str | None) -> str:
    command, note = repeat(run, config)
    if not command:
        return "<h4>Command</h4><p>none on record</p>"
    note = f'<p class="small">{escape(note)}</p>' if note else ""
    button = '<button type="button" class="copy only-scripted">Copy</button>'
    code = f'<pre tabindex="0">{escape(command)}</pre>'
    return f'<h4>Repeat this run</h4><div class="command">{code}{button}</div>{note}'


def _facts(run: dict, keys: tuple[str, ...]) -> list[tuple[str, str]]:
    found = [(key, extra_of(run, key)) for key in keys]
    return [(key, _text(run, key, value)) for key, value in found if value is not None and value != ""]


def _text(run: dict, key: str, value: Any) -> str:
    if key == "paper":
        return recipe_title(run).removeprefix("recipe ")
    if isinstance(value, dict):
        return ", ".join(f"{part} {_text(run, part, inner)}" for part, inner in value.items())
    if isinstance(value, list):
        return ", ".join(_text(run, key, inner) for inner in value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if key.endswith("_accuracy"):
        return f"{100 * value:.2f} %"
    if key in IN_FULL:
        return f"{value:,}"
    return number(value) if isinstance(value, float) and value < 1e6 else si(value, " ")


def _versions(run: dict) -> list[tuple[str, str]]:
    versions = run["versions"] if isinstance(run["versions"], dict) else {}
    return [(str(key), str(value)) for key, value in versions.items() if key != "torch" or not run["torch"]]


def _list(title: str, rows: list[tuple[str, str]]) -> str:
    lines = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(text)}</dd></div>" for key, text in rows)
    return f"<div><h4>{title}</h4><dl>{lines}</dl></div>"
