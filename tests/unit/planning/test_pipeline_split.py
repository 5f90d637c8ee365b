"""Pipeline stages of each rank and their micro-batches in flight, compared with torch's schedules."""

from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.pipelining import ScheduleDualPipeV, ScheduleInterleaved1F1B, ScheduleZBVZeroBubble

from deepseek_v3.config.parallel_config import ParallelConfig, PipelineSchedule
from deepseek_v3.planning.pipeline_split import max_in_flight, stages_of_rank


@pytest.mark.parametrize(
    ("schedule", "kind"),
    [
        ("interleaved", ScheduleInterleaved1F1B),
        ("zero_bubble", ScheduleZBVZeroBubble),
        ("dualpipe_v", ScheduleDualPipeV),
    ],
)
@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 4), (4, 8), (4, 20)])
def test_micro_batches_in_flight_match_torch_schedules(
    schedule: PipelineSchedule, kind: Any, ranks: int, micro_batches: int
) -> None:
    parallel = ParallelConfig(pipeline=ranks, pipeline_schedule=schedule)
    own = [
        SimpleNamespace(
            stage_index=stage,
            num_stages=2 * ranks,
            group_rank=0,
            group_size=ranks,
            submod=None,
            has_backward=True,
            is_first=stage == 0,
            is_last=stage == 2 * ranks - 1,
        )
        for stage in stages_of_rank(parallel, 0)
    ]
    order = kind(own, micro_batches, loss_fn=len).pipeline_order
    for rank in range(ranks):
        stages_kept = most = 0
        for action in filter(None, order[rank]):
            for part in action.sub_actions or [action]:
                name = part.computation_type.name
                stages_kept += {"FORWARD": 1, "FULL_BACKWARD": -1, "BACKWARD_INPUT": -1}.get(name, 0)
                most = max(most, stages_kept)
        assert max_in_flight(parallel, rank, micro_batches) == most / 2
