"""Made-up measurements of which the cost at every length is a formula."""

import math
from pathlib import Path

from report_samples import CONDITIONS

from lra import records
from lra.records import Record
from lra.report.series import IQR_OF_SD

TOKENS, BATCH, NO_SPREAD = 131072, 4, 0.0


def write_costs(
    root: Path,
    model: str,
    step_ms,
    *,
    memory=lambda n: 0.01 * n,
    fixed: float = 0.0,
    lengths=(1024, 4096, 16384, 65536),
    rule: str = "tokens",
    mode: str = "train",
    batch: int = BATCH,
    spread: float = 1e-3,
    own: dict | None = None,
    oom: tuple[int, ...] = (),
    extra: dict | None = None,
    **fields,
) -> None:
    """Cells of one mechanism; `step_ms` and `memory` (MiB) are the cost of one sequence by its length.

    fixed: MiB of weights and optimizer state; spread: standard deviation of the logarithm of a call.
    """
    for length in lengths:
        rows = TOKENS // length if rule == "tokens" else batch
        time, used = rows * step_ms(length), rows * memory(length)
        wing = math.exp(spread * IQR_OF_SD / 2)
        known = {
            "mode": mode,
            "own": own or {},
            "setting": "plain",
            "step_ms_quartiles": [time / wing, time * wing],
        }
        known["memory_mib"] = {
            "weights": fixed / 4,
            "optimizer": fixed * 3 / 4,
            "activations": used,
            "data": 1.0,
        }
        known |= extra or {}
        if length in oom:
            known.pop("memory_mib")
        run_id = f"{model}-{length}-{mode}-{rows}-{known['setting']}-{'-'.join((own or {}).values())}"
        fits = length not in oom
        conditions = (
            CONDITIONS | {"paper": None, "selection": None, "batch_size": rows, "task": "text"} | fields
        )
        record = Record(
            kind="measure",
            run_id=run_id,
            status="ok" if fits else "oom",
            model=model,
            length=length,
            step_ms=time if fits else None,
            peak_mem_mib=used + fixed if fits else None,
            config_hash=run_id,
            extra=known,
            **conditions,
        )
        records.write(record, Path(root) / run_id)
