"""Bytes by formula against numbers made by hand, and those of a compiled program."""

import pytest

from benchmarks import communication, mesh_scaling
from benchmarks.communication import Decoder, Matrix


def test_rings():
    """4 devices pass on 3 of 4 parts to gather or reduce, twice that to do both."""
    assert communication.all_gather(400, 4) == 300
    assert communication.all_reduce(400, 4) == 600
    assert communication.all_reduce(400, 1) == 0


def test_ways_of_sharding():
    """A dense 6 x 4 beside factors of rank 2: 24 and 20 numbers of 4 bytes."""
    matrices = [Matrix(6, 4), Matrix(6, 4, rank=2)]
    assert [m.params for m in matrices] == [24, 20]
    assert communication.data_parallel(matrices, 2) == 2 * 1 / 2 * 176
    assert communication.fully_sharded(matrices, 4) == 2 * 3 / 4 * 176
    assert communication.fully_sharded(matrices, 4, gathers=2) == 3 * 3 / 4 * 176
    # 10 rows of a hidden of 2 in 2 bytes, forward and backward, over 2 devices
    assert communication.tensor_parallel(matrices[1:], 10, 2) == 2 * 40
    # 10 rows of the widths 6 and 4, likewise
    assert communication.tensor_parallel_pairs([6, 4], 10, 2) == 2 * 200


def test_tensor_parallel_factors_pay_below_a_third_of_the_width():
    """A block sums six hiddens where dense pairs sum two outputs, each twice."""
    model = Decoder(blocks=1, width=12, hidden=48)
    dense = communication.tensor_parallel_pairs([12, 12], 5, 4)
    at = {
        rank: communication.tensor_parallel(model.matrices(rank / 12), 5, 4)
        for rank in (3, 4, 6)
    }
    assert at[3] == 3 / 4 * dense and at[4] == dense and at[6] == 3 / 2 * dense


def test_a_decoder_of_1_3_billion():
    """12 d^2 numbers a block; r (2 d) four times and r (5 d) twice in factors."""
    model = Decoder()
    dense = sum(m.params for m in model.matrices(None))
    low = sum(m.params for m in model.matrices(1 / 4))
    assert dense == 24 * 12 * 2048**2
    assert low == 24 * 512 * (4 * 2 + 2 * 5) * 2048
    assert dense + model.embedding.params == pytest.approx(1.31e9, rel=1e-3)


def test_a_plan():
    """State is split over fsdp x tensor; compute over all; nothing goes alone."""
    axes = {"data": 1, "fsdp": 1, "tensor": 1}
    chip = communication.V5E
    one = communication.plan(Decoder(), 1 / 4, chip, **axes, tokens=8192)
    assert one.communication == 0 and one.efficiency == (1, 1)
    assert one.state_bytes == 16 * one.params
    axes = {"data": 2, "fsdp": 4, "tensor": 2}
    many = communication.plan(Decoder(), 1 / 4, chip, **axes, tokens=16 * 8192)
    assert many.state_bytes == 2 * one.params and many.compute == one.compute
    assert many.efficiency[0] < many.efficiency[1] <= 1


def test_collectives_are_counted_in_a_program():
    """What a device sends, by kind, in the three ways in which groups are written."""
    text = """
      %a = (f32[8,4]{1,0}, bf16[2]{0}) all-reduce(%x), replica_groups={{0,1},{2,3}}, t
      %b = f32[16]{0} all-gather(%y), channel_id=1, replica_groups=[2,4]<=[8], d
      %c = f32[16]{0} all-gather(%y), replica_groups=mesh['a'=2,'b'=4] {'b'}, d
      %d = f32[3]{0} reduce-scatter(%z), replica_groups={{0,1,2,3}}, dimensions={0}
      %e = f32[16]{0} add(%b, %c)
    """
    assert mesh_scaling.collectives(text) == {
        "all-reduce": (1, 8 * 4 * 4 + 2 * 2),
        "all-gather": (2, 2 * 3 / 4 * 64),
        "reduce-scatter": (1, 3 * 12),
    }


@pytest.mark.parametrize("axis", mesh_scaling.AXES)
def test_a_compiled_step_sends_what_the_formula_says(axis, monkeypatch):
    """At least that, and not far more: the dense head, biases, fsdp's whole sums."""
    monkeypatch.setattr(mesh_scaling, "HIDDEN", (64, 64))
    step, state, batch = mesh_scaling.make_step(1 / 4, axis, 4)
    found = mesh_scaling.collectives(step.lower(state, batch).compile().as_text())
    sent = sum(size for _, size in found.values())
    formula = mesh_scaling.by_formula(1 / 4, axis, 4)
    assert formula <= sent <= 3.5 * formula
