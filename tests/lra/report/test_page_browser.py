"""The page in a real Chromium, driven over its DevTools protocol: sorting, filtering, opening, widths."""

import json
import time

import browser as browsers
import pytest
from page_samples import CONFIG, NASTY

from lra import records
from lra.report.page import page

pytestmark = pytest.mark.skipif(
    browsers.found() is None, reason="no Chromium or Chrome on the PATH; install one, or name it in $CHROME"
)
WIDTHS = {"desktop": 1280, "phone": 390}
HEADS = "[...document.querySelectorAll('table.runs thead th')]"
BODIES = "[...document.querySelectorAll('table.runs > tbody')]"
CONTRAST = """(() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => rgb.slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, at) => sum + v * [0.2126, 0.7152, 0.0722][at], 0);
  const behind = (e) => { const [r, g, b, a = 1] = parse(getComputedStyle(e).backgroundColor);
    return a ? [r, g, b] : e.parentElement ? behind(e.parentElement) : [255, 255, 255]; };
  return [...document.querySelectorAll("body *:not(svg *)")].filter((e) => e.checkVisibility()
    && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())).map((e) => {
      const [a, b] = [light(parse(getComputedStyle(e).color)), light(behind(e))].sort();
      return [(b + 0.05) / (a + 0.05), e.outerHTML.slice(0, 80)]; }).sort((a, b) => a[0] - b[0])[0];
})()"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    browser = browsers.Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def frame(report, runs):
    return records.load([runs, report.parent / "special"])


@pytest.fixture
def shown(chromium, report):
    """The page at desktop width; nothing that a test did in it may have been an error."""
    chromium.open(report)
    yield chromium
    chromium.run("0")
    assert [e for e in chromium.events if e.get("method") == "Runtime.exceptionThrown"] == []


def column(shown, name: str) -> list[str]:
    """The texts of a column of the table of runs, from top to bottom, of rows that are not hidden."""
    at = shown.run(f"{HEADS}.findIndex((th) => th.textContent === {json.dumps(name)})")
    return shown.run(f"{BODIES}.filter((b) => !b.hidden).map((b) => b.rows[0].cells[{at}].textContent)")


def head(shown, name: str) -> str:
    at = shown.run(f"{HEADS}.findIndex((th) => th.textContent === {json.dumps(name)})")
    return f"table.runs thead th:nth-child({at + 1}) button"


def pick(shown, name: str, value: str) -> None:
    shown.run(
        f"(() => {{ const e = document.getElementById('filter').elements.{name};"
        f" e.value = {json.dumps(value)};"
        " e.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )


def run_id(frame, model: str) -> str:
    return frame[frame.model == model].run_id.iloc[0]


def test_nothing_but_the_file_is_asked_for(shown, report):
    assert [url for url in shown.requests() if not url.startswith("data:")] == [report.as_uri()]


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_nothing_is_wider_than_the_page_even_with_a_run_open(shown, report, frame, width):
    shown.open(report, f"#{run_id(frame, 'hyena')}", width=width, height=800)
    outside = """[...document.querySelectorAll('body *')].filter((e) => e.checkVisibility()
      && !e.closest('.wide > table, .plate > svg, pre')
      && e.getBoundingClientRect().right > innerWidth + 0.5)"""
    assert shown.run("document.documentElement.scrollWidth") <= width
    assert shown.run(f"{outside}.map((e) => e.outerHTML.slice(0, 80))") == []
    panel = "document.querySelector('details.run[open]').getBoundingClientRect()"
    assert 0 <= shown.run(f"{panel}.left") and shown.run(f"{panel}.right") <= width
    boxes = "[...document.querySelectorAll('.wide')].filter((e) => e.scrollWidth > e.clientWidth).length"
    assert shown.run(boxes) > 3 or width > 400  # at phone width tables do scroll, each in its own box


def test_a_click_on_a_column_sorts_up_then_down_then_as_it_was(shown, frame):
    before = column(shown, "accuracy")
    numbers = sorted(float(text) for text in before if text != "–")
    missing = ["–"] * before.count("–")
    assert missing
    for state, expected in (("ascending", numbers), ("descending", numbers[::-1])):
        shown.click(head(shown, "accuracy"))
        now = column(shown, "accuracy")
        assert [float(text) for text in now if text != "–"] == expected
        assert now[-len(missing) :] == missing
        assert shown.run(f"{HEADS}.map((th) => th.ariaSort)").count(state) == 1
    shown.click(head(shown, "accuracy"))
    assert column(shown, "accuracy") == before
    assert set(shown.run(f"{HEADS}.map((th) => th.ariaSort)")) == {"none"}


def test_a_sorted_row_takes_its_details_along(shown, frame):
    shown.click(head(shown, "step ms"))
    pairs = shown.run(
        f"{BODIES}.map((b) => [b.querySelector('a').hash.slice(1), b.querySelector('details').id])"
    )
    assert len(pairs) == len(frame) and all(link == details for link, details in pairs)


def test_the_keyboard_sorts_too(shown):
    shown.run(f"document.querySelector({json.dumps(head(shown, 'mechanism'))}).focus()")
    shown.press("Enter", "\r")
    names = column(shown, "mechanism")
    assert names == sorted(names, key=str.lower) and len(set(names)) > 5


def test_numbers_are_read_as_tables_write_them(shown):
    texts = [
        "12.3k",
        "1,234",
        "−0.4",
        "34.4 ± 0.3",
        "32.9–35.9",
        "~37.98",
        "(36.37)",
        "< 0.001",
        "1.24 M",
        "5 MiB",
    ]
    values = [12300, 1234, -0.4, 34.4, 32.9, 37.98, 36.37, 0.001, 1.24e6, 5]
    assert shown.run(f"{json.dumps(texts)}.map((text) => keyOf(text).value)") == pytest.approx(values)
    assert shown.run("['oom', '–', '-', ''].map((text) => keyOf(text).rank)") == [1, 2, 2, 2]


def test_a_column_sorts_by_number_where_at_least_half_of_what_is_known_are_numbers(shown):
    columns = [["1", "2", "oom", "x"], ["1", "oom", "x"], ["3", "oom", "–", "–", "–"]]
    ranks = shown.run(
        f"{json.dumps(columns)}.map((texts) => {{ const body = document.createElement('tbody');"
        " for (const text of texts) body.insertRow().insertCell().textContent = text;"
        " return keysOf([...body.rows], 0, false).map((key) => key.rank); })"
    )
    assert ranks == [[0, 0, 1, 1], [1, 1, 1], [0, 1, 2, 2, 2]]


def test_an_address_that_cannot_be_read_breaks_nothing(shown, report, frame):
    shown.open(report, "#100%")
    shown.click(f'table.runs a[href="#{run_id(frame, "hyena")}"]')
    shown.click("details[open] button.copy")  # what the script does last
    shown.run("new Promise((done) => setTimeout(done, 20))")
    assert shown.run("document.querySelector('details[open] button.copy').textContent") != "Copy"


def test_letters_of_ties_are_no_part_of_a_number(shown):
    first = "document.querySelector('#table-1 tbody sup').parentNode"
    assert shown.run(f"textOf({first})") + shown.run(
        f"{first}.querySelector('sup').textContent"
    ) == shown.run(f"{first}.textContent")


def test_words_filter_the_rows_of_all_tables(shown, frame):
    shown.click("#filter input")
    shown.call("Input.insertText", text="NYSTROM 2,000")
    names = column(shown, "mechanism")
    assert len(names) == (frame.model == "nystrom").sum() and all(n.startswith("nystrom") for n in names)
    rows = shown.run("[...document.querySelectorAll('tbody tr')].filter((r) => r.checkVisibility()).length")
    told = shown.run("document.querySelector('output').value")
    assert told == f"{rows} of {shown.run('entries.length')} rows"
    assert shown.run("document.querySelectorAll('.sortable[hidden]').length") > 3
    shown.click("#filter button[type=reset]")
    shown.run("new Promise((done) => setTimeout(done, 20))")
    assert len(column(shown, "mechanism")) == len(frame)


@pytest.mark.parametrize(("name", "field", "value"), [("task", "task", "text"), ("status", "status", "oom")])
def test_task_and_status_choose_rows(shown, frame, name, field, value):
    pick(shown, name, value)
    assert len(column(shown, "status")) == (frame[field] == value).sum()
    pick(shown, "model", "softmax")
    both = (frame[field] == value) & (frame.model == "softmax")
    assert column(shown, "mechanism") and len(column(shown, "mechanism")) == both.sum()


def test_a_row_of_a_table_is_found_by_the_status_of_any_of_its_runs(shown):
    for status in ("oom", "diverged"):  # reformer ended in both ways
        pick(shown, "status", status)
        rows = shown.run(
            "[...document.querySelectorAll('#tables tbody tr')].filter((r) => r.checkVisibility())"
            ".map((r) => r.innerText)"
        )
        assert all(status in row for row in rows) and any(row.startswith("reformer") for row in rows)


def test_a_run_opens_and_closes_by_its_link(shown, frame):
    link = f'table.runs a[href="#{run_id(frame, "hyena")}"]'
    text = f"document.getElementById({json.dumps(run_id(frame, 'hyena'))})"
    assert not shown.run(f"{text}.checkVisibility()")
    shown.click(link)
    told = shown.run(f"{text}.innerText")
    assert shown.run(f"{text}.open") and shown.run(f"document.querySelector('{link}').ariaExpanded") == "true"
    assert "lra train task=listops model=hyena train.lr=0.1 seed=1" in told and CONFIG.strip() in told
    assert "72e9cf2561d65f73679015c9411251aa4b73ef3d" in told and "CUDA graphs <save> time" in told
    assert "lr <i>0.1</i> (paper: 0.2)" in told and "3.12.3" in told and "NVIDIA H200" in told
    shown.click(f'table.runs a[href="#{run_id(frame, "sinkhorn")}"]')  # the address is another's now
    shown.click(link)
    shown.run("new Promise((done) => setTimeout(done, 20))")
    assert not shown.run(f"{text}.open") and not shown.run(f"{text}.checkVisibility()")


def test_an_address_opens_its_run_even_where_a_filter_hides_it(shown, report, frame):
    one, other = run_id(frame, "sinkhorn"), run_id(frame, "hyena")
    shown.open(report, f"#{one}")
    assert shown.run("[...document.querySelectorAll('details.run[open]')].map((d) => d.id)") == [one]
    top = shown.run(f"document.getElementById({json.dumps(one)}).getBoundingClientRect().top")
    assert 0 <= top < 900
    pick(shown, "status", "failed")
    shown.run(f"location.hash = {json.dumps(other)}; new Promise((done) => setTimeout(done, 50))")
    assert shown.run(f"document.getElementById({json.dumps(other)}).checkVisibility()")


def test_text_that_looks_like_html_is_shown_and_does_nothing(shown, report, frame):
    shown.open(report, f"#{run_id(frame, 'sinkhorn')}")
    assert NASTY in shown.run("document.querySelector('details[open] .reason').textContent")
    assert shown.run("typeof window.hit") == "undefined"


def test_the_command_is_copied_or_else_selected(shown, frame):
    shown.click(f'table.runs a[href="#{run_id(frame, "hyena")}"]')
    command = shown.run("document.querySelector('details[open] .command pre').textContent")
    for write in ("async (text) => { window.copied = text; }", "async () => { throw new Error(); }"):
        shown.run(
            "Object.defineProperty(navigator, 'clipboard',"
            f" {{configurable: true, value: {{writeText: {write}}}}})"
        )
        shown.click("details[open] button.copy")
    shown.run("new Promise((done) => setTimeout(done, 20))")
    assert shown.run("window.copied") == command == shown.run("getSelection().toString()")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_what_is_behind_it(shown, report, frame, scheme):
    shown.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    shown.open(report, f"#{run_id(frame, 'sinkhorn')}")
    ratio, where = shown.run(CONTRAST)
    assert ratio >= 4.5, where
    ground = shown.run("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    assert (
        shown.run("getComputedStyle(document.querySelector('.plate')).backgroundColor")
        == "rgb(255, 255, 255)"
    )


def test_five_hundred_runs_open_at_once(shown, tmp_path, frame):
    first = json.loads(frame[(frame.model == "softmax") & (frame.kind == "train")].iloc[0].to_json())
    lines = []
    for index in range(500):
        seed, kind = divmod(index, 25)
        own = {"model": f"m{kind}", "config_hash": str(kind), "seed": seed, "path": None}
        lines.append(first | own | {"run_id": f"listops-m{kind}-2000-s{seed}-{index:012x}"})
    (tmp_path / "many.jsonl").write_text("\n".join(map(json.dumps, lines)))
    target = tmp_path / "many.html"
    target.write_text(page(records.load(tmp_path / "many.jsonl"), figures=[]), encoding="utf-8")
    assert target.stat().st_size < 3e6  # leaves 2 MB to figures
    started = time.perf_counter()
    shown.open(target)
    shown.click(head(shown, "seed"))
    assert column(shown, "seed")[:26] == ["0"] * 25 + ["1"]
    assert time.perf_counter() - started < 10  # about one where nothing else runs
