"""`train.py` with FSDP2 on CPUs: accelerate has it for accelerators alone, torch for CPUs too.

Launched by tests/train/test_processes.py; the commands and the accelerate configuration are those
of a GPU machine.
"""

import gc
import sys
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from headstart.cli.main import main
from headstart.heads.target import Target
from headstart.heads.unroll import DraftHead
from headstart.train import run as run_module

_init = AcceleratorState.__init__
_prepare = run_module.Accelerator.prepare
_open = run_module.open_whole


def _fsdp_on_cpu(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kw: Any) -> None:
    _init(self, *args, fsdp_plugin=fsdp_plugin, **kw)
    if fsdp_plugin is not None:  # later calls look at the state that is there
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)


def _split(self: Any, *args: Any) -> Any:
    """Prepare, and see that what is trained is really split, and the target's table is not."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    prepared = _prepare(self, *args)
    head = prepared[0]
    assert all(isinstance(parameter, DTensor) for parameter in head.trainable().values())
    assert not isinstance(head.assistant.lm_head.weight, DTensor)
    policy = self.state.fsdp_plugin.mixed_precision_policy
    if self.mixed_precision == "bf16":
        assert policy.param_dtype == torch.bfloat16
        units = [m for m in head.modules() if isinstance(m, FSDPModule)]
        of_heads = [m._get_fsdp_state()._mp_policy.reduce_dtype for m in units]
        assert set(of_heads) == {torch.float32}
    print("split over", self.num_processes, flush=True)
    return prepared


def _open_alone(*args: Any) -> Target:
    """Load a target to evaluate, and see that nothing of before is alive beside it."""
    left = [type(o).__name__ for o in gc.get_objects() if issubclass(type(o), (Target, DraftHead))]
    assert not left, f"still alive: {left}"
    return _open(*args)


if __name__ == "__main__":
    run_module.open_whole = _open_alone  # type: ignore[assignment]
    AcceleratorState.__init__ = _fsdp_on_cpu
    run_module.Accelerator.prepare = _split
    sys.exit(main(["train", *sys.argv[1:]]))
