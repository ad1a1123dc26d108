"""Runs shown elsewhere while they go on: Weights & Biases, with `tracker=wandb`.

A tracker hears what goes into metrics.jsonl, and the record at the end. What goes wrong with it, as a network
that is down, is logged once and kept in the record's `extra`; it neither stops a run nor changes its status.
"""

import contextlib
import json
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from lra import parallel, records
from lra.config import RunConfig
from lra.errors import Agreed, one_line
from lra.records import Record
from lra.schema import TrackerConfig

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

PROJECT = "lra"
STATE = "tracker.json"  # in a run's folder: the id under which a resumed run goes on
NAMES = {"loss": "train/loss", "lr": "train/lr", "val_accuracy": "val/accuracy", "val_loss": "val/loss"}
ABOUT = (  # what config.yaml does not hold and runs are filtered by
    "run_id", "config_hash", "recipe_version", "deviations", "data_hash", "data_origin", "data_variant",
    "num_devices", "host", "torch", "git_revision", "command", "sweep",
)  # fmt: skip
COLUMNS = (
    "run_id", "task", "model", "length", "seed", "status", "reason", "test_accuracy", "val_accuracy",
    "step_ms", "tokens_per_s", "peak_mem_mib", "num_params", "wall_s",
)  # fmt: skip
INIT_S, FINISH_S = 30.0, 30.0  # how long a run waits for the server at its begin and its end
RETRY_S = 300.0  # how long a process that could not reach the server does not try again
FAILED, INTERRUPTED = 1, 255  # exit codes, which the site shows as failed and killed

_unreachable_since: float | None = None


class Tracker:
    """Tracks nothing; a context manager around a run."""

    def line(self, line: dict[str, Any]) -> None:
        """A line of metrics.jsonl."""

    def end(self, record: Record) -> Record:
        """The end of the run; returns the record with where it was tracked, and what went wrong."""
        return record

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """A run that leaves without an end was interrupted."""


def check(config: TrackerConfig) -> None:
    """UserError for a tracker that is not installed, or is online without an account."""
    if config.name == "none":
        return
    missing = Agreed(
        "tracker=wandb needs the package wandb; install it (pip install 'lra[wandb]') or leave tracker= away"
    )
    try:
        import wandb
    except Exception as error:  # of any type, as of a protobuf that does not fit
        if isinstance(error, ModuleNotFoundError) and error.name == "wandb":
            raise missing from error
        raise Agreed(
            f"tracker=wandb: the package wandb cannot be imported ({_told(error)}); install it anew "
            "(pip install --force-reinstall 'lra[wandb]') or leave tracker= away"
        ) from error
    if not hasattr(wandb, "init"):  # a folder called wandb can be imported too
        raise missing
    if problem := _no_account(config.mode):
        raise Agreed(
            f"tracker=wandb: {problem}; run `wandb login`, set WANDB_API_KEY, or use tracker.mode=offline"
        )


@cache
def _no_account(mode: str) -> str | None:
    """Why runs of this `tracker.mode` cannot go online; None if they can, or need not. Asked once a process,
    as a server that does not answer takes seconds, and is no reason.
    """
    import wandb

    try:
        if _mode(mode) != "online" or wandb.login(prompt=False, verify=False):
            return None
    except Exception as error:
        return one_line(error)
    return "no account is logged in here"


def start(config: RunConfig, record: Record, folder: Path, *, resumed: bool = False) -> Tracker:
    """The tracker of a run that begins, or goes on from a checkpoint (`resumed`), in this process.

    `record`: what is known before the run, its sweep too. Of several processes of a run the first tracks.
    """
    if config.tracker.name == "none" or not parallel.is_first():
        return Tracker()
    return Wandb(config, record, folder, resumed=resumed)


class Wandb(Tracker):
    """A run of Weights & Biases, whose files lie in the run's own folder.

    A run that goes on from a checkpoint goes on there too; one that begins anew, as after --force, is
    another one.
    """

    def __init__(self, config: RunConfig, record: Record, folder: Path, *, resumed: bool) -> None:
        self.ended = False
        self.logging = True  # until it fails
        self.earlier = folder / "metrics.jsonl" if resumed else None  # what is not sent again yet
        self.where: dict[str, str] = {}
        self.id = _identity(folder, record, resumed)
        about = {key: value for key in ABOUT if (value := getattr(record, key)) is not None}
        about |= {"mode": record.extra["mode"]} if record.kind == "measure" else {}
        self.run, self.mode, problem = _open(
            config.tracker,
            dir=folder,
            id=self.id,
            name=record.run_id,
            group=config.tracker.group or record.sweep,
            job_type=record.kind,
            config={**config.as_dict(), **about},
        )
        self.problems = [problem] if problem else []

    def line(self, line: dict[str, Any]) -> None:
        self._replay(new=line)
        self._log(line)

    def _replay(self, new: dict[str, Any] | None = None) -> None:
        """Sends the lines before the checkpoint, as an offline run begins without any.

        Not before the first new line, which the file holds too: only then it is cut back to the checkpoint.
        """
        metrics, self.earlier = self.earlier, None
        for line in _lines(metrics) if metrics else ():
            if line != new:
                self._log(line)

    def _log(self, line: dict[str, Any]) -> None:
        """A line, unless its step is on the site already; an error ends the logging, not the run."""
        if self.run is None or not self.logging:
            return
        row = {NAMES.get(key, key): value for key, value in line.items() if key != "step"}
        try:
            if line["step"] >= self.run.step:
                self.run.log(row, step=line["step"])
        except Exception as error:
            self.logging = False
            self.problems.append(_problem("cannot log to wandb", error))

    def end(self, record: Record) -> Record:
        self.ended = True
        if record.status in ("ok", "diverged"):  # of others it is not known whether they began
            self._replay()
        found = records.strict({key: getattr(record, key) for key in records.FIELDS})
        self._finish(
            {key: value for key, value in found.items() if isinstance(value, str | int | float)},
            exit_code=0 if record.status == "ok" else FAILED,
        )
        where = {"name": "wandb", "mode": self.mode, "id": self.id, **self.where}
        if self.problems:
            where["problem"] = "; ".join(self.problems)
        return replace(record, extra={**(record.extra or {}), "tracker": where})

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.ended:
            return
        failed = isinstance(error, Exception)
        self._finish(
            {"status": "failed" if failed else "interrupted", "reason": one_line(error or "")},
            exit_code=FAILED if failed else INTERRUPTED,
        )

    def _finish(self, summary: dict[str, Any], *, exit_code: int) -> None:
        if self.run is None:
            return
        with _kept("find the run in", self.problems):
            self.where = _where(self.run, self.mode)
        _finish(self.run, summary, exit_code, self.problems)


def _lines(metrics: Path) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl but those that were not written whole."""
    text = metrics.read_text(encoding="utf-8", errors="replace") if metrics.is_file() else ""
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            if isinstance(read := json.loads(line), dict) and "step" in read:
                yield read


def _finish(run: Any, summary: dict[str, Any], exit_code: int, problems: list[str]) -> None:
    """Ends a run of wandb; left open, it would end with the process, as one that succeeded."""
    with _kept("sum up in", problems):
        run.summary.update(summary)
    with _kept("finish in", problems):
        run.finish(exit_code=exit_code)


@contextlib.contextmanager
def _kept(doing: str, problems: list[str]) -> Iterator[None]:
    """An error inside is a problem to tell of, and stops nothing."""
    try:
        yield
    except Exception as error:
        problems.append(_problem(f"cannot {doing} wandb", error))


def _mode(asked: str) -> str:
    """What `tracker.mode` asks for, or wandb's own settings do."""
    import wandb

    mode = wandb.setup().settings.mode if asked == "auto" else asked
    return {"dryrun": "offline", "run": "online"}.get(mode, mode)


def _identity(folder: Path, record: Record, resumed: bool) -> str:
    """The id of the run before, if this one goes on with it, else a new one; kept in the folder.

    wandb takes 64 characters, and no id a second time whose run was deleted.
    """
    path = folder / STATE
    if resumed and path.is_file():
        with contextlib.suppress(ValueError, KeyError):  # of a file that was not written whole
            return json.loads(path.read_text())["id"]
    seed = "" if record.seed is None else f"-s{record.seed}"
    identity = f"{record.config_hash}{seed}-{secrets.token_hex(4)}"
    path.write_text(json.dumps({"name": "wandb", "id": identity}) + "\n")
    return identity


def _open(tracker: TrackerConfig, **what: Any) -> tuple[Any, str, str | None]:
    """A run of wandb, its mode, and what went wrong: offline where the server does not answer, None where
    wandb does not start at all.
    """
    global _unreachable_since
    import wandb

    mode = _mode(tracker.mode)
    settings = wandb.Settings(
        silent=True, console="off", init_timeout=INIT_S, finish_timeout=FINISH_S, finish_timeout_raises=True
    )
    given = {"entity": tracker.entity, "tags": tracker.tags, "notes": tracker.notes, "settings": settings}
    given["project"] = tracker.project or wandb.setup().settings.project or PROJECT
    given |= {**what, "resume": "allow", "reinit": "create_new"}

    def begin(mode: str) -> Any:
        return wandb.init(mode=mode, **given)

    waiting = _unreachable_since is not None and time.monotonic() - _unreachable_since < RETRY_S
    problem = None
    if mode == "online" and waiting:
        problem = "the server did not answer a run before; kept offline, for `wandb sync`"
        mode = "offline"
    try:
        return begin(mode), mode, problem
    except Exception as error:
        if mode != "online":
            return None, mode, _problem("cannot start wandb", error)
        problem = _problem("cannot start wandb online, kept offline for `wandb sync`", error)
        _unreachable_since = time.monotonic()
    try:
        wandb.teardown()  # its process holds the id, which would be in use
        return begin("offline"), "offline", problem
    except Exception as error:
        return None, "offline", _problem("cannot start wandb", error)


def _problem(what: str, error: Exception) -> str:
    text = f"{what}: {_told(error)}"
    log.warning("tracker: %s", text)
    return text


def _told(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}")


def _where(run: Any, mode: str) -> dict[str, str]:
    """Where to look for a run: its address, or the files that wait to be sent."""
    if mode == "disabled":
        return {}
    return {"url": run.url} if mode == "online" else {"files": os.path.dirname(run.dir)}


# A sweep: a run of its own in its group, with the table of its runs and their figures.


def end_sweep(
    config: TrackerConfig, sweep: str, ended: Iterable[Record], *, interrupted: bool = False
) -> None:
    """Shows a sweep that has ended: counts, a table with a row per run, and figures."""
    ended = list(ended)
    if config.name == "none" or not ended:
        return
    root = records.runs_root()
    group = config.group or sweep
    run, mode, _ = _open(
        config,
        dir=root,
        id=f"{sweep}-{secrets.token_hex(4)}",
        name=sweep,
        group=group,
        job_type="sweep",
        config={"sweep": sweep, "command": ended[0].command},
    )
    if run is None:
        return
    problems: list[str] = []
    with _kept(f"show {sweep} in", problems):
        _show(run, ended, with_figures=config.figures and not interrupted)
    counts = {status: sum(record.status == status for record in ended) for status in records.STATUSES}
    code = INTERRUPTED if interrupted else FAILED if problems else 0
    _finish(run, {"num_runs": len(ended), **counts}, code, problems)


def _show(run: Any, ended: list[Record], *, with_figures: bool) -> None:
    import wandb

    root = records.runs_root()
    rows = [[records.strict(getattr(record, name)) for name in COLUMNS] for record in ended]
    shown: dict[str, Any] = {"runs": wandb.Table(columns=list(COLUMNS), data=rows)}
    folders = [root / record.run_id for record in ended]
    kept = [folder for folder in folders if (folder / records.RECORD).is_file()]
    with tempfile.TemporaryDirectory() as scratch:  # whose files are read when they are logged
        for name, path in _figures(records.load(kept), Path(scratch)) if with_figures and kept else ():
            shown[f"figures/{name}"] = wandb.Image(str(path))
        run.log(shown)


def _figures(frame: "pd.DataFrame", folder: Path) -> Iterator[tuple[str, Path]]:
    """Each figure that these runs give, by name, as a file in `folder`."""
    from lra.report import figure, figures

    for named in figures.every_figure(frame):
        path = folder / f"{named.name}.png"
        figure.save(named.figure, path)
        yield named.name, path


def told(ended: Iterable[Record], sweep: str | None = None) -> str | None:
    """Where to look for runs that have ended, in a line; None if they were not tracked."""
    found = [where for record in ended if (where := (record.extra or {}).get("tracker"))]
    if not found:
        return None
    last, problems = found[-1], sum("problem" in where for where in found)
    if last["mode"] == "online" and "url" in last:
        place = f"{last['url'].rpartition('/runs/')[0]}, group {sweep}" if sweep else last["url"]
    elif "files" in last:
        root = records.runs_root()
        files = f"{root}/*/wandb/offline-run-* {root}/wandb/offline-run-*" if sweep else last["files"]
        place = f"offline; wandb sync {files}"
    else:
        place = last["mode"]
    return f"wandb: {place}" + (f" ({problems} with problems: see log.txt)" if problems else "")
