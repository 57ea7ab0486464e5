"""``trainer.strategy=fsdp``: parameters, their gradients and the optimiser's state shared out among devices."""

import warnings

import torch
import torch.distributed
from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.modules.batchnorm import _NormBase

from gitlight.config import OptimizerConfig, TrainerConfig
from gitlight.errors import ConfigError
from gitlight.speed import trained_layers

_OWN_UNIT = 2**20
"""Entries from which a layer is a unit of its own: whole on a device while it computes, no longer."""


def check_shardable(module: nn.Module, settings: TrainerConfig, optimizer: OptimizerConfig) -> None:
    """Find out before a run begins whether ``trainer.strategy=fsdp`` can train it.

    Args:
        module: a generator, a leaked model or an image prior.
        settings: of the run, and
        optimizer: how it trains.

    Raises:
        ConfigError: what it trains is not used as layers, as the weights that `exact` descends on are not; or some
            other setting does not go with it.
    """
    if settings.strategy != "fsdp":
        return
    if settings.channels_last:
        raise ConfigError(
            "trainer.channels_last: FSDP shards contiguous weights alone. Leave it out, or give trainer.strategy=ddp."
        )
    trains = any(parameter.requires_grad for parameter in module.parameters())
    if scalars := [name for name, p in module.named_parameters() if p.requires_grad and p.ndim == 0]:
        raise ConfigError(
            f"trainer.strategy: fsdp cannot shard {scalars[0]}, a parameter without dimensions. Give it one, of one "
            "entry, or trainer.strategy=ddp."
        )
    if trains and optimizer.name == "sgd" and optimizer.momentum == 0:
        # Lightning stumbles over the state of an optimiser that keeps none.
        raise ConfigError(
            "optimizer.momentum: without momentum a run under FSDP could not be resumed. Give one above zero, or "
            "trainer.strategy=ddp."
        )
    if trains and not list(trained_layers(module)):
        raise ConfigError(
            f"trainer.strategy: fsdp shards trained layers, and {type(module).__name__} trains weights that every "
            "device needs whole. Give trainer.strategy=ddp."
        )


class FullyShardedStrategy(ModelParallelStrategy):
    """PyTorch's FSDP2 over all devices, on GPUs and on CPUs; checkpoints are those of any other strategy.

    Lightning's own ``fsdp`` is the former FSDP, for GPUs alone; its strategy for FSDP2 shards as the module says.
    """

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """All devices share the data, and none a single layer's product."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()


class ShardableModule(LightningModule):
    """A LightningModule that can be trained with `FullyShardedStrategy`.

    Attributes:
        forward_methods: names of methods beside ``forward`` that use the parameters of `sharded`.
        large_layers_apart: whether large layers are whole one at a time, not all at once. Each must then be called
            itself, which users' own modules need not do, and share no weight with another.
    """

    forward_methods: tuple[str, ...] = ()
    large_layers_apart = False
    _steps_of_others = 0
    _had_backward = False

    @property
    def sharded(self) -> nn.Module:
        """What is sharded: all that is trained is in it, and used by its ``forward`` and ``forward_methods`` alone."""
        raise NotImplementedError

    def configure_model(self) -> None:
        """Shard, where that is the strategy; Lightning calls it before the optimiser is made."""
        strategy = self.trainer.strategy
        if isinstance(strategy, FullyShardedStrategy):
            mesh = strategy.device_mesh["data_parallel"]
            _shard(self.sharded, mesh, self.forward_methods, self.large_layers_apart)

    def on_after_backward(self) -> None:
        """Refuse what no optimiser state is kept of: a run could not be resumed. DDP refuses it, too."""
        if not isinstance(self.trainer.strategy, FullyShardedStrategy) or self._had_backward:
            return
        self._had_backward = True
        if unused := [name for name, p in self.sharded.named_parameters() if p.requires_grad and p.grad is None]:
            raise ConfigError(
                f"trainer.strategy: fsdp: the loss does not depend on {unused[0]}. Take it out of the model, set its "
                "requires_grad to false, or train on one device."
            )

    def on_validation_start(self) -> None:
        """Ask how many batches the rank with the most of them has, and take over the first rank's running averages."""
        if isinstance(self.trainer.strategy, FullyShardedStrategy):
            for layer in self.sharded.modules():
                # Each rank averaged over its own batches. DistributedDataParallel, too, goes by those of the first.
                if isinstance(layer, _NormBase):
                    for buffer in layer.buffers(recurse=False):
                        torch.distributed.broadcast(buffer, src=0)
            count = torch.tensor(_n_batches(self.trainer), device=self.device)
            torch.distributed.all_reduce(count, op=torch.distributed.ReduceOp.MAX)
            self._steps_of_others = int(count)

    def is_waited_for(self, batch_idx: int) -> bool:
        """Whether others validate on one batch more than this rank, whose last one this is.

        Sharded parameters are gathered from all ranks in every forward pass, so that all must make as many.
        """
        return self._steps_of_others > 0 and batch_idx + 1 == _n_batches(self.trainer) < self._steps_of_others


def _n_batches(trainer: Trainer) -> int:
    """Of this rank, to validate on."""
    return int(sum(trainer.num_val_batches))


def _shard(module: nn.Module, mesh: DeviceMesh, forward_methods: tuple[str, ...], large_layers_apart: bool) -> None:
    for layer in module.modules() if large_layers_apart else ():
        if layer is not module and sum(p.numel() for p in layer.parameters(recurse=False)) >= _OWN_UNIT:
            fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    # Reconstructions are views, and nothing changes them in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for name in forward_methods:
        register_fsdp_forward_method(module, name)
