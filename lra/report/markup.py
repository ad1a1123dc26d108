"""Tables as LaTeX for a paper and as HTML for a browser: the same words as in a terminal, set properly."""

import re
from collections.abc import Sequence
from html import escape

from lra.report.cells import Column, Table

RANGE = re.compile(r"(?<=\d) - (?=\d)")  # 32.9 - 35.9
MINUS = re.compile(r"(?<![\w.-])-(?=\d)")  # -0.4
MARKS = re.compile(r"( ?[†‡])$")
PAGE, LINES = 84, 40  # characters beside and rows below each other in the small print of a page
NOTE = "note"  # a column of sentences: LaTeX puts them below the table


def _typeset(text: str) -> str:
    """One line, with the dashes and minus signs that a keyboard lacks."""
    text = " ".join(text.split())
    return "–" if text == "-" else MINUS.sub("−", RANGE.sub("–", text))


def _parts(text: str, column: Column) -> tuple[str, str]:
    """A cell and what stands above its end: letters of ties (after two spaces), daggers."""
    if not column.wrap and "  " in text:
        main, _, letters = text.partition("  ")
        return main, letters.strip()
    if not column.wrap and (mark := MARKS.search(text)):
        return text[: mark.start()], mark[0].strip()
    return text, ""


# LaTeX.

SPECIAL = {
    "\\": r"\textbackslash{}",
    '"': "''",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    **{mark: f"\\{mark}" for mark in "&%$#_{}"},
    "±": r"$\pm$",
    "†": r"$\dagger$",
    "‡": r"$\ddagger$",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "−": r"$-$",
    "–": "--",
    "—": "---",
    "µ": r"$\mu$",
    "μ": r"$\mu$",
    "²": r"$^2$",
    "³": r"$^3$",
    "°": r"$^\circ$",
    "…": r"\ldots{}",
    "’": "'",
    "‘": "`",
    "“": "``",
    "”": "''",
    "\u00a0": "~",
    "\u202f": r"\,",
    "\u2060": "{}",
}


def latex(tables: list[Table]) -> str:
    """One `table` environment each, or several of a long one; the preamble needs only `booktabs`."""
    return "% \\usepackage{booktabs}\n\n" + "\n".join(_latex_table(table) for table in tables)


def latex_text(text: str) -> str:
    """Text that LaTeX prints as it is; a character that its plain fonts lack becomes a question mark."""
    text = _typeset(text.replace("--", "-\u2060-"))  # a flag of a command is no dash
    return "".join(SPECIAL.get(c, c if " " <= c <= "~" or "À" <= c <= "ÿ" else "?") for c in text)


def _latex_table(table: Table) -> str:
    below = [f"\\textbf{{Warning:}} {latex_text(text)}." for text in table.warnings]
    below += [f"{latex_text(text)}." for text in table.footnotes]
    below += [f"{latex_text(', '.join(rows))}: {latex_text(note)}." for note, rows in _noted(table).items()]
    pages = _pages(table)
    floats = []
    for number, grids in enumerate(pages, start=1):
        lines = [r"\begin{table}", r"\centering", r"\footnotesize", r"\setlength{\tabcolsep}{4pt}"]
        continued = " (continued)" if number > 1 else ""
        lines += [f"\\caption{{{latex_text(', '.join(table.title))}{continued}.}}", r"\smallskip"]
        for index, (columns, rows) in enumerate(grids):
            lines += [r"\par\smallskip"] * (index > 0) + _latex_grid(columns, rows)
        if below and number == len(pages):
            lines += [r"\par\smallskip", r"\begin{minipage}{\linewidth}", r"\scriptsize\raggedright"]
            lines += [*(f"{note}\\par" for note in below), r"\end{minipage}"]
        floats.append("\n".join([*lines, r"\end{table}"]) + "\n")
    return "\n".join(floats)


def _pages(table: Table) -> list[list[tuple[list[Column], list[dict[str, str]]]]]:
    """Columns and rows of each tabular, as many in a float as a page holds."""
    pages, held = [[]], 0
    for columns in _blocks(table):
        for start in range(0, max(len(table.rows), 1), LINES):
            rows = table.rows[start : start + LINES]
            if pages[-1] and held + len(rows) > LINES:
                pages.append([])
                held = 0
            pages[-1].append((columns, rows))
            held += len(rows)
    return pages


def _blocks(table: Table) -> list[list[Column]]:
    """The columns in as many tabulars as a page needs, each with those that name the row; notes left out."""
    keys, rest = table.columns[: table.keys], table.columns[table.keys :]
    blocks = [keys]
    for column in (column for column in rest if column.key != NOTE):
        wider = [*blocks[-1], column]
        fits = sum(_characters(table, c) for c in wider) <= PAGE
        blocks = [*blocks[:-1], wider] if fits or len(blocks[-1]) == len(keys) else [*blocks, [*keys, column]]
    return blocks


def _characters(table: Table, column: Column) -> int:
    return 2 + max(len(text) for text in (column.title, *(row[column.key] for row in table.rows)))


def _latex_grid(columns: list[Column], rows: list[dict[str, str]]) -> list[str]:
    lines = [f"\\begin{{tabular}}{{@{{}}{''.join('l' if c.left else 'r' for c in columns)}@{{}}}}"]
    lines += [r"\toprule", " & ".join(latex_text(c.title) for c in columns) + r" \\", r"\midrule"]
    lines += [" & ".join(_latex_cell(row[c.key], c) for c in columns) + r" \\" for row in rows]
    return [*lines, r"\bottomrule", r"\end{tabular}"]


def _noted(table: Table) -> dict[str, list[str]]:
    """Each note of a table with the rows that have it."""
    found: dict[str, list[str]] = {}
    if any(column.key == NOTE for column in table.columns):
        for row in table.rows:
            names = " ".join(row[column.key] for column in table.columns[: table.keys])
            found.setdefault(row[NOTE], []).append(names)
    return {note: rows for note, rows in found.items() if note}


def _latex_cell(text: str, column: Column) -> str:
    main, above = _parts(text, column)
    return latex_text(main) + (f"\\textsuperscript{{{latex_text(above)}}}" if above else "")


# HTML.

STYLE = """\
.lra-table { margin: 0 0 2.5rem; font: 0.85rem/1.4 system-ui, sans-serif; }
.lra-table .wide { overflow-x: auto; }
.lra-table table { border-collapse: collapse; border-bottom: 2px solid currentColor;
  min-width: min(36rem, 100%); }
.lra-table caption { caption-side: top; text-align: left; padding: 0 0 .5rem; }
.lra-table caption div { position: sticky; left: 0; max-width: calc(100vw - 3rem); }
.lra-table caption b { font-size: 1.05rem; }
.lra-table caption span { opacity: .75; }
.lra-table th, .lra-table td { padding: .2rem .55rem; text-align: right; font-weight: normal;
  vertical-align: top; white-space: nowrap; font-variant-numeric: tabular-nums; }
.lra-table thead th { border-top: 2px solid currentColor; border-bottom: 1px solid currentColor;
  font-weight: 600; }
.lra-table .left { text-align: left; }
.lra-table td.wrap { white-space: normal; min-width: 9rem; }
.lra-table sup { line-height: 0; padding-left: .15em; }
.lra-table ul { margin: .5rem 0 0; padding: 0; list-style: none; font-size: .8rem; max-width: 64rem; }
.lra-table .warning { border-left: 3px solid #b45309; padding-left: .5rem; margin: .25rem 0; }
"""
PAGE_STYLE = "body { margin: 1.5rem; background: #fff; color: #1a1a1a; }\n"


def html_document(tables: list[Table], title: str = "Long Range Arena: tables") -> str:
    """One page that needs nothing else: no script, no network."""
    body = "\n".join(html_table(table) for table in tables)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{PAGE_STYLE}{STYLE}</style>\n</head>\n<body>\n"
        f"{body}\n</body>\n</html>\n"
    )


def html_table(table: Table, attributes: Sequence[str] = ()) -> str:
    """A `<section class="lra-table">` for a page that has `STYLE`: the table, its warnings and footnotes.

    `attributes` go into the tags of the rows, one text each.
    """
    first, *rest = table.title
    caption = f"<b>{escape(first)}</b>" + "".join(f" <span>· {escape(part)}</span>" for part in rest)
    lines = ['<section class="lra-table">', '<div class="wide">', "<table>"]
    lines += [f"<caption><div>{caption}</div></caption>", "<thead>"]
    head = "".join(f'<th scope="col"{_class(column)}>{escape(column.title)}</th>' for column in table.columns)
    lines += [f"<tr>{head}</tr>", "</thead>", "<tbody>"]
    for row, own in zip(table.rows, attributes or [""] * len(table.rows), strict=True):
        names, cells = table.columns[: table.keys], table.columns[table.keys :]
        line = "".join(f'<th scope="row"{_class(c)}>{_html_cell(row[c.key], c)}</th>' for c in names)
        line += "".join(f"<td{_class(c)}>{_html_cell(row[c.key], c)}</td>" for c in cells)
        lines.append(f"<tr{own}>{line}</tr>")
    lines += ["</tbody>", "</table>", "</div>"]
    below = [f'<li class="warning"><strong>Warning:</strong> {escape(text)}</li>' for text in table.warnings]
    below += [f"<li>{_html_text(text)}</li>" for text in table.footnotes]
    lines += ["<ul>", *below, "</ul>"] if below else []
    return "\n".join([*lines, "</section>"])


def _class(column: Column) -> str:
    names = [name for name in ("left", "wrap") if getattr(column, name)]
    return f' class="{" ".join(names)}"' if names else ""


def _html_text(text: str) -> str:
    return escape(_typeset(text))


def _html_cell(text: str, column: Column) -> str:
    main, above = _parts(text, column)
    return _html_text(main) + (f"<sup>{escape(above)}</sup>" if above else "")
