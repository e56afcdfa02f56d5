"""An ensemble's affine maps as padded matrices."""

from __future__ import annotations

from torch import Tensor


class Affine:
    """The maps h ↦ W h + b of S networks, each one matrix, [W b; 0 1] [h; 1] = [W h + b; 1].

    ``factor`` is [W b] (S, out, in + 1), copied, or the inner V (S, r, in) of a layer, which is not
    ``outer``, keeps b = 0, and has no max(·, 0) after it. The ``last`` matrix has no last row.
    """

    def __init__(self, factor: Tensor, outer: bool, last: bool) -> None:
        networks, out, columns = factor.shape
        ins = columns - outer
        # Rows are whole cache lines, 16 floats.
        padded = factor.new_zeros(networks, out + (not last), -(-(ins + 1) // 16) * 16)
        padded[:, :out, :columns] = factor
        if not last:
            padded[:, out, ins] = 1
        self.padded, self.out, self.outer, self.last = padded, out, outer, last
        self.matrix, self.weight = padded[..., : ins + 1], padded[:, :out, :ins]
        self.trained = padded[..., :columns]  # what a step changes: without an inner bias
