"""Where the points of the documents wait for the last document: FeatureStore, in memory, in half of it, or on disk."""

from __future__ import annotations

import math
import mmap
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from gelora_plugins.errors import ProbeError

_PRIVATE: dict[str, int] = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}


def own_pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros on the CPU in pages of their own, outside malloc's heap; a page takes memory once it is written.

    glibc's malloc (2.36) takes tensors of up to 32 MB from its heap. A small tensor that stays alive between those of
    a forward pass keeps the room that they leave from being used again: on SmolLM2, 16 documents of 128 tokens, each
    forward pass kept 130 MiB in half of the runs.
    """
    count = math.prod(shape)
    pages = mmap.mmap(-1, count * dtype.itemsize, **_PRIVATE)
    return torch.frombuffer(pages, dtype=dtype, count=count).view(shape)


class _Points(Protocol):
    """The points of one boundary. `write` puts float32 points (documents, features) from row `start` on."""

    def write(self, start: int, points: Tensor) -> None: ...

    def read(self, count: int) -> Tensor: ...


class _Memory:
    def __init__(self, num_documents: int, num_features: int) -> None:
        self.values = own_pages((num_documents, num_features), torch.float32)

    def write(self, start: int, points: Tensor) -> None:
        self.values[start : start + len(points)] = points

    def read(self, count: int) -> Tensor:
        return self.values[:count]


class _Half:
    """float16 of each point's difference from the median of the first batch, divided by its largest coordinate.

    The difference, because a large constant coordinate would leave no digits to what varies; the median, because one
    point far away would move a mean as far from all others; the division, because float16 ends at 65504. What remains
    is an error of 2^-12 of each coordinate of the difference.
    """

    def __init__(self, num_documents: int, num_features: int) -> None:
        self.values = own_pages((num_documents, num_features), torch.float16)
        self.scales = own_pages((num_documents, 1), torch.float32)
        self.shift = own_pages((num_features,), torch.float32)

    def write(self, start: int, points: Tensor) -> None:
        if start == 0:
            self.shift[:] = points.median(dim=0).values
        differences = points - self.shift
        scales = differences.abs().amax(dim=1, keepdim=True)
        stop = start + len(points)
        self.scales[start:stop] = scales
        self.values[start:stop] = differences / scales.where(scales > 0, 1)

    def read(self, count: int) -> Tensor:
        return torch.addcmul(self.shift, self.values[:count].float(), self.scales[:count])


class _Disk:
    """A file without a name, in the directory of temporary files: it is gone with the process, however that ends."""

    def __init__(self, num_documents: int, num_features: int) -> None:
        self.num_features = num_features
        self.file = tempfile.TemporaryFile(prefix="gelora-")  # noqa: SIM115, closed when nothing refers to it

    def write(self, start: int, points: Tensor) -> None:
        try:
            self.file.seek(start * self.num_features * points.dtype.itemsize)
            self.file.write(points.contiguous().numpy().data)
            self.file.flush()
        except OSError as error:
            raise ProbeError(
                f"The points cannot be written to {tempfile.gettempdir()}: {error}. Set TMPDIR to a directory with "
                "room, lower probe_samples, or choose another feature_storage."
            ) from error

    def read(self, count: int) -> Tensor:
        self.file.seek(0)
        values = np.fromfile(self.file, dtype=np.float32, count=count * self.num_features)
        return torch.from_numpy(values).view(count, self.num_features)


KINDS: dict[str, type[Any]] = {"memory": _Memory, "half": _Half, "disk": _Disk}


class FeatureStore(Sequence[Tensor], AbstractContextManager["FeatureStore", None]):
    """One float32 tensor (documents, features) per block boundary, made when it is asked for; the rows of all are the
    same documents. What it holds is let go when it is left as a context.

    Args:
        kind: `memory`, `half` or `disk`, as the option `feature_storage`.
        num_documents: how many documents there is room for.

    Attributes:
        num_filled: how many documents it holds.
    """

    def __init__(self, kind: str, num_documents: int) -> None:
        self.kind = kind
        self.num_documents = num_documents
        self.num_filled = 0
        self._boundaries: list[_Points] = []

    def append(self, batch: Sequence[Tensor]) -> None:
        """Add the documents of a batch: one float32 CPU tensor (documents, features) per boundary.

        Raises:
            ProbeError: more documents than there is room for, or the disk takes no more.
        """
        stop = self.num_filled + len(batch[0])
        if stop > self.num_documents:
            raise ProbeError(
                f"The batches hold {stop} documents so far; expected {self.num_documents} in all. The data collator "
                "must make one document of each row."
            )
        if not self._boundaries:
            self._boundaries = [KINDS[self.kind](self.num_documents, points.shape[1]) for points in batch]
        for boundary, points in zip(self._boundaries, batch, strict=True):
            boundary.write(self.num_filled, points)
        self.num_filled = stop

    def truncate(self, count: int) -> None:
        """Keep the first `count` documents."""
        self.num_filled = count

    def __len__(self) -> int:
        return len(self._boundaries)

    def __getitem__(self, boundary: Any) -> Any:
        return self._boundaries[boundary].read(self.num_filled)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._boundaries = []
