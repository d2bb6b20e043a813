"""Process groups and data parallelism by Megatron-Core, and the one stand-in that lets its CUDA lines run on a CPU."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from cosmos_hpc.config.data_schema import DataConfig
from cosmos_hpc.config.errors import ConfigError
from cosmos_hpc.ranks import Rank
from cosmos_hpc.training.lean_import import lean_import

with lean_import():
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.num_microbatches_calculator import ConstantNumMicroBatchesCalculator
    from megatron.core.transformer.transformer_config import TransformerConfig

BUCKET_SIZE = 40_000_000
"""Gradients reduced at once, in elements. Megatron-Core's default grows with the number of ranks, and the distributed
optimizer's moments could then not be read by another number."""


@dataclass(frozen=True)
class Groups:
    """The ranks of a step and the device that each computes on."""

    rank: Rank
    """This process."""

    device: torch.device
    """CUDA device of the local rank, or the CPU."""

    @classmethod
    def start(cls, rank: Rank) -> "Groups":
        """Join the other ranks: NCCL on GPUs, gloo on CPUs; a process that nobody launched is a group of one."""
        on_gpu = torch.cuda.is_available()
        device = torch.device("cuda", rank.local_rank) if on_gpu else torch.device("cpu")
        if on_gpu and rank.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"trainer.devices asks for more ranks than this node has GPUs ({torch.cuda.device_count()}): "
                "set it to their number, or CUDA_VISIBLE_DEVICES= to train on the CPU"
            )
        if on_gpu:
            torch.cuda.set_device(device)
        alone = dist.TCPStore("127.0.0.1", 0, is_master=True) if rank.world_size == 1 else None
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=alone,  # others meet at MASTER_ADDR and MASTER_PORT
            rank=rank.rank,
            world_size=rank.world_size,
            timeout=timedelta(minutes=30),
        )
        parallel_state.initialize_model_parallel()
        return cls(rank, device)

    def stop(self) -> None:
        """Leave the group; all ranks call it."""
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()

    @property
    def on_cpu(self) -> dist.ProcessGroup:
        """The ranks as a gloo group: what is sent over it never touches the GPU's stream."""
        return parallel_state.get_data_parallel_group_gloo()

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(group=self.on_cpu)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank, on every rank; goes over the CPU."""
        values = [None] * self.rank.world_size
        dist.all_gather_object(values, value, group=self.on_cpu)
        return values

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, elementwise, in place and returned."""
        dist.all_reduce(values, group=parallel_state.get_data_parallel_group())
        return values

    def from_first(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, group=self.on_cpu, src=0)
        return box[0]

    def upload(self, batch: torch.Tensor) -> torch.Tensor:
        """A batch on this rank's device. The copy out of pinned memory goes on beside what is queued there already."""
        if self.device.type != "cuda":
            return batch
        with torch.cuda.stream(self._uploads):
            uploaded = batch.to(self.device, non_blocking=True)
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self._uploads)
        uploaded.record_stream(computing)
        return uploaded

    @cached_property
    def _uploads(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)

    def autocast(self, precision: str) -> torch.autocast:
        """Compute in bfloat16 for `bf16`; for `32` a context that changes nothing. Weights are float32 in both."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")

    def wrap(self, module: torch.nn.Module, *, use_distributed_optimizer: bool = False) -> DistributedDataParallel:
        """Megatron-Core's data-parallel wrapper: gradients in buckets, reduced while the backward still runs.

        Args:
            module: network without running statistics, since no buffers are kept equal between ranks.
            use_distributed_optimizer: as the optimizer is told.
        """
        assert not any(getattr(layer, "track_running_stats", False) for layer in module.modules())
        settings = DistributedDataParallelConfig(
            overlap_grad_reduce=True, use_distributed_optimizer=use_distributed_optimizer, bucket_size=BUCKET_SIZE
        )
        with cuda_calls_on(self.device):
            ddp = DistributedDataParallel(_no_transformer(), settings, module.to(self.device))
            ddp.broadcast_params()
        return ddp

    def finish_gradients(self, ddp: DistributedDataParallel) -> None:
        """Wait until the reduced gradients are there."""
        with cuda_calls_on(self.device):
            finalize_model_grads([ddp])

    def num_microbatches(self, data: DataConfig) -> int:
        """Forwards and backwards of each rank in a step."""
        return ConstantNumMicroBatchesCalculator(
            data.global_batch_size, data.micro_batch, self.rank.world_size, False, self.rank.rank
        ).get()


def _no_transformer() -> TransformerConfig:
    """The least that Megatron-Core accepts; nothing of it describes our network."""
    return TransformerConfig(num_layers=1, hidden_size=1, num_attention_heads=1)


@contextlib.contextmanager
def cuda_calls_on(device: torch.device) -> Iterator[None]:
    """Run Megatron-Core lines that name CUDA outright on the given device; on CUDA it does nothing.

    A stand-in: on the CPU, factory calls for a CUDA device make CPU tensors, `Tensor.cuda()` is the tensor itself, and
    `Tensor.type()` answers as on CUDA, since Megatron-Core compares its text.
    """
    if device.type == "cuda":
        yield
        return
    with (
        _CudaOnCpu(),
        mock.patch.object(torch.cuda, "current_device", return_value="cpu"),
        mock.patch.object(torch.cuda, "synchronize"),
        mock.patch.object(torch.cuda, "empty_cache"),
    ):
        yield


class _CudaOnCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.cuda:
            return args[0]
        return func(*args, **kwargs)


def _names_cuda(device: object) -> bool:
    return isinstance(device, int) or str(device).startswith("cuda")
