"""What DeepSpeed's engine asks about clipping and ZeRO, which its own config leaves to SDP."""

from __future__ import annotations

import torch.distributed as dist

from sdp_llm.config import RunConfig


class ConfigAnswers:
    """Answers from the run config, before those of DeepSpeedEngine."""

    run: RunConfig

    def clip_fp32_gradients(self) -> None:
        """Nothing: the optimizer clips by the global norm before it steps."""

    def gradient_clipping(self) -> float:
        return self.run.gradient_clipping

    def zero_optimization_stage(self) -> int:
        return self.run.zero_optimization.stage

    def zero_overlap_comm(self) -> bool:
        return self.run.zero_optimization.overlap_comm

    def zero_reduce_bucket_size(self) -> int:
        return self.run.zero_optimization.reduce_bucket_size

    def zero_allgather_bucket_size(self) -> int:
        return self.run.zero_optimization.allgather_bucket_size

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank()
