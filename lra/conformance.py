"""The conformance suite: what every mechanism must do, measured for one; the verb `lra check-model`."""

import inspect
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from omegaconf import OmegaConf

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
            aside = f" [{c.detail}]" if c.detail and c.status == "pass" else ""
            lines.append(f"  {c.status:<4}  {c.name:<26} {_number(c):<18} {c.claim}{aside}")
            if c.detail and not aside:
                lines.append(f"{'':8}{c.detail}")
        lines += ["", *self._exceptions(), self.verdict()]
        return "\n".join(lines)

    def verdict(self) -> str:
        count = {status: sum(c.status == status for c in self.checks) for status in ("pass", "fail", "n/a")}
        tally = f"{len(self.checks)} checks: {count['pass']} pass, {count['fail']} fail, {count['n/a']} n/a"
        if self.ok:
            return f"{self.subject.name} conforms. {tally}."
        return f"{self.subject.name} does not conform ({', '.join(c.name for c in self.failures)}). {tally}."

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
        "model", metavar="NAME|pkg.mod:Class", help="a mechanism, or a class found from this folder"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="model.key=value", help="arguments of its constructor"
    )
    parser.add_argument("--device", default="cpu", help="where to build it (default: cpu)")
    arguments = parser.parse_args(argv)
    if arguments.device != "cpu" and not (arguments.device.startswith("cuda") and torch.cuda.is_available()):
        raise UserError(f"--device {arguments.device} is not available; it can be cpu, or cuda with a GPU")
    report = check_model(arguments.model, _own(arguments.overrides), device=arguments.device)
    print(report.render())
    return 0 if report.ok else 1


def _own(overrides: list[str]) -> dict[str, object]:
    for override in overrides:
        if not override.startswith("model.") or "=" not in override:
            raise UserError(f"cannot read '{shlex.quote(override)}'; parameters are given as model.key=value")
    return OmegaConf.to_container(OmegaConf.from_dotlist(overrides)).get("model", {})
