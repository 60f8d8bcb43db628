"""The SFTTrainer subclass: joined rows, loss per trained token, own checkpoints, evaluation."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTTrainer

from sft.data.masked_loss.edge_mask import MASKED
from sft.distributed import ranks
from sft.distributed.launch import launched
from sft.distributed.ranks import say
from sft.errors import RunFailed
from sft.models.experts import route_experts
from sft.models.isolation import keep_rows_apart
from sft.models.last_layer import lighter_on_a_cpu
from sft.models.model import (
    RandomState,
    answering,
    casts_left_to_autocast,
    keep_adapters_exact,
    lora_layers,
    preserved_random_state,
)
from sft.models.targets import adapter_config
from sft.scoring.own import lower_is_better
from sft.settings.rules import warmup_remark
from sft.stages import paths
from sft.stages.checkpoints import metrics_mark, rotate
from sft.storage import json_files
from sft.training.arguments import reduce_in_float32, steps_to_schedule
from sft.training.batches import EpochLoader, TrainingRows, heaviest_step, join_rows, rows_of_tokens
from sft.training.callbacks import StageRhythm
from sft.training.loss import (
    LossScale,
    current_scale,
    finite_norm,
    leave_out_triton,
    require_finite,
    require_finite_evaluation,
    source_losses,
    token_cross_entropy,
)
from sft.training.movement import GradientRows, beginnings, require_moved
from sft.training.noise import RowNoise
from sft.training.passes import Passes, StepStart
from sft.training.progress import AtStart
from sft.training.results import STAGING, best_model_record, published_together

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import SFTConfig

    from sft.settings import Settings

# (model, accelerator, the trainer's state, what to call between batches) -> metrics beside the loss
Measure = Callable[[Any, Any, Any, Callable[[], None]], dict[str, float]]


class StagedTrainer(SFTTrainer):
    """SFTTrainer over rows that are already labelled.

    What differs: micro-batches are joined rows in an order that is a pure function of seed and epoch; the loss is the
    sum over trained tokens (times their weight) divided by the trained tokens of the whole global batch; only the
    positions that predict a trained token go through the output head; checkpoints appear complete or not at all;
    evaluation is exact over tokens and ranks; a non-finite gradient stops the run before the optimizer step.

    Args:
        rows, val_rows: what is trained on and what the loss is measured on, if anything.
        measure: what an evaluation measures beside the loss.
        pass_tokens: most tokens of a forward pass; 0 leaves micro-batches as they are. So they stay where rows go one
            by one anyway: joining gains nothing there, and the graphs of all rows are kept until the end.
    """

    model: torch.nn.Module
    train_dataset: TrainingRows
    processing_class: PreTrainedTokenizerBase

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        args: SFTConfig,
        settings: Settings,
        tokenizer: PreTrainedTokenizerBase,
        rows: TrainingRows,
        val_rows: TrainingRows | None = None,
        measure: Measure | None = None,
        pass_tokens: int = 0,
    ) -> None:
        self.settings, self.folder = settings, Path(str(args.output_dir))
        self.measure = measure
        self.step_rows: list[int] = []
        self.step_rate: float | None = None
        self.step_start: StepStart | None = None
        leave_out_triton()
        self.isolation = keep_rows_apart(model, settings)
        super().__init__(
            model=model,
            args=args,
            data_collator=join_rows,
            train_dataset=rows.rows,
            eval_dataset=(val_rows or rows).rows,  # the Trainer insists on some where answers alone are evaluated
            processing_class=tokenizer,
            peft_config=adapter_config(model, settings),
        )
        reduce_in_float32(self.accelerator)
        self.passes = Passes(pass_tokens if self.isolation.kept_apart else 0, device=self.args.device)
        if self.passes.tokens and self.passes.recovers and torch.cuda.is_available():
            self.add_callback(AtStart(lambda model: self.try_largest_pass()))
        self.loss_scale = LossScale()
        if not self.is_deepspeed_enabled:  # it casts what it trains and keeps float32 copies itself
            keep_adapters_exact(self.model)
        self.unrouted, self.lora_layers = route_experts(self.model), lora_layers(self.model)
        self.last_layer = lighter_on_a_cpu(self.model, checkpointing=bool(self.args.gradient_checkpointing))
        self.train_dataset, self.val_rows = rows, val_rows
        self.loss_is_scaled_for_ga = True  # type: ignore[assignment]  # declared as None, meant as a switch
        self.model_accepts_loss_kwargs = True  # what transformers 5.17 goes by, which knows no such switch
        self.keeps_logits = "logits_to_keep" in inspect.signature(type(model).forward).parameters
        alpha = settings.neftune_noise_alpha
        self.noise = RowNoise(model.get_input_embeddings(), alpha, settings.seed) if alpha else None
        own_lower = lower_is_better(settings.gen_eval)
        self.rhythm = StageRhythm(settings.metric_for_best, settings.early_stopping_patience, own_lower)
        self.gradient_rows = GradientRows()
        self.add_callback(self.rhythm)
        self.add_callback(self.gradient_rows)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)

    # Batches

    def get_train_dataloader(self) -> EpochLoader:
        """This rank's loader. It is not given to accelerate: it shards by rank itself, without repeating rows."""
        return EpochLoader.of_rank(self.train_dataset, self.settings, self.args)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> Any:
        """The micro-batches of a step, its rows divided anew where passes have a size of their own."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        return self.passes.regroup(batches), items

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        """Trained tokens of the whole global batch (under a masked loss: their expected number)."""
        self.step_start = StepStart(RandomState.now(), self._tr_loss.clone(), self.state.num_input_tokens_seen)
        self.step_rows = [row for batch in batch_samples for row in batch["rows"] if row >= 0]
        self.step_rate = super()._get_learning_rate() if self.is_deepspeed_enabled else None
        tokens = sum(batch["input_ids"].shape[1] for batch in batch_samples if batch["rows"][0] >= 0)
        totals = torch.tensor([float(sum(batch["num_items"] for batch in batch_samples)), tokens], device=device)
        if self.args.world_size > 1:
            totals = self.accelerator.reduce(totals, "sum")
        self.state.num_input_tokens_seen += int(totals[1].item())
        return totals[0]

    def _get_learning_rate(self) -> float:
        """The rate the step was made with: DeepSpeed has moved its schedule on when the Trainer asks."""
        return super()._get_learning_rate() if self.step_rate is None else self.step_rate

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if remark := warmup_remark(self.settings, num_training_steps):
            say(remark)
        known: Any = self.args.lr_scheduler_kwargs or {}
        self.args.lr_scheduler_kwargs = known | steps_to_schedule(self.args, num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    # Loss

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        with casts_left_to_autocast(self.lora_layers if self.accelerator.native_amp else ()):
            if "step_rows" not in inputs:
                return super().training_step(model, inputs, num_items_in_batch)
            if inputs["step_rows"] is None:  # the last micro-batch has all the rows
                return torch.zeros((), device=self.args.device)
            how = partial(self.one_pass, model, num_items_in_batch)
            return self.passes.run(inputs["step_rows"], how, undo=self.undo_passes, step=self.state.global_step + 1)

    def one_pass(self, model: Any, items: torch.Tensor, rows: list[dict[str, Any]], last: bool) -> torch.Tensor:
        """The loss of some of a step's rows, their gradients added; ranks exchange them after the `last`, if at all."""
        state = self.accelerator.gradient_state
        state.sync_gradients = last
        waits = last or self.is_deepspeed_enabled or state.plugin_kwargs.get("sync_each_batch", False)
        with nullcontext() if waits else self.accelerator.no_sync(model):
            loss = super().training_step(model, join_rows([rows]), items)
        if not last:
            self.rhythm.on_substep_end(self.args, self.state, self.control)
        return loss

    def undo_passes(self) -> None:
        """Gradients and random state as before the first pass of the step."""
        self.model_wrapped.zero_grad()
        if self.step_start:
            self.step_start.random.restore()

    def try_largest_pass(self) -> None:
        """The largest pass of the run forward and backward before the first step, nothing of it kept: where memory
        does not suffice all passes get smaller now, not in the middle of the run."""
        rows, step = self.train_dataset, heaviest_step(self.train_dataset.rows, self.settings)
        one_pass = partial(self.one_pass, self.model_wrapped, torch.ones((), device=self.args.device))
        with preserved_random_state(), casts_left_to_autocast(self.lora_layers if self.accelerator.native_amp else ()):
            self.passes.run([rows.row(0, row) for row in step], one_pass, undo=self.undo_passes, step=0)
        self.undo_passes()

    def token_losses(self, model: torch.nn.Module, inputs: dict[str, Any], labels: torch.Tensor) -> torch.Tensor:
        """Negative log-likelihood of each trained token, shape (trained tokens,); of joined rows or, where the model
        would mix them, of row after row."""
        passes = self.isolation.passes(inputs | {"labels": labels})
        if not self.isolation.kept_apart and launched().splits_weights:
            # All ranks call the model equally often, or those that wait for its weights wait for ever.
            most = ranks.largest(len(passes), self.args.device)
            passes = self.isolation.passes(inputs | {"labels": labels}, at_least=most)
        losses = [self.pass_losses(model, **each) for each in passes]
        return losses[0] if len(losses) == 1 else torch.cat(losses)

    def pass_losses(self, model: torch.nn.Module, *, labels: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """`token_losses` of one forward pass.

        On a GPU in tiles by TRL's fused head, which on a CPU scores masked positions too: there by the model itself.
        """
        # Without this the model makes a cache, and transformers then no longer confines attention to each row.
        inputs = inputs | {"use_cache": False}
        if labels.device.type == "cuda" or not self.keeps_logits:
            outputs = model(**inputs, labels=labels, fused_lm_head=True)
            return -outputs.log_probs[outputs.label_mask]
        targets = (labels[0] != MASKED).nonzero()[:, 0]
        with self.last_layer.at(targets - 1, labels.shape[1]):
            logits = model(**inputs, logits_to_keep=targets - 1).logits.squeeze(0)
        return token_cross_entropy(logits, labels[0, targets])

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Sum of token losses over the trained tokens of the global batch (torchtitan's normalisation)."""
        if self.noise:
            self.noise.expect(list(zip(inputs["row_lengths"], inputs["epochs"], inputs["rows"], strict=True)))
        inputs = {name: value for name, value in inputs.items() if name not in ("rows", "epochs", "num_items")}
        weights, labels = inputs.pop("loss_weights", None), inputs.pop("labels")
        losses = self.token_losses(model, inputs, labels).float()
        if weights is not None:
            losses = losses * weights[labels != MASKED]
        loss = losses.sum() / torch.as_tensor(num_items_in_batch).clamp(min=1e-6)
        return loss * self.accelerator.num_processes

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> float | None:
        """The gradient's norm; a non-finite one ends the run before the optimizer step, naming the rows, unless
        float16's loss scaler skips the step: then there is none."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        scale = current_scale(self.accelerator, model)
        if scale is not None and self.loss_scale.may_skip(norm, scale):
            self.gradient_rows.left_out()
            return None
        named = (self.train_dataset.named(row, self.processing_class) for row in self.step_rows)
        return finite_norm(norm, step=self.state.global_step + 1, rows=named)

    # Evaluation

    def validation_loss(self, rows: TrainingRows) -> dict[str, float]:
        """`eval_loss`, the mean loss per trained token over all the rows, and, where they are of several sources,
        `eval_loss/<source>`; the same whatever the number of ranks."""
        size, together, rank = self.args.per_device_eval_batch_size, self.args.world_size, self.args.process_index
        model = self.model_wrapped
        sums = torch.zeros((len(rows), 2), dtype=torch.float64)
        with answering(model):
            for start in range(0, len(rows), size * together):
                self.rhythm.raise_if_stopped()
                mine = range(start + rank * size, min(start + (rank + 1) * size, len(rows)))
                batch = self._prepare_inputs(join_rows([rows[row] for row in mine]))
                labels = batch.pop("labels")
                own = rows_of_tokens(batch, labels)
                batch = {name: batch[name] for name in ("input_ids", "position_ids", "row_lengths", "row_ends")}
                with self.compute_loss_context_manager():
                    losses = self.token_losses(model, batch, labels).double().cpu()
                sums.index_add_(0, own, torch.stack([losses, torch.ones_like(losses)], dim=1))
        if together > 1:
            sums = self.accelerator.reduce(sums.to(self.args.device), "sum").cpu()
        if self.settings.variant and self.args.should_save:  # by which variants are compared row by row
            json_files.write_json(
                self.folder / paths.ROW_LOSSES, dict(zip(("losses", "tokens"), sums.T.tolist(), strict=True))
            )
        return source_losses(rows.sums_of_sources(sums), rows.names)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:
        """Loss and perplexity on the validation rows, then what `measure` finds; never shifts random state. Keeps the
        best model whenever an evaluation improves on it, whatever the rhythm of saving."""
        metrics: dict[str, float] = {}
        with preserved_random_state():
            if self.val_rows:
                metrics |= self.validation_loss(self.val_rows)
                require_finite_evaluation(metrics["eval_loss"], self.state.global_step)
                metrics["eval_perplexity"] = math.exp(min(metrics["eval_loss"], 700.0))
            if self.measure:
                metrics |= self.measure(self.model, self.accelerator, self.state, self.rhythm.raise_if_stopped)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.rhythm.improved:
            self.save_best(metrics)
        return metrics

    # Saving and stopping

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer does; weights that are not finite, or parts that did not move, are never kept."""
        require_finite(self.model, self.state.global_step)
        # Generating leaves its padding in the tokenizer, from where it would go into tokenizer.json.
        backend = getattr(self.processing_class, "backend_tokenizer", None)
        if backend is not None:
            backend.no_padding()
            backend.no_truncation()
        super().save_model(output_dir, _internal_call=_internal_call)
        self.require_moved(Path(str(output_dir or self.args.output_dir)))

    def require_moved(self, folder: Path) -> None:
        """The main process looks at what was written; all ranks hear of a failure."""
        failure = ""
        if self.args.should_save:
            try:
                rows, step = self.gradient_rows.rows, self.state.global_step
                began = beginnings(self.model)
                require_moved(folder, rows, step=step, ranks=self.args.world_size, began=began)
            except RunFailed as error:
                failure = str(error)
        if ranks.any_rank(bool(failure)):
            raise RunFailed(failure or "The main process found weights that did not move; its message names them.")

    def train(self, resume_from_checkpoint: str | None = None, **keywords: Any) -> Any:  # type: ignore[override]
        """As the Trainer does; a resumed run takes up what the checkpoint knows and the Trainer does not."""
        if resume_from_checkpoint:
            checkpoint = Path(resume_from_checkpoint)
            self.rhythm.restore(checkpoint)
            self.add_callback(AtStart(lambda model: self.take_up(checkpoint)))
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **keywords)

    def take_up(self, checkpoint: Path) -> None:
        """The loss since the last log, and an evaluation that was cut off."""
        record = json_files.read_json(checkpoint / paths.RHYTHM)
        losses, here = record["loss_since_logged"], self.args.process_index
        self._tr_loss.fill_(losses[here] if len(losses) == self.args.world_size else sum(losses) / len(losses))
        self._globalstep_last_logged = record["last_logged_step"]
        if self.rhythm.evaluation_due:
            self.evaluate()

    def _run_epoch(self, **keywords: Any) -> None:  # type: ignore[override]  # by keyword alone
        """A run resumed after its last step has nothing left to train; the Trainer would take one step more."""
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**keywords)

    def save_after_stop(self) -> None:
        """A checkpoint of the last finished step when a stop signal cut off the evaluation that follows it, or the
        step after it: of that one nothing stays but its gradients, which nobody saves."""
        if self.rhythm.step_given_up and self.step_start:
            self.step_start.random.restore()
            self._tr_loss.copy_(self.step_start.loss)
            self.state.num_input_tokens_seen = self.step_start.tokens
        if self.state.global_step > 0 and not (self.folder / paths.checkpoint_name(self.state.global_step)).exists():
            self._save_checkpoint(self.model_wrapped, None)

    def save_best(self, metrics: dict[str, float]) -> None:
        """best_model/: adapter, model configuration, tokenizer and best_model_info.json."""
        main = self.args.should_save
        with published_together(self.folder / paths.BEST_MODEL, main=main) as folder:
            self.save_model(str(folder), _internal_call=True)
            if main:
                self.accelerator.unwrap_model(self.model).config.save_pretrained(folder)
                record = best_model_record(
                    metrics, self.settings.metric_for_best, metrics[self.rhythm.metric], self.state.global_step
                ) | {"greater_is_better": self.rhythm.greater}
                json_files.write_json(folder / paths.BEST_RECORD, record)

    def _get_output_dir(self, trial: Any) -> str:
        """Where the Trainer's own code puts `checkpoint-<step>`: aside."""
        return str(self.folder / STAGING)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The Trainer's checkpoint, written aside, sealed with checksums and renamed; old ones removed afterwards."""
        name = paths.checkpoint_name(self.state.global_step)
        main = self.args.should_save
        with published_together(self.folder / name, main=main, sealed=True) as folder:
            super()._save_checkpoint(model, trial)
            losses = self.accelerator.gather(self._tr_loss.detach().reshape(1).to(self.args.device)).tolist()
            logged = {"loss_since_logged": losses, "last_logged_step": self._globalstep_last_logged}
            logged |= {"passes": self.passes.record()}
            if main:
                mark = metrics_mark(self.folder / paths.METRICS)
                json_files.write_json(folder / paths.RHYTHM, self.rhythm.record() | logged | mark)
        if main:
            rotate(self.folder, keep=self.settings.save_total_limit)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: the report of the stage says more."""
