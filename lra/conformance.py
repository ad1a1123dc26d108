"""The conformance suite: what every mechanism must do, measured for one; the verb `lra check-model`."""

import dataclasses
import inspect
import shlex
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lra import (
    conformance_checks,
    conformance_compile,
    conformance_numerics,
    conformance_proofs,
    registry,
)
from lra.arguments import Parser
from lra.conformance_checks import batch_leak, content_leak, length_leak
from lra.conformance_compile import compiled_like_eager
from lra.conformance_subject import Check, Subject, checks_in, quiet_seed
from lra.errors import UserError, unknown
from lra.schema import BackboneConfig
from models.common import own_parameters

__all__ = [
    "ALL_CHECKS",
    "Check",
    "Report",
    "Subject",
    "check_model",
    "compiled_like_eager",
    "leaks",
    "main",
    "subject",
]

ALL_CHECKS = [
    check
    for file in (conformance_checks, conformance_numerics, conformance_compile, conformance_proofs)
    for check in checks_in(file)
]

REPORT_WIDTH = 120

DESCRIPTION = (
    "The conformance suite for one mechanism: of this repository by name, or of your own as pkg.mod:Class."
)
EPILOG = "Exit status: 0 every check passes, 1 some fail, 2 bad arguments."


@dataclass(frozen=True)
class Report:
    """What the suite found about one mechanism."""

    subject: Subject
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return not self.failures

    @property
    def failures(self) -> tuple[Check, ...]:
        return tuple(c for c in self.checks if c.status == "fail")

    def render(self) -> str:
        """The findings as text: checks by group with numbers and tolerances, the exceptions, a verdict."""
        s = self.subject
        given = "".join(f"  {name}={value}" for name, value in s.own.items())
        lines = [
            f"{s.name}: {s.cls.__module__}.{s.cls.__qualname__}{given}",
            f"at d_model {s.d_model}, {s.num_heads} heads, max_len {s.max_len}, on {s.device}, "
            "in float64 unless the claim says otherwise; numbers are relative to the largest output",
        ]
        group = ""
        for c in self.checks:
            if c.group != group:
                group = c.group
                lines += ["", group]
            lines.append(f"  {c.status:<4}  {c.name:<26} {_number(c):<18} {c.claim}")
            for part in c.detail.split("; ") if c.detail else ():
                lines += textwrap.wrap(part, REPORT_WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 10)
        lines += ["", *self._exceptions(), self.verdict()]
        return "\n".join(lines)

    def verdict(self) -> str:
        count = {status: sum(c.status == status for c in self.checks) for status in ("pass", "fail", "n/a")}
        tally = f"{len(self.checks)} checks: {count['pass']} pass, {count['fail']} fail, {count['n/a']} n/a"
        if self.ok:
            return f"{self.subject.name} conforms. {tally}."
        return f"{self.subject.name} does not conform ({', '.join(c.name for c in self.failures)}). {tally}."

    def summary(self) -> str:
        """One line: the verdict, the largest differences found, and what is unusual."""
        found = {c.name: c for c in self.checks}
        numbers = [
            "-" if found[name].measured is None else f"{found[name].measured:.0e}"
            for name in ("equals_reference", "gradients_equal_reference", "equals_limits", "equals_oracles")
        ]
        failed = ", ".join(c.name for c in self.failures)
        try:
            unusual = ", ".join(self.subject.traits.exceptions())
        except Exception as error:
            unusual = f"traits: {type(error).__name__}"
        verdict = f"FAILS {failed}" if failed else "conforms"
        return f"{self.subject.name:<16} " + " ".join(f"{n:>10}" for n in numbers) + f"  {verdict}  {unusual}"

    def _exceptions(self) -> list[str]:
        try:
            traits = self.subject.traits
        except Exception as error:
            return [f"its traits cannot be read: {type(error).__name__}: {error}", ""]
        exceptions = traits.exceptions()
        if not exceptions:
            return []
        lines = [
            f"  {name}={getattr(traits, name)}: {reason or 'no reason given'}"
            for name, reason in exceptions.items()
        ]
        return ["unusual answers it gives about itself", *lines, ""]


def _number(c: Check) -> str:
    if c.measured is None:
        return ""
    above = not c.measured <= c.tolerance
    return f"{c.measured:.1e} {'>' if above else '<='} {c.tolerance:.0e}"


def subject(name_or_target: str, own: Mapping[str, object] | None = None, **size: object) -> Subject:
    """The mechanism of that name, or the class at pkg.mod:Class (or file.py:Class), at the suite's size.

    UserError for an unknown name, or an argument in `own` that its constructor does not have.
    """
    own = dict(own or {})
    if ":" in name_or_target:
        cls = registry.load_target(name_or_target)
        name = cls.name or cls.__name__.lower()
    else:
        cls, name = registry.get(name_or_target), name_or_target
    for key in own:
        if key not in own_parameters(cls):
            raise unknown(f"parameter of model {name}", key, own_parameters(cls))
    return Subject(name, cls, own, **size)


def check_model(name_or_target: str, own: Mapping[str, object] | None = None, **size: object) -> Report:
    """Every check on one mechanism; a mechanism that raises fails the check it raised in."""
    chosen = subject(name_or_target, own, **size)
    needed = [
        name
        for name, parameter in own_parameters(chosen.cls).items()
        if parameter.default is inspect.Parameter.empty and name not in chosen.arguments()
    ]
    if needed:
        raise UserError(
            f"{chosen.name} has parameters without a default: {', '.join(needed)}; "
            f"give each a value, as in model.{needed[0]}=..."
        )
    try:
        with quiet_seed(chosen.device):
            chosen.probe()
    except ValueError as error:  # an argument it does not accept
        raise UserError(f"{chosen.name}: {error}") from error
    return Report(chosen, tuple(check(chosen) for check in ALL_CHECKS))


def leaks(name: str, own: Mapping[str, object] | None = None) -> dict[str, float]:
    """How far padding and batch mates reach into real outputs: relative changes, at most 1e-9 if they do not.

    content: only the content of padding changes; length: only padding is appended; batch: only other rows do.
    """
    chosen = subject(name, own)
    with quiet_seed(chosen.device), torch.no_grad():
        return {"content": content_leak(chosen), "length": length_leak(chosen), "batch": batch_leak(chosen)}


def main(argv: list[str]) -> int:
    """`lra check-model NAME|pkg.mod:Class [model.key=value ...]`: prints the report; 0 if it conforms."""
    parser = Parser(prog="lra check-model", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument(
        "model", metavar="NAME|pkg.mod:Class", help="a mechanism, a class found from this folder, or `all`"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="model.key=value", help="arguments of its constructor"
    )
    parser.add_argument("--device", default="cpu", help="where to build it (default: cpu)")
    arguments = parser.parse_args(argv)
    if arguments.device != "cpu" and not (arguments.device.startswith("cuda") and torch.cuda.is_available()):
        raise UserError(f"--device {arguments.device} is not available; it can be cpu, or cuda with a GPU")
    if arguments.model == "all":
        if arguments.overrides:
            raise UserError(
                "`lra check-model all` takes no model.key=value: no two mechanisms share them all"
            )
        return _check_all(arguments.device)
    own = _typed(arguments.model, _own(arguments.overrides))
    report = check_model(arguments.model, own, device=arguments.device)
    print(report.render())
    return 0 if report.ok else 1


def _check_all(device: str) -> int:
    """One line per mechanism of the repository, as they come; 0 if all conform."""
    print(f"{'':<16} {'reference':>10} {'gradients':>10} {'limits':>10} {'oracles':>10}  largest differences")
    reports = []
    for name in registry.names():
        reports.append(check_model(name, device=device))
        print(reports[-1].summary(), flush=True)
    conforming = sum(report.ok for report in reports)
    print(f"{conforming} of {len(reports)} mechanisms conform to {len(ALL_CHECKS)} checks each.")
    return 0 if conforming == len(reports) else 1


def _own(overrides: list[str]) -> dict[str, object]:
    for override in overrides:
        if not override.startswith("model.") or "=" not in override:
            raise UserError(f"cannot read '{shlex.quote(override)}'; parameters are given as model.key=value")
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist(overrides)).get("model", {})
    except YAMLError as error:
        raise UserError(f"cannot read {' '.join(overrides)}: {str(error).splitlines()[0]}") from error


def _typed(name_or_target: str, own: dict[str, object]) -> dict[str, object]:
    """The arguments in the types of the constructor, as `lra train` reads them; unknown ones as they are."""
    named = ("custom", name_or_target) if ":" in name_or_target else (name_or_target, None)
    checked = dict(own)
    for schema in (BackboneConfig, registry.own_schema(*named)):
        given = {f.name: own[f.name] for f in dataclasses.fields(schema) if f.name in own}
        try:
            merged = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(schema), given))
        except OmegaConfBaseException as error:
            key = getattr(error, "full_key", "") or ""
            raise UserError(f"model.{key}: {str(error).splitlines()[0]}") from error
        checked |= {name: merged[name] for name in given}
    return checked
