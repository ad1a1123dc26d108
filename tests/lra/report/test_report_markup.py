"""LaTeX and HTML of tables: they compile and parse, whatever a record says."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from report_samples import write_small

from lra import records
from lra.report import markup, tables
from lra.report.cells import Column, Table

HOSTILE = (
    r"""<script>alert(1)</script> & 50 % of $x_1^2 ~ \input{/etc/passwd} #1 {a} "q" 'r' `s` 你好 é --flag"""
)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    root = tmp_path_factory.mktemp("small")
    write_small(root)
    return tables.build(records.load(root), pairs=True)


def hostile():
    columns = [Column("mechanism", "m & m", left=True), Column("a", "a_b"), Column("note", "note", wrap=True)]
    rows = [
        {"mechanism": HOSTILE, "a": HOSTILE, "note": HOSTILE},
        {"mechanism": "x", "a": "-1.5", "note": ""},
    ]
    return [Table((HOSTILE, "b"), columns, rows, [HOSTILE], warnings=[HOSTILE])]


# LaTeX.


def check_latex(text):
    """What would stop LaTeX: unbalanced groups, bare special characters, rows of another number of cells."""
    plain = re.sub(r"\\[\\&%$#_{}]", lambda m: "\n" if m[0] == r"\\" else "", re.sub(r"^%.*", "", text))
    depth = 0
    for mark in re.findall(r"[{}]", plain):
        depth += 1 if mark == "{" else -1
        assert depth >= 0
    assert depth == 0 and all(" " <= c <= "~" or c == "\n" or "À" <= c <= "ÿ" for c in plain)
    assert re.sub(r"\$(\\[a-z]+|-|\^[23])\$", "", plain).count("$") == 0
    assert not re.search(r"[#~%]", plain)
    for grid in re.findall(r"\\begin\{tabular\}\{@\{\}([lr]+)@\{\}\}(.*?)\\end\{tabular\}", text, re.DOTALL):
        lines = [line for line in grid[1].splitlines() if line.endswith(r"\\")]
        assert lines and all(len(re.findall(r"(?<!\\)&", line)) == len(grid[0]) - 1 for line in lines)
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == text.count(r"\caption{")
    assert text.count(r"\begin{tabular}") == text.count(r"\bottomrule") == text.count(r"\toprule")


def test_latex_has_no_bare_special_character_and_whole_rows(small):
    for found in (small, hostile()):
        check_latex(markup.latex(found))


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex on this machine")
def test_latex_compiles_with_booktabs_alone(small, tmp_path):
    body = markup.latex(small + hostile())
    text = (
        "\\documentclass{article}\n\\usepackage{booktabs}\n\\begin{document}\n" + body + "\\end{document}\n"
    )
    (tmp_path / "tables.tex").write_text(text, encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "tables.tex"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, errors="replace", check=False
    )
    assert done.returncode == 0, done.stdout[-2000:]


def test_a_table_wider_than_a_page_goes_on_below_with_the_names_of_its_rows(small):
    wide = markup.latex([t for t in small if t.title[0] == "Pairs of rows"])
    heads = re.findall(r"\\toprule\n(.*) \\\\", wide)
    assert len(heads) == 2 and all(head.startswith("row & other & ") for head in heads)
    assert "verdict" in heads[0] and "McNemar p" in heads[1]


def test_a_table_longer_than_a_page_goes_on_in_another_float():
    columns = [Column("mechanism", "mechanism", left=True), Column("a", "a")]
    rows = [{"mechanism": f"m{i}", "a": str(i)} for i in range(83)]
    text = markup.latex([Table(("T",), columns, rows, ["below"])])
    check_latex(text)
    grids = re.findall(r"\\midrule\n(.*?)\\bottomrule", text, re.DOTALL)
    assert [len(grid.splitlines()) for grid in grids] == [40, 40, 3], "more do not fit on a page"
    assert text.count(r"\caption{T.}") == 1 and text.count(r"\caption{T (continued).}") == 2
    assert [text.count(f"\nm{i} & {i} ") for i in range(len(rows))] == [1] * len(rows)
    assert text.count("below.") == 1


def test_latex_says_notes_below_and_sets_letters_and_ranges(small):
    text = markup.latex(small[:1])
    assert r"37.5 $\pm$ 0.4\textsuperscript{a} & 34.4--40.6 &" in text
    assert "linear, identity: at majority." in text and "& note" not in text
    assert r"\textbf{Warning:} more than 10 \% more parameters" in text


# HTML.

VOID = ("meta", "br")


class Reader(HTMLParser):
    """Which elements stand where; fails on one that is not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.text = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_html_is_a_whole_page_that_needs_nothing_else(small):
    page = Reader(markup.html_document(small))
    names = [tag for tag, _ in page.found]
    assert names[0] == "html" and {"title", "style", "body"} <= set(names)
    assert not {"script", "link", "img", "iframe"} & set(names)
    assert not any(key in ("src", "href") or key.startswith("on") for _, attrs in page.found for key in attrs)
    assert "@import" not in markup.html_document([]) and "url(" not in markup.html_document([])


def test_html_tables_have_captions_and_scopes(small):
    page = Reader(markup.html_document(small))
    names = [tag for tag, _ in page.found]
    assert names.count("table") == names.count("caption") == names.count("thead") == len(small)
    scopes = [attrs["scope"] for tag, attrs in page.found if tag == "th"]
    assert scopes.count("col") == sum(len(t.columns) for t in small)
    assert scopes.count("row") == sum(t.keys * len(t.rows) for t in small)
    cells = sum((len(t.columns) - t.keys) * len(t.rows) for t in small)
    assert names.count("td") == cells


def test_html_shows_hostile_text_as_text():
    page = Reader(markup.html_document(hostile()))
    assert "script" not in [tag for tag, _ in page.found]
    assert "<script>alert(1)</script>" in "".join(page.text)


def test_html_marks_warnings(small):
    text = markup.html_document(small)
    assert '<li class="warning"><strong>Warning:</strong> more than 10 %' in text
    assert "<sup>a</sup>" in text and "34.4–40.6" in text
