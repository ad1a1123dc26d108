"""`lra report`: one file, valid, whole and safe, as far as can be seen without a browser."""

import json
import re
from collections import Counter
from html.parser import HTMLParser

import pytest
from page_samples import CONFIG, NASTY
from report_samples import write_run

from lra import records
from lra.cli import main
from lra.errors import UserError
from lra.report import tables
from lra.report.cells import Table
from lra.report.page import _box, _cautions, _which, page
from lra.report.page_cli import report_main

VOID = {"meta", "input", "br", "img", "link", "hr"}


class Reader(HTMLParser):
    """Tags with their attributes, texts by the tag they stand in, and tags that close what is not open."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.texts, self.faults = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def of(self, name: str) -> list[str]:
        return [attributes[name] for _, attributes in self.tags if attributes.get(name)]


@pytest.fixture(scope="module")
def text(report):
    return report.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def frame(report, runs):
    return records.load([runs, report.parent / "special"])


@pytest.fixture(scope="module")
def read(text):
    return Reader(text)


@pytest.fixture
def few(tmp_path):
    write_run(tmp_path / "runs", "linear", 0, 0.3, tokens_per_s=1e6)
    return tmp_path / "runs"


def test_tags_are_closed_in_order_and_ids_are_unique(text, read):
    assert text.startswith("<!DOCTYPE html>") and read.faults == [] and read.open == []
    assert [one for one, count in Counter(read.of("id")).items() if count > 1] == []


def test_links_lead_into_the_page_and_nothing_else_is_asked_for(read):
    targets = {f"#{one}" for one in read.of("id")}
    assert {link for link in read.of("href") if link not in targets} == set()
    loads = [
        a
        for tag, a in read.tags
        if tag in ("script", "link", "iframe", "img") and ("src" in a or "href" in a)
    ]
    assert loads == []
    assert [value for value in read.of("src") if not value.startswith("data:")] == []


def test_no_attribute_is_a_script(read):
    assert [name for _, attributes in read.tags for name in attributes if name.startswith("on")] == []


def test_text_of_records_stays_text(text, read):
    assert "<b>NaN" not in text and text.count("</script>") == 1 and "<img" not in text
    reasons = "".join(data for _, data in read.texts)
    assert NASTY in reasons and "<img src=x onerror='window.hit=1'>" in reasons and CONFIG in reasons
    assert "lr <i>0.1</i> (paper: 0.2)" in reasons and "CUDA graphs <save> time" in reasons


def test_warnings_stand_before_what_was_loaded_and_that_before_the_tables(text):
    places = [
        text.index(f">{mark}<") for mark in ("Before you compare", "Runs that did not end well", "runs")
    ]
    assert places == sorted(places) and places[-1] < text.index('id="tables"')


def test_the_header_says_what_was_loaded(text, frame):
    head = dict(re.findall(r"<div><dt>(\w+)</dt><dd>(.*?)</dd></div>", text.split("</header>")[0]))
    kinds, statuses = Counter(frame.kind), Counter(frame.status)
    assert head["runs"] == f"{kinds['train']} training runs, {kinds['measure']} measurements"
    assert head["status"] == ", ".join(f"{statuses[s]} {s}" for s in ("ok", "oom", "diverged", "failed"))
    assert head["devices"] == "H200, CPU" and head["dates"] == "2026-11-23"
    assert head["recipes"] == "nystromformer2021, luna2021, no paper&#x27;s recipe"
    assert head["revisions"] == "72e9cf2561" and head["software"] == "torch 2.11.0+cu130"


def test_every_table_and_every_run_is_there_once(text, read, frame):
    assert text.count('<div id="table-') == len(tables.build(frame))
    opened = [attributes["id"] for tag, attributes in read.tags if attributes.get("class") == "run"]
    assert len(opened) == len(frame) and sum(one in set(frame.run_id) for one in opened) == len(frame) - 1


def test_records_of_one_run_id_are_two_runs_with_two_addresses(few):
    first = records.load(few)
    record = json.loads((next(few.iterdir()) / "record.json").read_text()) | {"seed": 5}
    (few / "again.jsonl").write_text(json.dumps(record))
    (run_id,) = set(records.load(few).run_id)
    read = Reader(page(records.load(few), figures=[]))
    assert len(first) == 1 and {run_id, f"{run_id}-2"} <= set(read.of("id"))


def test_the_same_records_give_the_same_page(few):
    frame = records.load(few)
    assert page(frame, figures=[]) == page(frame, figures=[])


def test_the_verb_writes_a_page_with_figures_and_names_it(few, tmp_path, capsys):
    target = tmp_path / "one.html"
    assert main(["report", str(few), "-o", str(target), "--title", "A <new> one"]) == 0
    assert capsys.readouterr().out == f"{target}\n"
    text = target.read_text(encoding="utf-8")
    assert "<title>A &lt;new&gt; one</title>" in text and '<figure id="figure-1">' in text
    assert Reader(text).faults == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no runs at 'nowhere'"),
        (["nowhere", "-o", "no/such/folder/r.html"], "there is no folder 'no/such/folder'"),
        (["nowhere", "-o", "r.png"], "'r.png': the page is HTML.*html or .htm"),
        (["nowhere", "-o", "runs.html"], "it is a folder"),
        (["nowhere", "-o", "/proc/r.html"], "no file can be made in '/proc'"),
        (["runs", "--format", "md"], "unrecognized arguments: --format.*lra report --help"),
    ],
)
def test_bad_arguments_are_user_errors(few, monkeypatch, arguments, message):
    monkeypatch.chdir(few.parent)
    (few.parent / "runs.html").mkdir()
    with pytest.raises(UserError, match=message):
        report_main(arguments)


def test_the_table_of_runs_tells_accuracy_in_percent(few):
    assert "<td>30.0</td>" in page(records.load(few), figures=[])


def test_warnings_are_text_and_those_of_one_kind_about_one_table_are_one_item():
    heavier = [f"train at {n}: more than 10 % more parameters than <i>" for n in (1, 2)]
    tables_made = [
        Table(("a",), (), [], warnings=[*heavier, "<b>x"]),
        Table(("b",), (), [], warnings=["<b>x"]),
    ]
    text = _cautions(tables_made, ["table-1", "table-2"], [], [])
    assert "<b>" not in text and "<i>" not in text
    assert text.count("than &lt;i&gt;") == 2 and "more than 10 % more parameters: 2 warnings" in text
    both = '(tables <a href="#table-1">1</a>, <a href="#table-2">2</a>)'
    assert f"&lt;b&gt;x <span>{both}</span>" in text and text.count("<details>") == 1


def test_five_warnings_stand_open_and_the_others_open_on_demand():
    seen, folded = _box("t", [f"item {n}" for n in range(7)]).split("<details>")
    assert (seen.count("<li>"), folded.count("<li>")) == (5, 2) and "<summary>2 more</summary>" in folded
    assert "<details>" not in _box("t", ["item"] * 5)


def test_figures_of_one_title_are_told_apart_by_task_then_by_number():
    from lra.report.figure import NamedFigure, new

    def figure(title, *heads):
        drawn = new(1, 1)
        for head in heads:
            drawn.add_subplot().set_title(head, loc="left")
        return NamedFigure("speed", title, drawn)

    shared = [figure("Speed", head) for head in ("Text, 4,096", "ListOps", "Text, 1,024")]
    assert _which([*shared, figure("Heat", "Image")]) == [
        ", Text (1 of 2)",
        ", ListOps",
        ", Text (2 of 2)",
        "",
    ]


def test_contents_count_in_the_singular_and_plural(few):
    made = page(records.load(few), figures=[])
    (count,) = re.findall(r"<summary>(\d+ tables?)</summary>", made)
    number = made.count('<div id="table-')
    assert count == f"{number} table{'s' * (number != 1)}"
