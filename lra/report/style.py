"""One colour, one marker and one dash pattern per mechanism, the same in every figure.

Ten colours by eight markers give 80 looks. Seven colours are those of Okabe and Ito, without the yellow that
vanishes on white; wine and indigo are Tol's, and a grey goes with them. Readers with any of the common colour
deficiencies can tell all ten apart. Shape repeats what colour says, so that a figure also survives a
black-and-white printer.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9",
    "#E69F00", "#882255", "#332288", "#000000", "#707070",
)  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "<", "p")
FAILURE = "X"  # the sign of what could not be run; no mechanism has it
DASHES = ("", (5, 2), (1.2, 1.2), (6, 1.5, 1.2, 1.5), (9, 2), (3, 1.2))  # in line widths

# A name's place decides its look: append, never insert. Ten names in a row, two lines here, differ in colour.
KNOWN = (
    "softmax", "linear", "nystrom", "performer", "linformer",
    "luna", "local", "fnet", "identity", "global_mean",
    "reformer", "bigbird", "longformer", "synthesizer", "sinkhorn",
    "sparse", "mega", "mega_chunk", "s4", "s4d",
    "s5", "lru", "skyformer", "kernelized", "cosformer",
    "informer", "rfa", "hyena", "sgconv", "retnet",
    "gla", "mamba", "h_transformer", "transformer_ls", "yoso",
    "star", "routing", "external", "taylor", "deltanet",
    "ring", "clustered", "long_short", "hedgehog", "based",
    "las", "polaformer", "flash_quad", "long_conv", "tnn",
    "mamba2", "gated_deltanet", "hgrn", "mega_mixer", "search", "hybrid",
)  # fmt: skip

# What a mechanism is at heart; figures that cannot name every line name some of each family.
FAMILIES = {
    "scores of all pairs": (
        "softmax", "synthesizer", "kernelized", "las", "flash_quad", "ring", "mega", "mega_mixer",
    ),
    "feature maps": (
        "linear", "performer", "cosformer", "rfa", "hedgehog", "based", "taylor", "polaformer",
    ),
    "few keys for all": ("nystrom", "linformer", "luna", "skyformer", "external", "informer"),
    "chosen pairs": (
        "local", "bigbird", "longformer", "sparse", "sinkhorn", "reformer", "routing", "clustered", "yoso",
        "h_transformer", "star", "long_short",
    ),
    "recurrences": (
        "s4", "s4d", "s5", "lru", "mamba", "mamba2", "gla", "retnet", "deltanet", "gated_deltanet", "hgrn",
    ),
    "convolutions": ("hyena", "sgconv", "long_conv", "tnn", "fnet"),
}  # fmt: skip


def family(name: str) -> str | None:
    """The family a mechanism belongs to; None for one of nobody's."""
    return next((title for title, members in FAMILIES.items() if name in members), None)


@dataclass(frozen=True)
class Style:
    colour: str
    marker: str
    dash: tuple[float, ...] | str  # "" is a solid line

    def variant(self, index: int) -> "Style":
        """The look of another kind of the same mechanism: its colour and marker, with other dashes."""
        at = (DASHES.index(self.dash) + index) % len(DASHES)
        return Style(self.colour, self.marker, DASHES[at])


def styles(names: Iterable[str]) -> dict[str, Style]:
    """The look of each name; an unknown one gets, by its hash, one of the looks that no known one has.

    Two unknown names whose hashes meet are told apart in alphabetical order: figures that are read together
    have to ask once for the names of all. Where the free looks run out, unknown names take those of known
    ones that are absent; past 80 names, looks repeat.
    """
    names = set(names)
    places = {name: KNOWN.index(name) for name in names if name in KNOWN}
    count = len(COLOURS) * len(MARKERS)
    for name in sorted(names - set(places)):
        taken = set(places.values())
        choices = [range(len(KNOWN), count), range(count)]
        free = next((choice for choice in choices if not taken.issuperset(choice)), None)
        offset = int(hashlib.sha256(name.encode()).hexdigest(), 16)
        if free is None:
            places[name] = offset % count
            continue
        while free[offset % len(free)] in taken:
            offset += 1
        places[name] = free[offset % len(free)]
    return {name: _look(place) for name, place in places.items()}


def _look(place: int) -> Style:
    row, column = divmod(place, len(COLOURS))
    repeats = column >= len(MARKERS)  # a marker that this row has already had gets other dashes
    dash = DASHES[(row + 3 * repeats) % len(DASHES)]
    return Style(COLOURS[column], MARKERS[(column + row) % len(MARKERS)], dash)
