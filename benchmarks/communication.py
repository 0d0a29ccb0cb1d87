"""Bytes that a device sends per training step, by formula: dense against low rank.

Rings: of B bytes, an all-reduce over n devices sends 2 (n - 1) / n B from each, an
all-gather to B or a reduce-scatter of B half of that. `python -m
benchmarks.communication` prints the tables and the plan of docs/scaling.md.

Letters: `i` in, `o` out, `r` rank, `t` rows (tokens of a device group), n devices.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from absl import app

from train.report import logs


def all_reduce(size: float, devices: int) -> float:
    """Returns what each device sends to sum arrays of so many bytes over a ring."""
    return 2 * all_gather(size, devices)


def all_gather(size: float, devices: int) -> float:
    """Returns what each device sends to make an array of so many bytes whole; a
    reduce-scatter of that array sends as much."""
    return (devices - 1) / devices * size


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A weight matrix of a model.

    Args:
      in_size: Its rows.
      out_size: Its columns.
      rank: Of its factors; None where it is dense.
    """

    in_size: int
    out_size: int
    rank: int | None = None

    @property
    def params(self) -> int:
        """Counts its numbers, which are its MACs for one row as well."""
        if self.rank is None:
            return self.in_size * self.out_size
        return self.rank * (self.in_size + self.out_size)


def data_parallel(matrices: Sequence[Matrix], devices: int, number: int = 4) -> float:
    """Sums all gradients: one all-reduce of each.

    Args:
      matrices: The model's.
      devices: Along the axis.
      number: Bytes of a number.
    """
    return all_reduce(number * sum(m.params for m in matrices), devices)


def fully_sharded(
    matrices: Sequence[Matrix], devices: int, number: int = 4, *, gathers: int = 1
) -> float:
    """Gathers every parameter and reduces its gradient to the share of a device.

    Args:
      matrices: The model's.
      devices: Along the axis.
      number: Bytes of a number.
      gathers: 1 where the gathered parameters are kept for the backward pass, 2 where
        they are gathered again.
    """
    size = number * sum(m.params for m in matrices)
    return (gathers + 1) * all_gather(size, devices)


def tensor_parallel(
    matrices: Sequence[Matrix], rows: int, devices: int, number: int = 2
) -> float:
    """Splits u along its inputs and v along its outputs: sums the hidden (t, r).

    Once forward (x u), once backward (the gradient of it, through v).

    Args:
      matrices: The factored ones.
      rows: t, of the devices along the axis together.
      devices: Along the axis.
      number: Bytes of a number.
    """
    hidden = sum(m.rank for m in matrices if m.rank is not None)
    return 2 * all_reduce(number * rows * hidden, devices)


def tensor_parallel_pairs(
    widths: Sequence[int], rows: int, devices: int, number: int = 2
) -> float:
    """Splits dense layers in pairs, columns then rows (Shoeybi et al., 2019).

    Each pair sums its output (t, width) forward and the gradient of its input backward.

    Args:
      widths: Of each pair's input and output.
      rows: t, of the devices along the axis together.
      devices: Along the axis.
      number: Bytes of a number.
    """
    return 2 * all_reduce(number * rows * sum(widths), devices)


class Decoder(NamedTuple):
    """A decoder of equal blocks: attention of four matrices, a perceptron of two.

    Args:
      blocks: How many.
      width: Features of a token.
      hidden: Features between the two matrices of the perceptron.
      vocabulary: Rows of the embedding, dense, which is the head as well.
      context: Tokens of an example.
    """

    blocks: int = 24
    width: int = 2048
    hidden: int = 8192
    vocabulary: int = 50_304
    context: int = 2048

    def matrices(self, fraction: float | None) -> list[Matrix]:
        """Lists the blocks' matrices at a fraction of their rank, None for dense."""
        shapes = [(self.width, self.width)] * 4
        shapes += [(self.width, self.hidden), (self.hidden, self.width)]
        return [
            Matrix(i, o, None if fraction is None else round(fraction * min(i, o)))
            for i, o in shapes * self.blocks
        ]

    @property
    def embedding(self) -> Matrix:
        """The table, dense."""
        return Matrix(self.vocabulary, self.width)

    def flops(self, fraction: float | None) -> float:
        """Counts the operations of a token, forward and backward: six for each number
        of a matrix and, for causal attention, of half a context of scores and sums."""
        numbers = sum(m.params for m in self.matrices(fraction)) + self.embedding.params
        attention = self.blocks * self.width * self.context
        return 6 * (numbers + attention)


class Chip(NamedTuple):
    """What is assumed of a chip.

    Args:
      name: For the table.
      flops: Peak, in bfloat16, a second.
      memory: Bytes.
      bandwidth: Bytes a second that it sends along one axis of the mesh.
      utilization: Share of the peak that matrix products reach.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    utilization: float = 0.5


V5E = Chip("TPU v5e", flops=197e12, memory=16e9, bandwidth=100e9)
"""cloud.google.com/tpu/docs/v5e: 197 TFLOP/s, 16 GB, 1,600 Gbit/s between chips; of its
four ports of 50 GB/s two lie along one axis of the 2D torus."""


class Plan(NamedTuple):
    """A step of a decoder on a mesh: bytes of a chip, seconds, expected efficiency."""

    params: float
    data_bytes: float
    fsdp_bytes: float
    tensor_bytes: float
    compute: float
    communication: float
    state_bytes: float
    activation_bytes: float

    @property
    def efficiency(self) -> tuple[float, float]:
        """Returns the share of time in products: nothing hidden, everything hidden."""
        together = self.compute + self.communication
        return (
            self.compute / together,
            self.compute / max(self.compute, self.communication),
        )


def plan(
    model: Decoder,
    fraction: float | None,
    chip: Chip,
    *,
    data: int,
    fsdp: int,
    tensor: int,
    tokens: int,
) -> Plan:
    """Plans a step.

    Parameters, gradients and Adam's two moments are float32 and split over `fsdp` and
    `tensor`; they are gathered twice, since each block is computed again in the
    backward pass; activations are bfloat16. What is gathered over `fsdp` is split over
    `tensor`, and what is summed over `data` over both.

    Args:
      model: The decoder.
      fraction: Of the ranks; None for dense.
      chip: What it runs on.
      data: Chips along this axis of the mesh.
      fsdp: Chips along this one.
      tensor: Chips along this one.
      tokens: Of a step, of all chips together.
    """
    matrices = model.matrices(fraction)
    every = [*matrices, model.embedding]
    params, shards = sum(m.params for m in every), fsdp * tensor
    rows = tokens // (data * fsdp)
    if fraction is None:
        pairs = [model.width] * (2 * model.blocks)
        split = tensor_parallel_pairs(pairs, rows, tensor)
    else:
        split = tensor_parallel(matrices, rows, tensor)
    # the product of each block, and again where the block is computed again
    split *= 1.5
    sent = (
        data_parallel(every, data) / shards,
        fully_sharded(every, fsdp, gathers=2) / tensor,
        split,
    )
    # recomputing costs the forward pass, a third of it all, once more
    work = 4 / 3 * model.flops(fraction) * tokens
    chips = data * shards
    kept = 2 * rows * model.width * model.blocks / tensor
    widest = 2 * rows * (4 * model.width + 2 * model.hidden) / tensor
    logits = 4 * rows * model.vocabulary / tensor
    gathered = 4 * params / (model.blocks * tensor)
    return Plan(
        params,
        *sent,
        compute=work / (chips * chip.flops * chip.utilization),
        communication=sum(sent) / chip.bandwidth,
        state_bytes=16 * params / shards,
        activation_bytes=kept + widest + logits + gathered,
    )


FRACTIONS: dict[str, float | None] = {
    "dense": None,
    "rank 1/2": 1 / 2,
    "rank 1/4": 1 / 4,
    "rank 1/8": 1 / 8,
}

MESHES = ((256, 1, 1), (16, 16, 1), (1, 256, 1), (4, 16, 4), (2, 16, 8))
"""data, fsdp, tensor."""

TOKENS = 256 * 8192
"""Of a step: four contexts of 2,048 for each chip."""


def volume_table(model: Decoder, devices: int, rows: int) -> str:
    """Formats what a device sends for the blocks alone, each way of sharding by itself.

    Args:
      model: The decoder.
      devices: Along the one axis.
      rows: Tokens of a device for `data` and `fsdp`, of all of them for `tensor`.
    """
    lines = []
    for name, fraction in FRACTIONS.items():
        matrices = model.matrices(fraction)
        pairs = tensor_parallel_pairs([model.width] * 2 * model.blocks, rows, devices)
        split = tensor_parallel(matrices, rows, devices) if fraction else pairs
        sizes = (
            data_parallel(matrices, devices),
            fully_sharded(matrices, devices),
            fully_sharded(matrices, devices, gathers=2),
            split,
        )
        params = sum(m.params for m in matrices)
        lines.append(
            [name, f"{params / 1e6:.0f} M", *(f"{x / 1e9:.2f} GB" for x in sizes)]
        )
    headers = ["", "params", "data", "fsdp, kept", "fsdp, again", "tensor"]
    return logs.table(headers, lines)


def plan_table(model: Decoder, chip: Chip) -> str:
    """Formats the plans of each form on each mesh of 256 chips."""
    lines = []
    for mesh in MESHES:
        for name in ("dense", "rank 1/4"):
            axes = dict(zip(("data", "fsdp", "tensor"), mesh, strict=True))
            found = plan(model, FRACTIONS[name], chip, **axes, tokens=TOKENS)
            memory = found.state_bytes + found.activation_bytes
            low, high = found.efficiency
            lines.append(
                ["x".join(map(str, mesh)), name]
                + [f"{x / 1e9:.2f}" for x in found[1:4]]
                + [f"{1e3 * x:.0f}" for x in (found.compute, found.communication)]
                + [f"{low:.0%} to {high:.0%}"]
                + [f"{memory / 1e9:.1f}" + ("!" if memory > chip.memory else "")]
            )
    headers = ["data x fsdp x tensor", "", "data GB", "fsdp GB", "tensor GB"]
    headers += ["compute ms", "sending ms", "efficiency", "memory GB"]
    return logs.table(headers, lines)


def _main(argv: Sequence[str]) -> None:
    del argv
    model = Decoder()
    print(volume_table(model, devices=16, rows=8192), end="\n\n")
    print(plan_table(model, V5E))


if __name__ == "__main__":
    app.run(_main)
