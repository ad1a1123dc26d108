"""One page for a browser, of tables, figures and runs: one file that needs no other and no network."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from lra import records
from lra.report import groups as grouping
from lra.report import markup, page_runs, tables
from lra.report.cells import Table
from lra.report.groups import TASK_TITLES, device_title, distinct, recipe_title

if TYPE_CHECKING:
    import pandas as pd

    from lra.report.figure import NamedFigure

TITLE = "Long Range Arena: what was run"
ENDINGS = re.compile(r"\b(diverged|failed|interrupted|unsupported|oom|out of memory)\b")
DATE = re.compile(r"(\d{4})-?(\d\d)-?(\d\d)")
REPEATED = re.compile(r"more than 10 % more parameters|rows of different settings stand together")
SHOWN = 5  # warnings or failures of one kind that stand open

FIGURES = "Numbers behind the figures stand in the tables; learning curves are those of each run's metrics."
RUNS = (
    "A run opens to its settings, its environment and the command that repeats it. Where a run is done "
    "already, the command only reads it; with <code>--force</code> it runs again."
)


def page(frame: "pd.DataFrame", *, title: str = TITLE, figures: "Sequence[NamedFigure] | None" = None) -> str:
    """The whole page as HTML; `figures` None draws all for which the records have material."""
    made = tables.build(frame)
    if figures is None:
        from lra.report.figures import every_figure

        figures = every_figure(frame)
    runs = [run for kind in records.KINDS for run in grouping.runs_of(frame, kind)]
    table_ids = [f"table-{index}" for index in range(1, len(made) + 1)]
    figure_ids = [f"figure-{index}" for index in range(1, len(figures) + 1)]
    run_ids = page_runs.ids(runs, {"top", "filter", "tables", "figures", "runs", *table_ids, *figure_ids})
    body = [
        f'<header id="top">\n<h1>{escape(title)}</h1>',
        _cautions(made, table_ids, runs, run_ids),
        _loaded(runs),
        _contents(made, table_ids, figures, figure_ids),
        "</header>\n<main>",
        _filter(),
        '<section id="tables">\n<h2>Tables</h2>\n<p class="small only-scripted">The name of a '
        "column sorts by it, upwards, downwards, and as it was.</p>",
        *(_table(*both) for both in zip(made, table_ids, strict=True)),
        "</section>",
        _figures(figures, figure_ids),
        f'<section id="runs">\n<h2>Runs</h2>\n<p class="small">{RUNS}</p>',
        page_runs.runs_table(runs, run_ids),
        "</section>\n</main>",
    ]
    style = markup.STYLE + _asset("page.css")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + f"\n<script>\n{_asset('page.js')}</script>\n</body>\n</html>\n"
    )


def _asset(name: str) -> str:
    return (files("lra.report") / name).read_text(encoding="utf-8")


# What stands first.


def _cautions(made: list[Table], table_ids: list[str], runs: list[dict], run_ids: list[str]) -> str:
    """Warnings of the tables, each once with the tables it is about, and runs that did not end well."""
    found: dict[str, list[str]] = {}
    for number, (table, table_id) in enumerate(zip(made, table_ids, strict=True), start=1):
        for warning in table.warnings:
            found.setdefault(warning, []).append(f'<a href="#{table_id}">{number}</a>')
    alike: dict[tuple[str, ...], list[str]] = {}
    for text, where in found.items():
        kind = REPEATED.search(text)
        alike.setdefault((kind[0] if kind else text, *where), []).append(text)
    items = [_caution(kind, texts, where) for (kind, *where), texts in alike.items()]
    return _box("Before you compare", items) + _box("Runs that did not end well", _failures(runs, run_ids))


def _caution(kind: str, texts: list[str], where: list[str]) -> str:
    """A warning with links to its tables; several of one kind about the same tables as one that opens."""
    tables_named = f"<span>(table{'s' * (len(where) > 1)} {', '.join(where)})</span>"
    if len(texts) == 1:
        return f"{escape(texts[0])} {tables_named}"
    inside = "".join(f"<li>{escape(text)}</li>" for text in texts)
    title = f"{escape(kind)}: {len(texts)} warnings"
    return f"<details><summary>{title} {tables_named}</summary><ul>{inside}</ul></details>"


def _failures(runs: list[dict], run_ids: list[str]) -> list[str]:
    """What failed and why, each once, with links to the runs it happened to."""
    found: dict[tuple[str, str], list[str]] = {}
    for run, run_id in zip(runs, run_ids, strict=True):
        if run["status"] == "ok":
            continue
        what = grouping.data_title(run | {"data_variant": None, "data_origin": None})
        reason = tables.short_reason(run["reason"])
        status = "" if reason.lower().startswith(run["status"]) else run["status"]
        which = f"seed {run['seed']}" if run["kind"] == "train" else page_runs.kind(run)
        found.setdefault(
            (f"{page_runs.name(run)}, {what}", ": ".join(text for text in (status, reason) if text)), []
        ).append(f'<a href="#{escape(run_id)}">{escape(which)}</a>')
    return [
        f"{escape(what)}, {', '.join(links)}: {escape(reason)}" for (what, reason), links in found.items()
    ]


def _box(title: str, items: list[str]) -> str:
    if not items:
        return ""
    lines = [f"<li>{item}</li>" for item in items]
    rest = "".join(lines[SHOWN:])
    more = f"<details><summary>{len(items) - SHOWN} more</summary><ul>{rest}</ul></details>" if rest else ""
    return (
        f'<section class="caution">\n<h2>{title}</h2>\n<ul>{"".join(lines[:SHOWN])}</ul>{more}\n</section>\n'
    )


def _loaded(runs: list[dict]) -> str:
    statuses = Counter(run["status"] for run in runs)
    kinds = Counter(run["kind"] for run in runs)
    named = {"train": "training run", "measure": "measurement"}
    tasks = [task for task in TASK_TITLES if any(run["task"] == task for run in runs)]
    tasks += [task for task in distinct(run["task"] for run in runs) if task not in tasks]
    lengths = {
        task: sorted({r["length"] for r in runs if r["task"] == task and r["length"]}) for task in tasks
    }
    days = sorted({day for run in runs if (day := _day(run))})
    facts = {
        "runs": ", ".join(f"{n:,} {named[kind]}{'s' * (n != 1)}" for kind, n in kinds.items()),
        "status": ", ".join(f"{statuses[s]:,} {s}" for s in records.STATUSES if statuses[s]),
        "tasks": ", ".join(
            TASK_TITLES.get(task, task) + (f" ({', '.join(f'{n:,}' for n in at)} tokens)" if at else "")
            for task, at in lengths.items()
        ),
        "mechanisms": ", ".join(distinct(run["model"] for run in runs)),
        "recipes": ", ".join(distinct(recipe_title(run).removeprefix("recipe ") for run in runs)),
        "devices": ", ".join(distinct(device_title(run) for run in runs)),
        "software": ", ".join(f"torch {version}" for version in distinct(run["torch"] for run in runs)),
        "revisions": ", ".join(_revision(r) for r in distinct(run["git_revision"] for run in runs)),
        "dates": " to ".join(dict.fromkeys([days[0], days[-1]])) if days else "",
    }
    lines = "".join(f"<div><dt>{k}</dt><dd>{escape(text)}</dd></div>" for k, text in facts.items() if text)
    return f'<dl class="loaded">{lines}</dl>'


def _revision(revision: str) -> str:
    """`72e9cf2561`, with what follows the hash, as `-dirty`."""
    return re.sub(r"^([0-9a-f]{10})[0-9a-f]+", r"\1", revision)


def _day(run: dict) -> str | None:
    """The day a run began, by its log or the name of its sweep."""
    log = Path(run["path"]) / "log.txt"
    first = ""
    if log.is_file():
        with open(log, encoding="utf-8", errors="replace") as file:
            first = file.readline()
    match = DATE.match(first) or DATE.search(str(run["sweep"] or ""))
    return "-".join(match.groups()) if match else None


def _contents(
    made: list[Table], table_ids: list[str], figures: "Sequence[NamedFigure]", figure_ids: list[str]
) -> str:
    of_tables = [
        f'<a href="#{one}">{escape(", ".join(table.title[:2]))}</a>'
        for table, one in zip(made, table_ids, strict=True)
    ]
    titled = [f"{named.title}{which}" for named, which in zip(figures, _which(figures), strict=True)]
    of_figures = [
        f'<a href="#{one}">{escape(title)}</a>' for title, one in zip(titled, figure_ids, strict=True)
    ]
    lists = [("table", of_tables), ("figure", of_figures)]
    parts = []
    for what, links in lists:
        items = "".join(f"<li>{link}</li>" for link in links)
        title = f"{len(links)} {what}{'s' * (len(links) != 1)}"
        parts += [f"<details><summary>{title}</summary><ol>{items}</ol></details>"] if links else []
    return f'<nav aria-label="Contents">{"".join(parts)}<a href="#runs">Runs</a></nav>'


def _filter() -> str:
    """What the script fills and shows: one filter for all rows of the page."""
    selects = "".join(
        f'<label>{key} <select name="{name}"><option value="">all</option></select></label>'
        for key, name in (("task", "task"), ("mechanism", "model"), ("status", "status"))
    )
    return (
        '<form id="filter" hidden>\n<label>rows with <input type="search" name="words" '
        f'autocomplete="off" placeholder="words"></label>{selects}\n'
        '<button type="reset">Show all</button> <output></output>\n</form>'
    )


# Tables and figures.


def _table(table: Table, table_id: str) -> str:
    plain = table.data if len(table.data) == len(table.rows) else [{}] * len(table.rows)
    titled = next((t for t, name in TASK_TITLES.items() if any(name in part for part in table.title)), None)
    attributes = [
        page_runs.marks(
            task=line.get("task") or titled,
            model=line.get("mechanism") or re.split(r" [\[(]", row[table.columns[0].key])[0],
            status=" ".join(_endings(row.values(), line.get("status"))),
        )
        for row, line in zip(table.rows, plain, strict=True)
    ]
    return f'<div id="{table_id}" class="sortable">\n{markup.html_table(table, attributes)}\n</div>'


def _endings(texts: Iterable[str], status: str | None) -> list[str]:
    """The statuses that a row speaks of; a row that speaks of none is of runs that ended well."""
    told = {"oom" if word == "out of memory" else word for text in texts for word in ENDINGS.findall(text)}
    return sorted(told | ({status} if status else set()) | (set() if told else {"ok"}))


def _figures(figures: "Sequence[NamedFigure]", figure_ids: list[str]) -> str:
    if not figures:
        return ""
    from lra.report.figure import as_svg
    from lra.report.figures import KINDS

    parts = []
    for named, which, one in zip(figures, _which(figures), figure_ids, strict=True):
        svg = as_svg(named.figure, f"{one}-svg", title=f"{named.title}{which}")
        caption = _caption(named.title, KINDS.get(named.name.partition("-")[0], ""), which)
        parts.append(
            f'<figure id="{one}">\n<div class="plate" tabindex="0">{svg}</div>\n'
            f"<figcaption>{caption}</figcaption>\n</figure>"
        )
    return f'<section id="figures">\n<h2>Figures</h2>\n<p class="small">{FIGURES}</p>\n' + "\n".join(
        [*parts, "</section>"]
    )


def _which(figures: "Sequence[NamedFigure]") -> list[str]:
    """What to add to each title: the tasks of figures that share one, and a number if they do not do."""
    shared = Counter(named.title for named in figures)
    added = [_tasks(named) if shared[named.title] > 1 else "" for named in figures]
    same = Counter(zip((named.title for named in figures), added, strict=True))
    seen: Counter[tuple[str, str]] = Counter()
    found = []
    for named, tasks in zip(figures, added, strict=True):
        both = (named.title, tasks)
        seen[both] += 1
        found.append(tasks + (f" ({seen[both]} of {same[both]})" if same[both] > 1 else ""))
    return found


def _tasks(named: "NamedFigure") -> str:
    """`, ListOps, Text`: the tasks that the titles of a figure's panels name."""
    heads = [axes.get_title(loc) for axes in named.figure.axes for loc in ("left", "center", "right")]
    heads += [text.get_text() for text in named.figure.texts]
    return "".join(f", {name}" for name in TASK_TITLES.values() if any(name in head for head in heads))


def _caption(title: str, about: str, which: str = "") -> str:
    """The title of a figure and what else its kind says, once; `which` tells it from others of its kind."""
    head, _, rest = about.partition(", ")
    if about.lower().startswith(title.lower()):
        title, rest = title + about[len(title) :], ""
    elif not title.lower().startswith(head.lower()):
        rest = about
    return f"<b>{escape(title)}</b>{escape(which)}" + (f": {escape(rest)}" if rest else "")
