"""`lra data prepare|verify|show|stats|export|solve TASK|all [key=value ...] [--flags]`.

What selects data is an override (`length=`, `task.<field>=`); what shapes output is a flag. Results go to
standard output, progress and messages to standard error.
"""

import argparse
import dataclasses
import json
import sys
import time
import typing
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lra import tasks
from lra.arguments import Parser
from lra.data import data_root
from lra.data import store as stores
from lra.data.export import export
from lra.data.prepare import prepare
from lra.data.selection import message, selected
from lra.data.show import examples, examples_text, statistics, statistics_text
from lra.data.verify import verify
from lra.errors import UserError, unknown
from lra.tasks.base import SPLITS, Plan, Task


def main(argv: Sequence[str]) -> int:
    """The exit status: 0 done, 1 some of `prepare all` could not be done, 2 bad arguments or bad data."""
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(f"usage: lra data {'|'.join(_ACTIONS)} TASK|all [key=value ...] [--flags]\n\n{_summary()}")
            return 0 if argv else 2
        if argv[0] not in _ACTIONS:
            raise unknown("data command", argv[0], _ACTIONS)
        action = _ACTIONS[argv[0]]
        if hasattr(sys.stdout, "reconfigure"):  # data may hold what a terminal cannot show
            sys.stdout.reconfigure(errors="backslashreplace")
        return action.run(_parse(argv[0], action, argv[1:]))
    except BrokenPipeError:
        raise
    except (UserError, OSError) as error:
        print(f"lra: {message(error)}", file=sys.stderr)
        return 2


def _prepare(args: argparse.Namespace) -> int:
    pairs, failures = selected(args.task, args.overrides)
    chosen = {stores.store_path(*pair): pair for pair in pairs}
    plans: dict[Path, Plan | Exception] = {}
    for path, (task, length) in chosen.items():
        try:
            plans[path] = task.plan(length)
        except (UserError, OSError) as error:
            plans[path] = error
    if not args.json and chosen:
        _print_plans(chosen, plans, args.force)
    results = []
    for path, (task, length) in chosen.items():
        name, started = task.variant_name(length), time.perf_counter()
        with failures.of(task.name, name):
            if isinstance(plans[path], Exception) and (args.force or not path.is_dir()):
                raise plans[path]
            with _progress(name) as progress:
                store = prepare(task, length, workers=args.workers, progress=progress, force=args.force)
            results.append(_result(task, length, store, time.perf_counter() - started))
    if args.json:
        print(json.dumps(results + failures.found, indent=1))
    elif results:
        columns = ("variant", "origin", "train", "val", "test", "MiB", "s", "data hash", "folder")
        print(_table(columns, [[result[column] for column in columns] for result in results]))
        for result in results:
            print("".join(f"{result['variant']}: {note}\n" for note in result["notes"]), end="")
    return failures.status()


def _print_plans(
    chosen: dict[Path, tuple[Task, int]], plans: dict[Path, Plan | Exception], force: bool
) -> None:
    rows, mib, seconds = [], 0.0, 0.0
    for path, (task, length) in chosen.items():
        plan, name = plans[path], task.variant_name(length)
        if path.is_dir() and not force:
            rows.append([name, "already there", "", "", ""])
        elif isinstance(plan, Exception):
            rows.append([name, "no source", "", "", ""])
        else:
            rows.append([name, plan.source, f"{plan.rows:,}", f"{plan.mib:,.1f}", f"{plan.seconds:,.0f}"])
            mib, seconds = mib + plan.mib, seconds + plan.seconds
    if len(rows) > 1:
        rows.append(["in all", "", "", f"{mib:,.1f}", f"{seconds:,.0f}"])
    print(_table(("variant", "source", "rows", "about MiB", "about s"), rows), flush=True)
    print()


def _result(task: Task, length: int, store: stores.Store, seconds: float) -> dict[str, Any]:
    splits, files = store.manifest["splits"], store.manifest["files"].values()
    return {
        "task": task.name,
        "length": length,
        "variant": store.data_variant,
        "origin": store.data_origin,
        **{split: splits[split]["rows"] for split in SPLITS},
        "MiB": round(sum(entry["size"] for entry in files) / 2**20, 1),
        "s": round(seconds, 1),
        "data hash": store.data_hash,
        "folder": str(store.path),
        "notes": store.manifest.get("notes", []),
    }


def _verify(args: argparse.Namespace) -> int:
    report, faulty, (pairs, failures) = [], [], selected(args.task, args.overrides)
    for task, length in pairs:
        name = task.variant_name(length)
        with failures.of(task.name, name):
            findings = verify(task, length)
            report.append({"variant": name, "findings": [dataclasses.asdict(f) for f in findings]})
            faults = [f for f in findings if not f.ok]
            if faults:
                faulty.append(f"{stores.prepare_command(task, length)} --force")
            if not args.json:
                print(name)
                print(_table((), [["ok" if f.ok else "FAULT", f.what, f.detail] for f in findings]))
                print(f"{len(findings)} checks, {len(faults)} faults\n")
    if args.json:
        print(json.dumps(report + failures.found, indent=1))
    status = failures.status()
    if faulty:
        raise UserError(f"the stored data have faults; build them again: {'; '.join(faulty)}")
    return status


def _show(args: argparse.Namespace) -> int:
    shown, (pairs, failures) = [], selected(args.task, args.overrides)
    _one_picture(args, pairs)
    for task, length in pairs:
        with failures.of(task.name, task.variant_name(length)):
            store, split = stores.open_store(task, length), args.split or "train"
            rows = examples(task, store, split, 3 if args.limit is None else args.limit)
            if not args.json:
                print(f"{store.data_variant}\n\n{examples_text(rows)}")
            picture = None
            if task.stored == "pixels" or args.out is not None:
                from lra.data.pictures import grid

                picture = str(grid(task, store, split, args.out or _picture(store, split)))
            shown.append({"variant": store.data_variant, "examples": rows, "picture": picture})
            if picture and not args.json:
                print(f"pictures: {picture}\n")
    if args.json:
        print(json.dumps(shown + failures.found, indent=1))
    return failures.status()


def _one_picture(args: argparse.Namespace, pairs: list[tuple[Task, int]]) -> None:
    """Raises UserError where --out would have to take several pictures."""
    if args.out is not None and len(pairs) > 1:
        raise UserError(f"--out {args.out} takes one variant, {len(pairs)} are named; draw them one by one")


def _picture(store: stores.Store, name: str) -> Path:
    """The place of a picture of this variant where no --out names one."""
    folder = data_root() / "pictures"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {folder} ({error.strerror}); name a place with --out FILE") from error
    return folder / f"{store.path.name}-{name}.png"


def _stats(args: argparse.Namespace) -> int:
    from lra.data.pictures import charts

    counted, (pairs, failures) = [], selected(args.task, args.overrides)
    _one_picture(args, pairs)
    for task, length in pairs:
        with failures.of(task.name, task.variant_name(length)):
            store, wanted = stores.open_store(task, length), [args.split] if args.split else SPLITS
            splits = {split: statistics(task, store, split) for split in wanted}
            generator = store.manifest.get("generator") or {}
            accepted = generator["accepted"] / generator["attempts"] if "attempts" in generator else None
            if not args.json:
                share = "" if accepted is None else f"   draws accepted {100 * accepted:.2f} %"
                print(f"{store.data_variant}   {store.data_origin}   {store.data_hash}{share}\n")
                for split, numbers in splits.items():
                    print(f"[{split}]\n{statistics_text(numbers)}\n")
            chart = str(charts(task, store, splits, args.out or _picture(store, "stats")))
            counted.append(
                {
                    "variant": store.data_variant,
                    "draws accepted": accepted,
                    "splits": splits,
                    "picture": chart,
                }
            )
            if not args.json:
                print(f"charts: {chart}\n")
    if args.json:
        print(json.dumps(counted + failures.found, indent=1))
    return failures.status()


def _solve(args: argparse.Namespace) -> int:
    import torch

    from lra.data.solve import Setting, solve

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    given = {key: getattr(args, key) for key in ("epochs", "seed", "width", "time_limit")}
    given = {key: value for key, value in given.items() if value is not None}
    results = []
    for task, length in selected(args.task, args.overrides)[0]:
        store = stores.open_store(task, length)
        setting = Setting(rows=args.limit, shuffled=args.shuffled, **given)

        def report(epoch: int, loss: float, epochs: int = setting.epochs) -> None:
            print(f"epoch {epoch} of {epochs}: mean loss {loss:.4f}", file=sys.stderr, flush=True)

        result = {"task": task.name, **solve(store, setting, device, report=report)}
        results.append(result)
        if not args.json:
            wanted = " (chance is wanted: the labels are shuffled)" if args.shuffled else ""
            print(
                f"{result['variant']}: {100 * result['test_accuracy']:.1f} % of {result['test_images']:,} "
                f"test images{wanted}, {100 * result['train_accuracy']:.1f} % of training images; "
                f"{result['train_images']:,} images, {result['epochs']} epochs, {result['train_s']:,} s on "
                f"{result['device']}"
            )
    if args.json:
        print(json.dumps(results, indent=1))
    return 0


def _export(args: argparse.Namespace) -> int:
    pairs, _ = selected(args.task, args.overrides)
    if args.out is None:
        raise UserError("export needs a file to write; add --out FILE.npz")
    if len(pairs) > 1:
        raise UserError(f"--out {args.out} takes one variant, {len(pairs)} are named; export them one by one")
    store = stores.open_store(*pairs[0])
    rows = export(store, args.split or "train", args.out, args.limit)
    made = {"out": str(args.out), "split": args.split or "train", "rows": rows, "data_hash": store.data_hash}
    print(json.dumps(made) if args.json else f"wrote {rows:,} rows of {made['split']} to {args.out}")
    return 0


@contextmanager
def _progress(name: str) -> typing.Iterator[Callable[[int, int], None]]:
    """Shows rows done: a bar on a terminal, else a line now and then."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            shown = bar.add_task(name, total=None)
            yield lambda done, total: bar.update(shown, completed=done, total=total)
        return
    last = time.monotonic()

    def line(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > 5:
            last = time.monotonic()
            print(f"{name}: {done:,} of {total:,} rows", file=sys.stderr, flush=True)

    yield line


def _table(header: Sequence[str], rows: list[list[Any]]) -> str:
    """Columns as wide as their widest cell; numbers to the right."""
    cells = [
        [f"{value:,}" if isinstance(value, int | float) else str(value) for value in row] for row in rows
    ]
    widths = [
        max(map(len, column)) for column in zip(*([list(header)] if header else []), *cells, strict=True)
    ]
    numeric = [isinstance(value, int | float) for value in rows[0]]
    lines = [list(header)] if header else []
    return "\n".join(
        "  ".join(
            c.rjust(w) if n else c.ljust(w) for c, w, n in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines + cells
    )


@dataclasses.dataclass(frozen=True)
class _Action:
    run: Callable[[argparse.Namespace], int]
    help: str
    flags: tuple[str, ...]


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdigit() or int(text) >= 1 << 63:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 0")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of seconds above 0")
    return seconds


_FLAGS: dict[str, dict[str, Any]] = {
    "--force": {"action": "store_true", "help": "build again what is already there"},
    "--workers": {"type": _count, "metavar": "N", "help": "threads (default: one for each processor)"},
    "--split": {"choices": SPLITS, "help": "which split"},
    "--limit": {"type": _count, "metavar": "N", "help": "the first N rows only"},
    "--out": {"type": Path, "metavar": "FILE", "help": "the file to write"},
    "--json": {"action": "store_true", "help": "print JSON"},
    "--shuffled": {"action": "store_true", "help": "with labels in random order, as a control"},
    "--epochs": {"type": _count, "metavar": "N", "help": "passes over the training images (default: 10)"},
    "--width": {"type": _count, "metavar": "N", "help": "channels at 16 x 16 pixels (default: 64)"},
    "--seed": {"type": _seed, "metavar": "N", "help": "of the weights and the order (default: 0)"},
    "--time-limit": {"type": _seconds, "metavar": "S", "help": "end training within so many seconds"},
}
_ACTIONS = {
    "prepare": _Action(_prepare, "build or import data", ("--force", "--workers", "--json")),
    "verify": _Action(_verify, "read stored data back and check everything about them", ("--json",)),
    "show": _Action(
        _show, "print examples, and draw those of image tasks", ("--split", "--limit", "--out", "--json")
    ),
    "stats": _Action(_stats, "lengths, labels and vocabulary, with charts", ("--split", "--out", "--json")),
    "export": _Action(_export, "write rows to an .npz file", ("--split", "--limit", "--out", "--json")),
    "solve": _Action(
        _solve,
        "whether a small CNN can learn the labels of an image task",
        ("--shuffled", "--limit", "--epochs", "--width", "--seed", "--time-limit", "--json"),
    ),
}


def _summary() -> str:
    lines = [f"  {name:8} {action.help} ({', '.join(action.flags)})" for name, action in _ACTIONS.items()]
    everything = f"all: {', '.join(tasks.BENCHMARK)}"
    return "\n".join([*lines, f"\ntasks: {', '.join(tasks.names())}\n{everything}"])


def _parse(name: str, action: _Action, argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog=f"lra data {name}", description=action.help, allow_abbrev=False)
    parser.add_argument("task", help=f"{', '.join(tasks.names())} or all")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="length=, task.<field>=")
    for flag in action.flags:
        parser.add_argument(flag, **_FLAGS[flag])
    return parser.parse_intermixed_args(list(argv))
