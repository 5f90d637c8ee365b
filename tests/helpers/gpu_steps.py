"""What must hold for every compiled training step on a GPU."""

import torch

from deepseek_v3.training.trainer import Trainer


def check_compiled_steps(trainer: Trainer) -> None:
    """Trains five steps, which are compiled without a break; from the third on none waits for the device."""
    batches = trainer.batches()
    for number in (1, 2):
        trainer._train_step(trainer.plan.step(number), next(batches))
    assert not torch._dynamo.utils.counters["graph_break"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in (3, 4, 5):
            trainer._train_step(trainer.plan.step(number), next(batches))
    finally:
        torch.cuda.set_sync_debug_mode("default")
