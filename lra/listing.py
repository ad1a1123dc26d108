"""What `lra list` shows: mechanisms with their traits, tasks, papers."""

from typing import Any

from rich.console import Console
from rich.table import Table

from lra import config, registry, tasks
from lra.schema import ModelConfig


def listing(what: str, *, leaks: bool = False) -> list[dict[str, Any]]:
    """One object per model, task or paper, each with `name` and `about`."""
    return {"models": _models, "tasks": _tasks, "papers": _papers}[what](
        **({"leaks": leaks} if what == "models" else {})
    )


def _models(*, leaks: bool) -> list[dict[str, Any]]:
    import importlib

    models = registry.load_models()
    rows = []
    for name in models.names():
        cls = models.get(name)
        about = (importlib.import_module(cls.__module__).__doc__ or "").strip().splitlines()[0]
        kind = "block" if issubclass(cls, models.Block) else "mixer"
        traits = registry.traits(ModelConfig(name))  # of an instance: options may change those of the class
        row = {"name": name, "kind": kind, "packed": traits.packed, "about": about}
        row["exceptions"] = traits.exceptions()
        if leaks:
            from lra.conformance import leaks as measure_leaks

            row["leaks"] = measure_leaks(name)
        rows.append(row)
    return rows


def _tasks() -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "classes": tasks.get(name).num_classes,
            "length": tasks.get(name).default_length,
            "about": tasks.get(name).description,
        }
        for name in tasks.names()
    ]


def _papers() -> list[dict[str, Any]]:
    rows = []
    for name in config.options("paper"):
        if name != "none":
            paper = config.paper(name)
            rows.append({"name": name, "version": paper.version, "tasks": paper.tasks, "about": paper.title})
    return rows


LEAKS = {"content": "content of padding", "length": "more padding", "batch": "batch mates"}


def render_leaks(rows: list[dict[str, Any]]) -> str:
    """The measured leaks as a table for a terminal; where one is claimed, the reason stands below."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("name", no_wrap=True)
    for heading in LEAKS.values():
        table.add_column(heading, justify="right")
    reasons = []
    for row in rows:
        cells = []
        for kind in LEAKS:
            claimed = f"{kind}_invariant" in row["exceptions"]
            cells.append(f"{row['leaks'][kind]:.0e}{' *' if claimed else '  '}")
            if claimed:
                reasons.append(f"* {row['name']}, {LEAKS[kind]}: {row['exceptions'][f'{kind}_invariant']}")
        table.add_row(row["name"], *cells)
    console = Console(width=None)
    with console.capture() as capture:
        console.print(table)
    about = [
        "Largest change of a real output over the largest output, in float64, when only",
        "what the column names changes. Up to 1e-09 is rounding.",
    ]
    return "\n".join([*about, "", capture.get().rstrip("\n"), "", *reasons])


def render(rows: list[dict[str, Any]]) -> str:
    """The rows as a table for a terminal; trait exceptions on lines of their own."""
    if rows and "leaks" in rows[0]:
        return render_leaks(rows)
    console = Console(width=None)
    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = [key for key in rows[0] if key != "exceptions"] if rows else ["name"]
    for column in columns:
        table.add_column(column, no_wrap=column == "name")
    for row in rows:
        table.add_row(*(_text(row[column]) for column in columns))
        for trait, reason in row.get("exceptions", {}).items():
            table.add_row("", *[""] * (len(columns) - 2), f"{_unusual(trait)}: {reason}")
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip("\n")


def _unusual(trait: str) -> str:
    """A trait's exception in words: 'not length_invariant', but 'fixed_length'."""
    return f"not {trait}" if trait.endswith("_invariant") or trait == "capturable" else trait


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if isinstance(value, list) else str(value)
