"""The DeepSpeed engine of Subnetwork Data Parallelism.

It extends DeepSpeedEngine the way DeepSpeed's own PipelineEngine does. DeepSpeed gets a config
with ZeRO and clipping off, because ``sharding/`` does both inside the owner sets, and a model
whose parameters have their final type and place, so that its own cast, move and broadcast find
nothing to do. Only what SDP changes is overridden.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from sdp_llm.agree import agree
from sdp_llm.answers import ConfigAnswers
from sdp_llm.checkpoint.background import BackgroundSave, Snapshot
from sdp_llm.checkpoint.export import export_pretrained
from sdp_llm.checkpoint.load import (
    latest_tag,
    load_tensors,
    open_checkpoint,
    restore_random,
)
from sdp_llm.checkpoint.save import CheckpointWriting, own_ranges
from sdp_llm.checkpoint.training_state import (
    COUNTERS,
    adopt_scheduler,
    check_scheduler,
    training_state,
)
from sdp_llm.config import RunConfig, deepspeed_dict
from sdp_llm.distributed import init_distributed
from sdp_llm.errors import ConfigError
from sdp_llm.evaluation import Evaluation, evaluate
from sdp_llm.loss import NextTokenLoss, summed_loss
from sdp_llm.optim import adopt_options, check_made, check_options, wrong_parameters_explained
from sdp_llm.plan import Plan
from sdp_llm.sharding.from_config import Source, agreed_schedule, shard
from sdp_llm.sharding.materialize import ShardedModel
from sdp_llm.sharding.optimizer import ShardedOptimizer, parameter_groups
from sdp_llm.sharding.probe import GradientProbe
from sdp_llm.sharding.rebuild import rebuild
from sdp_llm.sharding.reducer import GradientReducer
from sdp_llm.unsupported import refuse_on_module, refuse_unsupported, unsupported


@refuse_unsupported
class SDPEngine(ConfigAnswers, DeepSpeedEngine):
    """Trains this rank's subnetwork; ``engine(batch)``, ``engine.backward(loss)``,
    ``engine.step()`` as with DeepSpeed. Built by :func:`sdp_llm.initialize`."""

    sharded: ShardedModel
    param_names: dict[Tensor, str]

    def __init__(
        self,
        source: Source,
        run: RunConfig,
        *,
        optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None,
        lr_scheduler: Callable[[torch.optim.Optimizer], Any] | None,
        training_data: Any,
        collate_fn: Any,
        total_num_steps: int | None,
    ) -> None:
        self.run = run
        self._snapshot = Snapshot()
        self._saving: BackgroundSave | None = None
        self._timeout = timedelta(minutes=run.training.timeout_minutes)
        init_distributed(self._timeout)
        generated = deepspeed_dict(run, dist.get_world_size(), total_num_steps)
        if optimizer is None and run.optimizer is None:
            raise ConfigError(
                'optimizer: missing; add {"type": "AdamW", "params": {"lr": …}} to the config'
            )
        accelerator = get_accelerator()
        device = torch.device(accelerator.device_name(int(os.environ["LOCAL_RANK"])))
        self.schedule = agreed_schedule(source, run, total_num_steps)
        self.sharded = shard(source, run, self.schedule, device, self._timeout)
        self._reducer = self._new_reducer()
        super().__init__(
            args=None,
            model=self.sharded.subnetwork.model,
            # DeepSpeed looks whether there is one; _configure_optimizer makes it.
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            training_data=training_data,
            collate_fn=collate_fn,
            config=generated,
            config_class=DeepSpeedConfig(generated),
        )
        refuse_on_module(self.module)

    @property
    def plan(self) -> Plan:
        """Which ranks own which blocks."""
        return self.sharded.subnetwork.plan

    def change_plan(self, plan: Plan, masking: str) -> None:
        """Go over to another plan and masking, between optimizer steps. Collective over the world.

        The fp32 masters and the optimizer state travel from owner to owner, bit for bit; the
        optimizer and the learning-rate scheduler stay the same objects. The run's own schedule
        calls this; a plan that is not of the schedule stays until its next change, and what owner
        sets it has of its own get process groups.

        :raises ConfigError: on every rank, and nothing has changed, when the plan does not fit the
            run or differs between ranks, or when gradients are accumulated.
        """
        self.wait_for_weights()
        self.sharded, changed = rebuild(
            self.sharded,
            self.basic_optimizer,
            plan,
            masking,
            decay_all=self.run.training.decay_all,
            timeout=self._timeout,
        )
        self._reducer.close()
        self._reducer = self._new_reducer()
        # DeepSpeed's own note of what the model's parameters are called.
        self.param_names = {p: name for name, p in self.module.named_parameters()}
        self.optimizer.adopt(self.sharded)
        self.optimizer.distribute_weights(changed)

    # -- what SDP changes ---------------------------------------------------------------------

    def _broadcast_model(self) -> None:
        """Nothing: owners start equal, and ranks have different parameters."""

    def _configure_optimizer(self, client_optimizer: Any, model_parameters: Any) -> None:
        groups = parameter_groups(self.sharded.owned, self.run.training.decay_all)
        if client_optimizer is None:
            assert self.run.optimizer is not None
            with wrong_parameters_explained("optimizer", self.run.optimizer.type):
                self.basic_optimizer = self._configure_basic_optimizer(groups)
        else:
            # A copy: torch makes the groups its own.
            given = [list(group["params"]) for group in groups]
            self.basic_optimizer = client_optimizer(groups)
            phases = self.schedule.phases
            changes = len(phases) > 1 or any(phase.rotate_every for phase in phases)
            agree(lambda: check_made(self.basic_optimizer, given, must_keep_groups=changes))
        self.optimizer = ShardedOptimizer(
            self.sharded,
            self.basic_optimizer,
            max_norm=self.gradient_clipping(),
            overlap=self.run.zero_optimization.overlap_comm,
        )

    def _new_reducer(self) -> GradientReducer:
        return GradientReducer(
            self.sharded.owned,
            self.sharded.subnetwork.model,
            self.sharded.communicator,
            stage=self.sharded.stage,
            overlap=self.run.zero_optimization.overlap_comm,
            under_way=self.run.sdp.reductions_under_way,
        )

    def _scheduler_from_config(self, optimizer: Any) -> Any:
        with wrong_parameters_explained("scheduler", self.scheduler_name()):
            # torch's schedulers take nothing but a torch optimizer.
            return super()._scheduler_from_config(self.basic_optimizer)

    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Any:
        """DeepSpeed's, with each unit's gradient averaged over its owners meanwhile."""
        if not scale_wrt_gas:
            # Where the loss is what forward returned, DeepSpeed's hook on it would divide it by the
            # accumulation steps before another one tells it not to.
            loss = loss * 1
        self.optimizer.watch(loss)
        is_last = self.is_gradient_accumulation_boundary()
        must_reduce = self.sharded.stage == 2 or is_last
        self._reducer.begin(reduce=must_reduce and not self.inside_no_sync_ctxt)
        try:
            scaled = super().backward(loss, retain_graph=retain_graph, scale_wrt_gas=scale_wrt_gas)
        except BaseException:
            self._reducer.stop()
            raise
        if self.inside_no_sync_ctxt:
            self._reducer.finish()
        return scaled

    def allreduce_gradients(self, bucket_size: int = 0) -> None:
        """End the reductions of the backward pass; ``bucket_size`` is the config's."""
        self._reducer.finish()

    def probe_gradients(self, probe: GradientProbe | None) -> None:
        """Show what is reduced up to the next change of plan to ``probe``; None: to nothing."""
        self._reducer.probe = probe

    def step(self, lr_kwargs: Any = None) -> None:
        """DeepSpeed's; then, where the schedule says so, the plan of the steps to come."""
        before = self.global_steps
        super().step(lr_kwargs)
        if self.global_steps > before and self.schedule.changes_at(self.global_steps):
            self.change_plan(*self.schedule.at(self.global_steps))

    def zero_grad(self) -> None:
        """Zero the accumulated gradients, which are the units', not the parameters'.

        Also those of a backward pass that failed, on all ranks alike.
        """
        self._reducer.abandon()
        self.optimizer.zero_grad()

    def wait_for_weights(self) -> None:
        """Return when the weights of the last step are there.

        The forward pass and this engine's methods wait by themselves. Code that reads parameters of
        the model between steps needs this, and code that does so with collectives of its own: on
        NCCL those must not run beside the gathers of weights. Not collective.
        """
        self.sharded.wait()

    def destroy(self) -> None:
        """DeepSpeed's, when nothing is under way any more."""
        self.wait_for_weights()
        super().destroy()

    def get_data_types(self) -> tuple[torch.dtype, torch.dtype]:
        """The types of the weights and of the accumulated gradients."""
        return self.sharded.dtype, torch.float32

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """DeepSpeed's; the next micro-batch is the first of a step, and gradients are zero."""
        super().set_train_batch_size(train_batch_size)
        self.zero_grad()
        self._restart_accumulation()

    def _restart_accumulation(self) -> None:
        self.micro_steps = self.global_steps * self.gradient_accumulation_steps()

    # -- the whole model ----------------------------------------------------------------------

    def evaluate(
        self,
        samples: Tensor,
        micro_batch: int,
        loss: NextTokenLoss = summed_loss,
        must_stop: Callable[[], bool] | None = None,
    ) -> Evaluation:
        """The whole model's loss; see :func:`sdp_llm.evaluation.evaluate`. Collective."""
        self.wait_for_weights()
        return evaluate(self.sharded, samples, micro_batch, loss, must_stop)

    def save_pretrained(self, save_directory: str | Path, tokenizer: str | None = None) -> None:
        """Write the whole model as a HuggingFace checkpoint. Collective over the world.

        It replaces one that is there; other files of the folder stay.

        :param tokenizer: a folder whose tokenizer files are copied.
        :raises ConfigError: on every rank, when one cannot write, or ``tokenizer`` has none.
        """
        self.wait_for_weights()
        export_pretrained(self.sharded, save_directory, tokenizer=tokenizer)

    # -- checkpoints --------------------------------------------------------------------------

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Write the training state of all ranks to ``save_dir/tag``. Collective over the world.

        :param client_state: handed back by :meth:`load_checkpoint`; JSON only.
        :param exclude_frozen_parameters: without effect: a frozen block is saved by its owners.
        :raises ConfigError: on every rank, when one cannot write, a tag or ``client_state`` is
            wrong, or a save in the background is not finished.
        """
        writing = self._checkpoint(Path(save_dir), tag, client_state, save_latest)
        writing.begin()
        tensors = list(own_ranges(self.sharded, self.basic_optimizer))
        writing.finish(lambda: writing.write(tensors))
        return True

    def save_checkpoint_in_background(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
    ) -> BackgroundSave:
        """Copy the training state to host memory and start to write it. Collective.

        Call ``finish()`` on all ranks together before the next one; only then the checkpoint is
        there. :meth:`save_checkpoint` says the rest.
        """
        writing = self._checkpoint(Path(save_dir), tag, client_state, True)
        writing.begin()
        tensors = own_ranges(self.sharded, self.basic_optimizer)
        snapshot = self._snapshot.take(tensors)
        self._saving = BackgroundSave(writing, snapshot, self.wait_for_weights)
        return self._saving

    def _checkpoint(
        self,
        folder: Path,
        tag: str | None,
        client_state: Mapping[str, Any] | None,
        save_latest: bool,
    ) -> CheckpointWriting:
        if self._saving is not None and not self._saving.is_finished:
            raise ConfigError(
                "save_checkpoint: the one in the background is not finished; call its finish() on "
                "all ranks before"
            )
        self.wait_for_weights()
        subnetwork = self.sharded.subnetwork
        return CheckpointWriting(
            folder,
            f"global_step{self.global_steps}" if tag is None else str(tag),
            training_state(self, self.run, subnetwork, client_state),
            rank=subnetwork.rank,
            shapes={spec.name: spec.shape for spec in subnetwork.layout.parameters},
            save_latest=save_latest,
        )

    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> tuple[str, dict[str, Any]]:
        """Read what :meth:`save_checkpoint` wrote, under any number of ranks and any plan.

        The engine goes over to its schedule's plan of the step that the checkpoint is of.

        :returns: the checkpoint's folder and the ``client_state``.
        :raises ConfigError: when there is none, a file is damaged, or it is another model's,
            optimizer's or scheduler's, which is found before anything is overwritten.
        """
        if custom_load_fn is not None or not load_module_strict:
            unsupported("load_checkpoint(custom_load_fn=…, load_module_strict=False)", "leave out")
        self.wait_for_weights()
        if tag is None:  # one rank looks: on a shared disk another may see an older one
            tag = agree(lambda: latest_tag(Path(load_dir)) if dist.get_rank() == 0 else None)[0]
        folder = Path(load_dir) / str(tag)
        optimizer = self.basic_optimizer if load_optimizer_states else None
        scheduler = self.lr_scheduler if load_lr_scheduler_states else None
        if load_module_only:
            optimizer = scheduler = None
        with open_checkpoint(self.sharded.subnetwork, folder) as reader:
            state = reader.state

            def check() -> None:
                if optimizer is not None:
                    check_options(optimizer, state["param_groups"], folder)
                if scheduler is not None:
                    check_scheduler(scheduler, state, folder)

            agree(check)  # all of it before anything is overwritten
            self.zero_grad()
            due = self.schedule.at(state["counters"]["global_steps"])
            if not load_module_only and due != (self.plan, self.sharded.subnetwork.masking):
                self.change_plan(*due)
                self.wait_for_weights()  # what is read goes into what is being gathered
            agree(lambda: load_tensors(self.sharded, optimizer, reader))
            if not load_module_only:
                agree(lambda: restore_random(self.sharded, reader))
                for name in COUNTERS:
                    setattr(self, name, state["counters"][name])
        self.optimizer.distribute_weights()
        self.wait_for_weights()  # the caller may have collectives of its own
        # Its gradients are gone; and another number of ranks may cut a batch into other pieces.
        self._restart_accumulation()
        if optimizer is not None:
            adopt_options(optimizer, state["param_groups"], is_scheduled_on=scheduler is not None)
        if scheduler is not None:
            adopt_scheduler(scheduler, state)
        return str(folder), state["client_state"]
