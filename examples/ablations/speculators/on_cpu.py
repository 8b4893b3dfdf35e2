"""speculators' own training command on a CPU, in an environment of its own (`pip install
speculators==0.9.0`): what it asks of an accelerator is answered for the CPU.

    python on_cpu.py --speculator-type eagle3 --verifier-name-or-path VERIFIER --data-path DATA \
      --save-path RUN --draft-attn-impl sdpa --loss-implementation eager --num-workers 0 \
      --total-seq-len 512 --draft-vocab-size 32000 --epochs 1 --max-steps 170 --on-missing raise
"""

from typing import Any

import torch
from speculators.train import dataloader, trainer
from speculators.train.cli import main
from speculators.train.config import TrainConfig

torch.accelerator.current_accelerator = lambda *args, **kwargs: torch.device("cpu")
torch.accelerator.synchronize = lambda *args, **kwargs: None
trainer.get_local_rank = lambda: "cpu"
loader = dataloader.DataLoader


def unpinned(*args: Any, **kwargs: Any) -> Any:
    return loader(*args, **kwargs | {"pin_memory": False})


dataloader.DataLoader = unpinned

if __name__ == "__main__":
    main(TrainConfig.resolve())
