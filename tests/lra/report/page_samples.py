"""A page with what goes wrong on pages: long tables, failures, text that looks like HTML."""

from pathlib import Path

from report_samples import write_failure, write_run

from lra import records
from lra.report.figures import draw
from lra.report.page import page

NASTY = 'loss <b>NaN</b> & </script><script>window.hit = 1</script> "π ± ü" <!-- \' step 812'
CONFIG = "task:\n  name: listops\nmodel:\n  name: hyena\n  note: '<i>&amp;</i>'\ntrain:\n  lr: 0.1\n"
SWEEP = "lra train -m task=listops model=hyena,softmax train.lr=0.1,0.2 seed=0,1"


def write_special(root: Path) -> None:
    """A run with a config, one that failed with a reason full of marks, one of a mechanism named in HTML."""
    known = dict(command=SWEEP, torch="2.11.0+cu130", git_revision="72e9cf2561d65f73679015c9411251aa4b73ef3d")
    known |= dict(versions={"python": "3.12.3"}, sweep="sweep-20261121-234327", tokens_per_s=12.3e6)
    known |= dict(step_ms=1234.0, extra={"step_reason": "CUDA graphs <save> time"})
    folder = write_run(root, "hyena", 1, 0.401, deviations=["lr <i>0.1</i> (paper: 0.2)"], **known)
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "log.txt").write_text("2026-11-23 01:02:03,004 INFO step: captured\n")
    write_run(root, "<img src=x onerror='window.hit=1'>", 0, 0.2, config_hash="img")
    write_failure(root, "sinkhorn", 0, "failed", NASTY, command="lra search task=listops")


def write_page(root: Path, runs: Path) -> Path:
    """The page of the sweep of all tests and the special runs, with one kind of figure."""
    write_special(root / "special")
    frame = records.load([runs, root / "special"])
    target = root / "report.html"
    target.write_text(page(frame, title="Ours & <theirs>", figures=draw("heat", frame)), encoding="utf-8")
    return target
