"""The command `lra`. Each verb is a thin call into one module; errors of the user's end here as one
message.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence

from lra import __version__, torchrun
from lra.arguments import Parser
from lra.errors import Agreed, UserError, unknown

OK, SOME_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

VERBS = {
    "train": "one run; with -m, comma lists make a sweep",
    "search": "which of several mixers each layer should be, then train the answer again",
    "measure": "time and peak memory per length, without a data set",
    "data": "prepare, verify, show, stats, export: the data of a task",
    "list": "models, tasks or papers",
    "table": "records as a table",
    "plot": "records as figures: speed, cost, curves, lengths, heat",
    "report": "records as one page for a browser: tables, figures, runs",
    "check-model": "the conformance suite for one mechanism",
}

AGAIN = {"data": "", "measure": "; the same command goes on with the cells that are left"}  # no checkpoints

USAGE = """usage: lra VERB [key=value ...] [--flags]

{verbs}

What defines a run is an override (task= model= paper= length= seed= batch_size=, then task.KEY= model.KEY=
train.KEY=); what shapes output is a flag. For example:

  lra train task=listops model=linear length=64
  lra train task=listops model=softmax,linear seed=0,1 -m
  lra measure model=softmax,linear length=1024,4096 mode=train,infer
  lra table

lra VERB --help says more about a verb."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit status: 0 done, 1 some runs failed, 2 bad input, 130/143
    interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    status = _main(argv)
    if torchrun.launched():
        from lra import parallel

        return parallel.end(status)
    return status


def _main(argv: list[str]) -> int:
    told = logging.INFO if os.environ.get("LRA_VERBOSE") else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for handler in logging.getLogger().handlers:
        handler.setLevel(told)  # a run's log.txt hears more than the terminal
    logging.getLogger("lra").setLevel(told)
    from lra.stop import Stop, terminate_as_stop

    try:
        with terminate_as_stop():
            return _run(argv)
    except UserError as error:
        if torchrun.is_first() or not isinstance(error, Agreed):
            print(f"lra: {error}", file=sys.stderr)
        return BAD_INPUT
    except Stop as stop:
        again = AGAIN.get(argv[0], "; the same command goes on from the last checkpoint")
        print(f"lra: {stop}{again}", file=sys.stderr)
        return stop.exit_status
    except KeyboardInterrupt:
        again = AGAIN.get(argv[0], "; runs that had begun go on from their last checkpoint")
        print(f"lra: interrupted{again}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE.format(verbs="\n".join(f"  {verb:<12} {text}" for verb, text in VERBS.items())))
        return OK if argv else BAD_INPUT
    if argv[0] == "--version":
        print(f"lra {__version__}")
        return OK
    verb, rest = argv[0], argv[1:]
    if verb not in VERBS:
        raise unknown("verb", verb, VERBS)
    if verb != "train" and torchrun.launched():
        raise Agreed(f"torchrun starts one training run over several processes; start lra {verb} without it")
    return _verbs()[verb](rest)


def _verbs() -> dict[str, Callable[[list[str]], int]]:
    return {
        "train": _train,
        "search": _search,
        "measure": _measure,
        "data": _data,
        "list": _list,
        "table": _table,
        "plot": _plot,
        "report": _report,
        "check-model": _check_model,
    }


def _overrides(parser: Parser, argv: list[str]) -> argparse.Namespace:
    """Flags and overrides in any order; what is neither is refused."""
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)
    for override in args.overrides:
        if "=" not in override:
            raise UserError(f"'{override}' is not an override; write key=value, as in task=listops")
    return args


def _train(argv: list[str]) -> int:
    parser = Parser(
        prog="lra train", description="Train and test one run, or a sweep. Done runs are not run again."
    )
    parser.add_argument(
        "-m", "--multirun", action="store_true", help="run every combination of the comma lists"
    )
    parser.add_argument("--force", action="store_true", help="run again what is done, from the start")
    parser.add_argument("--config", action="store_true", help="print the resolved settings and stop")
    args = _overrides(parser, argv)
    from lra import parallel
    from lra.launch import sweep
    from lra.run import FINAL

    if args.config:
        return _print_config(args.overrides)
    records = sweep.train(args.overrides, multirun=args.multirun, force=args.force)
    if torchrun.is_first():
        _print_table(records)
    if torchrun.launched() and all(record.status in FINAL for record in records):
        parallel.barrier()  # one that ends with a status of failure would have torchrun end the others
    return OK if all(record.status == "ok" for record in records) else SOME_FAILED


def _search(argv: list[str]) -> int:
    parser = Parser(
        prog="lra search",
        description="Search over mechanisms (inspired by Hao and Zhu 2021): mixers side by side in every "
        "layer, weighted by self-attention between them, mixers trained on training and weights on "
        "validation batches. Tells the weights, then trains each layer's heaviest again under the same "
        "recipe. Comma lists (task, seed, ...) are expanded. "
        "Example: lra search task=listops length=32 train=quick model.candidates=[identity,softmax,local]",
    )
    parser.add_argument("--beside", action="store_true", help="train each candidate alone too")
    parser.add_argument("--force", action="store_true", help="run again what is done, from the start")
    args = _overrides(parser, argv)
    from lra.search import search, told

    found = search(
        args.overrides,
        beside=args.beside,
        force=args.force,
        on_found=lambda one: print(told(one) + "\n", flush=True),
    )
    records = [record for one in found for record in one.runs]
    _print_table(records)
    return OK if all(record.status == "ok" for record in records) else SOME_FAILED


def _print_config(overrides: list[str]) -> int:
    import yaml

    from lra.config import compose

    print(yaml.safe_dump(compose(overrides).as_dict(), sort_keys=False), end="")
    return OK


def _measure(argv: list[str]) -> int:
    parser = Parser(
        prog="lra measure",
        description="Time and peak memory of a training step or a forward pass on full rows of made-up "
        "tokens. Comma lists are expanded; also mode=train,infer, tokens=N (rows a batch = N / length), "
        "model=all, and preset=NAME, a list of cells kept in a file, to which overrides may be added. "
        "Done cells are only read: the same command goes on where one stopped.",
    )
    parser.add_argument("--force", action="store_true", help="measure again what is on disk")
    parser.add_argument(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="begin no further cell after so long; exit status 1",
    )
    parser.add_argument(
        "--shard",
        metavar="I/N",
        help="the I-th of N processes, each on its own device, that share the list: mechanisms dealt in turn",
    )
    args = _overrides(parser, argv)
    from lra.measure import measure
    from lra.measuring_display import Display

    with Display() as display:
        records = measure(
            args.overrides,
            force=args.force,
            shard=args.shard,
            time_limit=args.time_limit,
            watcher=display,
        )
    if records:
        _print_table(records, "measure")
    if display.left:
        left = f"{display.left} of {len(display.cells)} cells"
        print(f"lra: the time limit left {left}; the same command goes on", file=sys.stderr)
    if display.elsewhere:
        print(f"lra: {display.elsewhere} cells are measured by another process just now", file=sys.stderr)
    whole = not (display.left or display.elsewhere)
    return OK if whole and all(record.status == "ok" for record in records) else SOME_FAILED


def _print_table(records: list, folder: str = "") -> None:
    from lra.records import runs_root
    from lra.report.cli import table_main

    table_main([str(runs_root() / folder / record.run_id) for record in records])


def _data(argv: list[str]) -> int:
    from lra.data.cli import main as data_main

    return data_main(argv)


def _list(argv: list[str]) -> int:
    parser = Parser(prog="lra list", description="Names with one line each.")
    parser.add_argument("what", choices=("models", "tasks", "papers"))
    parser.add_argument("--json", action="store_true", help="a list of objects with `name`")
    parser.add_argument(
        "--leaks", action="store_true", help="models: measured effect of padding and batch mates"
    )
    args = parser.parse_args(argv)
    if args.leaks and args.what != "models":
        raise UserError(f"--leaks is about models, not {args.what}; leave it away")
    from lra.listing import listing, render

    rows = listing(args.what, leaks=args.leaks)
    print(json.dumps(rows, indent=2) if args.json else render(rows))
    return OK


def _table(argv: list[str]) -> int:
    from lra.report.cli import table_main

    return table_main(argv)


def _plot(argv: list[str]) -> int:
    from lra.report.cli import plot_main

    return plot_main(argv)


def _report(argv: list[str]) -> int:
    from lra.report.page_cli import report_main

    return report_main(argv)


def _check_model(argv: list[str]) -> int:
    from lra.conformance import main as check_main

    return check_main(argv)
