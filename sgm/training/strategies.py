"""Several processes: what is shared out, and how a run's state is written whatever the strategy.

A strategy stands in a recipe under ``lightning.trainer.strategy``, as a name that Lightning knows
or as a config; ``configs/training/strategies`` has some. All write the same ``last.ckpt``, whole
and in one file, so that a run goes on with another strategy or number of processes.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer

from sgm.modules.ema import gathered, shared_like
from sgm.training import snapshot


class FullyShard(ModelParallelStrategy):
    """FSDP2: every process holds its share of the weights, gradients, averages and moments.

    `shard` says of which parts. A block's weights are put together while it computes. States are
    saved whole and loaded share by share: by the order of the optimiser's own parameters, which is
    that of other strategies, where Lightning would take the order of all parameters.
    """

    lightning_restore_optimizer = True

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Share out over all processes of all machines."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the optimiser's state, whole on the first process."""
        state = optimizer.state_dict()
        whole = {
            number: {name: gathered(value) for name, value in moments.items()}
            for number, moments in state["state"].items()
        }
        return {**state, "state": whole}

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Open a state of any strategy, without reading its tensors yet."""
        return snapshot.load(Path(checkpoint_path), mapped=True)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take this process's share of the weights."""
        with torch.no_grad():
            for name, value in self.lightning_module.state_dict().items():  # type: ignore[union-attr]
                value.copy_(shared_like(value, checkpoint["state_dict"][name]))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this process's share of the optimisers' states."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            shares = {
                number: {
                    name: shared_like(parameters[number], value) if value.ndim else value
                    for name, value in moments.items()
                }
                for number, moments in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": shares})


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint to the disk directly, and leaves the one before until it is done."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint.

        Raises:
            ValueError: it cannot be written; the one before is kept.
        """
        snapshot.save_atomically(checkpoint, Path(path))


def shard(engine: nn.Module, mesh: DeviceMesh) -> None:
    """Share out the parameters of all parts that learn, in place; the others stay on each process.

    A part's blocks are shared out one by one, then what is around them. The parameters of a shared
    part are other objects afterwards.

    Args:
        engine: a `DiffusionEngine` or an `AutoencodingEngine`; what learns requires gradients.
        mesh: the processes, in one dimension.
    """
    for part in _parts(engine):
        if any(p.requires_grad for p in part.parameters()):
            for module in (*_blocks(part), part):
                fully_shard(module, mesh=mesh)
    if mesh.device_type == "cpu":  # gloo cannot average
        for module in engine.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)


def _parts(engine: Any) -> list[nn.Module]:
    """What the engine calls as modules: only then are shares put together."""
    if hasattr(engine, "conditioner"):
        return [engine.model.diffusion_model, *engine.conditioner.embedders]
    return [engine.encoder, engine.decoder]


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost sequences in a module, and members of its lists; those with parameters."""
    for child in module.children():
        block = isinstance(child, nn.Sequential) or isinstance(module, nn.ModuleList)
        if block and type(child).forward is not nn.Module.forward:
            if any(True for _ in child.parameters()):
                yield child
        else:
            yield from _blocks(child)


def reshard(engine: nn.Module) -> None:
    """Let go of parameters that are put together, after which their shares count again."""
    for module in engine.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
