"""Numbers in rows, on a device that is only a name. What `full` makes is kept as one number until somebody changes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import faults


class Tensor:
    def __init__(self, shape: Sequence[int], values: list[Any] | float, device: str) -> None:
        self.shape, self.values, self.device = tuple(shape), values, device

    @property
    def gpu(self) -> int | None:
        return int(self.device.removeprefix("cuda:")) if self.device.startswith("cuda:") else None

    def numel(self) -> int:
        count = 1
        for side in self.shape:
            count *= side
        return count

    def tolist(self) -> list[Any]:
        if isinstance(self.values, list):
            return self.values
        row: Any = self.values
        for side in reversed(self.shape):
            row = [row] * side
        found: list[Any] = row
        return found

    def cpu(self) -> Tensor:
        return Tensor(self.shape, self.values, "cpu")

    def to(self, device: str) -> Tensor:
        moved = Tensor(self.shape, self.values, device)
        if self.gpu is not None and faults.come("copy", gpu=self.gpu, to=moved.gpu):
            moved.values = [*self.tolist()[:-1], -1]
        return moved

    def min(self) -> float:
        return float(min(self.tolist()) if isinstance(self.values, list) else self.values)

    def max(self) -> float:
        return float(max(self.tolist()) if isinstance(self.values, list) else self.values)

    def __matmul__(self, other: Tensor) -> Tensor:
        columns = list(zip(*other.tolist(), strict=True))
        product = [
            [sum(a * b for a, b in zip(row, column, strict=True)) for column in columns] for row in self.tolist()
        ]
        if faults.come("matmul", gpu=self.gpu):
            product[-1][-1] += 1
        return Tensor((self.shape[0], other.shape[1]), product, self.device)


def full(shape: Sequence[int], value: float, *, device: str = "cpu") -> Tensor:
    return Tensor(shape, value, device)


def zeros(size: int, *, device: str = "cpu") -> Tensor:
    return Tensor((size,), 0.0, device)


def arange(end: int) -> Tensor:
    return Tensor((end,), list(range(end)), "cpu")
