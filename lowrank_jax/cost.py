"""Parameters and multiply-accumulates (MACs) of a factored layer as a function of rank.

Counts follow the literature: MACs of one example, padding counted, biases counted in
parameters only. A layer costs the least of the forms in which it can be stored and run.
Letters: `i` rows and `o` columns of the matrix.
"""

import contextlib
import dataclasses

from jax.errors import InconclusiveDimensionOperation

from lowrank_jax.errors import UserError
from lowrank_jax.ranks import RankValue, flatten_rank


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """What a layer made of equal matrices `(i, o)` costs at a rank.

    Args:
      in_size: Rows `i` of one matrix.
      out_size: Columns `o` of one matrix.
      matrices: How many there are (stacked modules times groups).
      dense_positions: How often one example multiplies by the dense matrix: 1 for a
        linear layer, the tokens of a sequence, the output pixels of a convolution.
      first_positions: How often it multiplies by `u`.
      second_positions: How often it multiplies by `v`.
      spared_positions: At how many of these the layer skips the columns of `v` that a
        form knows to be unit vectors.
    """

    in_size: int
    out_size: int
    matrices: int
    dense_positions: int
    first_positions: int
    second_positions: int
    spared_positions: int = 0

    @property
    def dense_params(self) -> int:
        """Counts the numbers of the dense matrices."""
        return self.matrices * self.in_size * self.out_size

    @property
    def dense_macs(self) -> int:
        """Counts the MACs of one example through the dense matrices."""
        return self.dense_params * self.dense_positions

    def factored_params(self, rank: RankValue) -> int:
        """Counts the numbers in the form's arrays, r (i + o) for each matrix `u v`."""
        return sum(map(self.form_params, self._ranks(rank)))

    def factored_macs(self, rank: RankValue) -> int:
        """Counts the MACs of one example through the form's arrays."""
        return sum(map(self.form_macs, self._ranks(rank)))

    def params(self, rank: RankValue) -> int:
        """Counts the parameters of the smaller form, matrix by matrix."""
        dense, ranks = self.in_size * self.out_size, self._ranks(rank)
        return sum(min(dense, params) for params in map(self.form_params, ranks))

    def macs(self, rank: RankValue) -> int:
        """Counts the MACs of the cheaper form, factored or merged, matrix by matrix.

        A lookup in a dense table costs none, so that its form is the one with fewer
        parameters.
        """
        ranks, dense = self._ranks(rank), self.in_size * self.out_size
        if not self.dense_positions:
            smaller = [number for number in ranks if self.form_params(number) < dense]
            return sum(map(self.form_macs, smaller))
        dense_macs = dense * self.dense_positions
        return sum(min(dense_macs, macs) for macs in map(self.form_macs, ranks))

    def form_params(self, rank: int) -> int:
        """Counts the numbers of one matrix at a rank; another form overrides it."""
        return rank * (self.in_size + self.out_size)

    def form_macs(self, rank: int) -> int:
        """Counts the MACs of one matrix at a rank; another form overrides it."""
        return rank * (
            self.in_size * self.first_positions + self.out_size * self.second_positions
        )

    def _ranks(self, rank: RankValue) -> list[int]:
        """Lists a rank for each matrix, from one number or a nested list of them."""
        flat = flatten_rank(rank)
        if not flat or self.matrices % len(flat):
            raise UserError(
                f"rank: must be one number or one for each of {self.matrices} matrices,"
                f" got {rank}. Give a list of that length."
            )
        return flat * (self.matrices // len(flat))


def merged_is_cheaper(
    in_size: int, out_size: int, rank: int, first: int, second: int, dense: int
) -> bool:
    """Returns whether forming `u v` first takes fewer operations than `u`, then `v`.

    The counts are of one matrix and of the forward pass, over all rows of the batch;
    the backward pass doubles both sides, so it does not change the answer. Where the
    batch has a symbolic size (`jax.export`) and the answer depends on it, it is that of
    a large one.

    Args:
      in_size: Rows `i`.
      out_size: Columns `o`.
      rank: Allocated rank.
      first: Rows multiplied by `u`.
      second: Rows multiplied by `v`.
      dense: Rows multiplied by the merged matrix.
    """
    factored = rank * (in_size * first + out_size * second)
    size = in_size * out_size
    for merged in (size * (rank + dense), size * dense):  # as of a large batch
        with contextlib.suppress(InconclusiveDimensionOperation):
            return bool(merged < factored)
    return False  # of a rank that is not known
