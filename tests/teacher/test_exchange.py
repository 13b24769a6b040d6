"""Between different layouts: every score reaches its rank and position; weights are resharded."""

import os

import pytest
import torch
from support.helpers import run_distributed

CASES = {  # (student tp, pp), (teacher tp, pp, vpp), rows a student replica
    "tp2_to_pp2": ((2, 1), (1, 2, None), 4),
    "dp4_to_tp2_pp2": ((1, 1), (2, 2, None), 3),
    "pp2_dp2_to_tp2_dp2": ((1, 2), (2, 1, None), 5),
    "tp4_to_dp4": ((4, 1), (1, 1, None), 6),
    "tp2_pp2_to_pp4": ((2, 2), (1, 4, None), 3),
    "dp2_pp2_to_interleaved": ((1, 2), (1, 2, 2), 4),
}
APART = {  # two ranks of the student, two of the teacher
    "tp2_to_pp2": ((2, 1), (1, 2, None), 4),
    "dp2_to_tp2": ((1, 1), (2, 1, None), 3),
    "pp2_to_dp2": ((1, 2), (1, 1, None), 5),
    "dp2_to_interleaved": ((1, 1), (1, 2, 2), 4),
}


def layout(tp, pp, vpp=None):
    from megatron_tropd.config import ModelConfig

    sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    return ModelConfig(virtual_pipeline_model_parallel_size=vpp, **sizes)


def make_batch(replica: int, rows: int):
    """Rows of a width of the replica's own, with ragged losses and one row without any."""
    from megatron_tropd.types import TrainingBatch

    width = 8 * (1 + replica % 3)
    generator = torch.Generator().manual_seed(replica)
    tokens = torch.randint(1000, (rows, width), generator=generator)
    kind = torch.randint(0, 3, (rows, width), generator=generator).to(torch.int8)
    kind[0] = 0
    positions = torch.arange(width).expand(rows, width).contiguous()
    return TrainingBatch(
        tokens, tokens + 1, positions, kind, torch.zeros(rows, width), torch.arange(rows) + 100 * replica
    )


def open_exchange(student, teacher, apart):
    """Return this rank's exchange, on shared ranks or on two of four for each model."""
    from megatron_tropd.parallel import groups as parallel
    from megatron_tropd.parallel.partition import Partition
    from megatron_tropd.teacher.exchange import Exchange

    if not apart:
        groups = parallel.initialize(layout(*student))
        return Exchange(groups, parallel.build_groups(layout(*teacher), groups))
    partition = Partition(int(os.environ["RANK"]), 2, 4)
    groups = parallel.initialize(layout(*(teacher if partition.is_teacher else student)), partition=partition)
    partition.meet()
    return Exchange(*((None, groups) if partition.is_teacher else (groups, None)), partition.bridge)


def teach(exchange, share, interleaved):
    """Check a teacher replica's share; return what is to be sent back, on the last stage."""
    multiple = 2 * (exchange.teacher.pp_size if interleaved else 1)
    assert share.batch.tokens.size(0) % multiple == 0
    assert torch.equal(share.batch.labels[share.batch.loss_kind > 0], share.batch.tokens[share.batch.loss_kind > 0] + 1)
    if not exchange.teacher.is_last_stage:
        return None
    return torch.stack([share.batch.tokens, share.batch.position_ids, share.batch.labels], -1).int()


def exchange_rank(student, teacher, rows, apart=False):
    from megatron_tropd.teacher import exchange as exchange_module

    exchange = open_exchange(student, teacher, apart)
    groups = exchange.student
    batch = make_batch(groups.dp_rank, rows) if groups else None
    share = exchange.distribute(batch, micro_batch_size=2)
    payload = teach(exchange, share, teacher[2]) if exchange.teacher else None
    whole, sent_bytes = exchange.collect(payload, share, 3, torch.int32), exchange_module._SENT_BYTES
    exchange_module._SENT_BYTES = 5 * 12  # five tokens at a time
    found = exchange.collect(payload, share, 3, torch.int32)
    exchange_module._SENT_BYTES = sent_bytes
    if groups is None or not groups.is_last_stage:
        assert found is None
        return 0
    assert torch.equal(found, whole)
    mask = batch.loss_kind > 0
    expected = torch.stack([batch.tokens, batch.position_ids, batch.labels], -1).int()
    assert found.shape == expected.shape
    assert torch.equal(found[mask], expected[mask])
    assert not found[~mask].any()
    return int(mask.sum())


@pytest.mark.parametrize("case", CASES)
def test_values_of_every_loss_token_come_back_to_their_place(case):
    student, teacher, rows = CASES[case]
    assert sum(run_distributed(exchange_rank, 4, student, teacher, rows)) > 0


@pytest.mark.parametrize("case", APART)
def test_values_come_back_from_ranks_of_the_teachers_own(case):
    student, teacher, rows = APART[case]
    assert sum(run_distributed(exchange_rank, 4, student, teacher, rows, True)) > 0


def groups_rank(tp, pp):
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_tropd.parallel import groups as parallel

    single = parallel.initialize(layout(1, 1))
    built = parallel.build_groups(layout(tp, pp), single).collection
    ranks = {name: torch.distributed.get_process_group_ranks(group) for name, group in vars(built).items() if group}
    parallel.initialize(layout(tp, pp))
    theirs = ProcessGroupCollection.use_mpu_process_groups()
    for name, mine in ranks.items():
        assert mine == torch.distributed.get_process_group_ranks(getattr(theirs, name)), name
    missing = [name for name, group in vars(theirs).items() if isinstance(group, torch.distributed.ProcessGroup)]
    return sorted(set(missing) - ranks.keys())


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (2, 2), (1, 2)])
def test_groups_of_an_own_layout_are_those_that_megatron_makes(tp, pp):
    optimizer_only = {"intra_dp_cp", "intra_expt_dp", "intra_dist_opt", "inter_dist_opt"}
    for missing in run_distributed(groups_rank, 4, tp, pp):
        assert {name for name in missing if "gtp" not in name and not name.endswith("_ag")} <= optimizer_only


def weight_rank(student, teacher, width, apart=False):
    exchange = open_exchange(student, teacher, apart)
    groups, others = exchange.student, exchange.teacher
    whole = torch.arange(48 * 5).view(48, 5).bfloat16()  # the teacher's padded vocabulary of 48
    shard = whole.chunk(others.tp_size)[others.tp_rank] if others and others.is_last_stage else None
    found = exchange.reshard_output_weight(shard, width, 5, torch.bfloat16)
    if groups is None or not groups.is_last_stage:
        assert found is None
        return
    padded = torch.cat([whole, torch.zeros(max(0, width * groups.tp_size - 48), 5)])
    assert torch.equal(found, padded[groups.tp_rank * width :][:width])


@pytest.mark.parametrize(
    ("student", "teacher", "width"),
    [((2, 1), (1, 2), 24), ((4, 1), (2, 1), 16), ((1, 2), (4, 1), 40), ((2, 2), (1, 1), 20)],
)
def test_the_teachers_output_layer_arrives_in_the_students_shards(student, teacher, width):
    run_distributed(weight_rank, 4, student, teacher, width)


@pytest.mark.parametrize(("student", "teacher", "width"), [((2, 1), (1, 2), 20), ((1, 2), (2, 1), 52)])
def test_the_output_layer_arrives_from_ranks_of_the_teachers_own(student, teacher, width):
    run_distributed(weight_rank, 4, student, teacher, width, True)


def unequal_rank():
    from megatron_tropd.parallel import groups as parallel
    from megatron_tropd.teacher.exchange import Exchange

    groups = parallel.initialize(layout(1, 1))
    exchange = Exchange(groups, parallel.build_groups(layout(2, 1), groups))
    with pytest.raises(ValueError, match=r"batches of \[3, 4\] rows"):
        exchange.distribute(make_batch(0, 3 + groups.dp_rank), 1)


def test_replicas_with_unequal_batches_are_refused():
    run_distributed(unequal_rank, 2)


def too_large_rank():
    from megatron_tropd.errors import UserError
    from megatron_tropd.parallel import groups as parallel

    groups = parallel.initialize(layout(1, 1))
    with pytest.raises(UserError, match=r"2 process.*teacher.tensor_model_parallel_size=4 .* multiple of 4"):
        parallel.build_groups(layout(4, 1), groups)


def test_a_teacher_layout_that_does_not_fit_is_refused():
    run_distributed(too_large_rank, 2)
