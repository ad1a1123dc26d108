"""Small and made-up measurements, for tests."""

from lra import measuring

SMALL = ["model.d_model=16", "model.d_ff=32", "model.num_layers=1", "train.device=cpu"]
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB."


def made_up(monkeypatch, outcome=lambda cell: {}):
    """Measures nothing: `outcome` gives the fields of a record, or raises."""
    seen = []

    def measured(cell):
        seen.append((cell.config.model.label, cell.config.length, cell.mode))
        return {"step_ms": 1.0, "peak_mem_mib": 2.0, "extra": {}} | outcome(cell)

    monkeypatch.setattr(measuring, "_measure", measured)
    return seen
