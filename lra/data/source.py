"""Where the tokens of batches are found: kept on the device whole, or streamed to it batch by batch."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lra.data.store import Split

# s sequences, n stored tokens

LARGEST_SHARE = 0.4  # of a GPU's free memory that a store may take; a larger one is streamed


class Resident:
    """The tokens of all splits end to end on the device [n], as they lie on disk (uint8 or int16)."""

    def __init__(self, splits: Sequence[Split], device: torch.device) -> None:
        self.device = device
        parts = [torch.from_numpy(np.asarray(split.tokens)) for split in splits]
        self.tokens = parts[0].to(device)
        if len(parts) > 1:
            self.tokens = torch.cat([part.to(device) for part in parts])
        begins = np.cumsum([0, *(len(part) for part in parts)])
        self.begin = {split.name: int(at) for split, at in zip(splits, begins, strict=False)}

    @property
    def device_bytes(self) -> int:
        """Bytes of data kept on the device."""
        return self.tokens.numel() * self.tokens.element_size()

    def find(self, split: Split, sequences: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, None]:
        """Where the sequences start in `tokens` [s] int64."""
        return self.begin[split.name] + np.asarray(split.offsets)[sequences], None

    def tokens_of(self, stored: Tensor | None) -> Tensor:
        """The tensor that a batch's starts point into."""
        return self.tokens


class Streamed:
    """The tokens of one batch at a time, copied from the memory map through pinned memory.

    They land in `tokens`, one window on the device with room for the largest batch, so that a captured step
    finds each batch at the same place.
    """

    def __init__(self, capacity: int, dtype: np.dtype, device: torch.device) -> None:
        self.device, self.dtype = device, torch.from_numpy(np.empty(0, dtype)).dtype
        self.tokens = torch.zeros(capacity, dtype=self.dtype, device=device)

    @property
    def device_bytes(self) -> int:
        return self.tokens.numel() * self.tokens.element_size()

    def find(self, split: Split, sequences: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, Tensor]:
        """Where the sequences start in the batch's own tokens [s] int64, and these, in pinned memory."""
        ends = np.cumsum(lengths)
        stored = torch.empty(int(ends[-1]), dtype=self.dtype, pin_memory=self.device.type == "cuda")
        room, begins = stored.numpy(), split.offsets
        for sequence, length, end in zip(sequences, lengths, ends, strict=True):
            start = begins[sequence]
            room[end - length : end] = split.tokens[start : start + length]
        return ends - lengths, stored

    def tokens_of(self, stored: Tensor) -> Tensor:
        """The window, after the batch's tokens were copied into it."""
        self.tokens[: len(stored)].copy_(stored, non_blocking=True)
        return self.tokens


Source = Resident | Streamed


def resident(splits: Sequence[Split], device: torch.device) -> Resident:
    return Resident(splits, device)


def choose_source(
    splits: Sequence[Split], device: torch.device, *, how: str, largest_batch: int
) -> tuple[Source | None, str]:
    """The source that the splits of a run share, and why it is this one; None on a CPU, where every split
    reads its memory map.

    how: `device`, `stream`, or `auto`, which streams what would take much of the GPU's memory.
    largest_batch: the most tokens that a batch can have.
    """
    if device.type == "cpu" and how != "stream":
        return None, "read from the memory map"
    size = sum(split.tokens.nbytes for split in splits)
    if how == "auto":
        free, _ = torch.cuda.mem_get_info(device)
        how = "device" if size <= LARGEST_SHARE * free else "stream"
    if how == "device":
        return Resident(splits, device), f"{size / 2**20:,.0f} MiB kept on the device"
    capacity = max(1, largest_batch)
    return Streamed(capacity, splits[0].tokens.dtype, device), f"{size / 2**20:,.0f} MiB streamed by batch"


def pinned(array: np.ndarray, device: torch.device) -> Tensor:
    """The array as a host tensor from which a copy to `device` does not wait."""
    host = torch.from_numpy(np.ascontiguousarray(array))
    return host.pin_memory() if device.type == "cuda" else host
