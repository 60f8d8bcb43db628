"""The SFTTrainer subclass: joined rows, loss per trained token, own checkpoints, evaluation."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTTrainer

from sft.distributed.signals import follow_parent
from sft.models.attention import confine_rows
from sft.models.experts import route_experts
from sft.models.model import adapter_config, answering, casts_left_to_autocast, lora_layers, preserved_random_state
from sft.stages import paths
from sft.stages.checkpoints import rotate
from sft.storage import json_files
from sft.training.arguments import reduce_in_float32, steps_to_schedule
from sft.training.batches import EpochBatches, EpochLoader, TrainingRows, blocks_of, join_rows, packs_of
from sft.training.callbacks import StageRhythm
from sft.training.loss import LossScale, finite_norm, require_finite, token_cross_entropy
from sft.training.progress import Metrics, Readable
from sft.training.results import STAGING, best_model_record, published_together

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import SFTConfig

    from sft.data.masked_loss.edge_mask import EdgeMask
    from sft.data.mixture import Mix
    from sft.evaluation.generation_evaluation import GenerationEvaluation
    from sft.stages.stage import Stage


class StagedTrainer(SFTTrainer):
    """SFTTrainer over rows that are already labelled.

    What differs: micro-batches are joined rows in an order that is a pure function of seed and epoch; the loss is the
    sum over trained tokens (times their weight) divided by the trained tokens of the whole global batch; only the
    positions that predict a trained token go through the output head; checkpoints appear complete or not at all;
    evaluation is exact over tokens and ranks; a non-finite gradient stops the run before the optimizer step.
    """

    model: torch.nn.Module
    train_dataset: TrainingRows
    processing_class: PreTrainedTokenizerBase

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        stage: Stage,
        args: SFTConfig,
        tokenizer: PreTrainedTokenizerBase,
        mix: Mix,
        edge_mask: EdgeMask | None = None,
        generation: GenerationEvaluation | None = None,
    ) -> None:
        self.stage, self.settings = stage, stage.settings
        self.generation = generation
        self.on_metrics: Callable[[dict[str, Any]], None] = lambda record: None
        self.step_rows: list[int] = []
        self.tokens_seen = self.tokens_before_step = 0  # by all ranks
        self.step_rate: float | None = None
        confine_rows(model, stage.settings)
        train, val = mix.train, mix.val
        super().__init__(
            model=model,
            args=args,
            data_collator=join_rows,
            train_dataset=train,
            eval_dataset=val if len(val) else None,
            processing_class=tokenizer,
            peft_config=adapter_config(model, stage.settings),
        )
        reduce_in_float32(self.accelerator)
        self.loss_scale = LossScale()
        self.unrouted = route_experts(self.model)
        self.lora_layers = lora_layers(self.model)
        packs = packs_of(train, self.settings)
        self.train_dataset = TrainingRows(train, packs=packs, edge_mask=edge_mask, mode=self.settings.masked_loss_mode)
        self.val_rows = TrainingRows(val)
        self.loss_is_scaled_for_ga = True  # type: ignore[assignment]  # declared as None, meant as a switch
        self.keeps_logits = "logits_to_keep" in inspect.signature(type(model).forward).parameters
        self.rhythm = StageRhythm(self)
        self.add_callback(self.rhythm)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(Metrics(self))
        self.add_callback(Readable(self))

    # Batches

    def get_train_dataloader(self) -> EpochLoader:
        """This rank's loader. It is not given to accelerate: it shards by rank itself, without repeating rows."""
        args = self.args
        rows = self.train_dataset
        lengths = rows.rows["length"] if self.settings.group_by_length and rows.packs is None else None
        batches = EpochBatches(
            len(rows),
            batch_size=args.per_device_train_batch_size,
            seed=args.seed,
            rank=args.process_index,
            ranks=args.world_size,
            lengths=lengths,
            group=args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps,
            blocks=blocks_of(rows.rows, self.settings, rows.packs),
        )
        return EpochLoader(
            rows,
            batch_sampler=batches,
            collate_fn=join_rows,
            num_workers=args.dataloader_num_workers,
            worker_init_fn=follow_parent,
            pin_memory=args.dataloader_pin_memory,
        )

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        """Trained tokens of the whole global batch (under a masked loss: their expected number)."""
        self.step_rows = [row for batch in batch_samples for row in batch["rows"] if row >= 0]
        self.step_rate = super()._get_learning_rate() if self.is_deepspeed_enabled else None
        tokens = sum(batch["input_ids"].shape[1] for batch in batch_samples if batch["rows"][0] >= 0)
        totals = torch.tensor([float(sum(batch["num_items"] for batch in batch_samples)), tokens], device=device)
        if self.args.world_size > 1:
            totals = self.accelerator.reduce(totals, "sum")
        self.tokens_before_step = self.tokens_seen
        self.tokens_seen += int(totals[1].item())
        return totals[0]

    def _get_learning_rate(self) -> float:
        """The rate the step was made with: DeepSpeed has moved its schedule on when the Trainer asks."""
        return super()._get_learning_rate() if self.step_rate is None else self.step_rate

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        known: Any = self.args.lr_scheduler_kwargs or {}
        self.args.lr_scheduler_kwargs = known | steps_to_schedule(self.args, num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    # Loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with casts_left_to_autocast(self.lora_layers if self.accelerator.native_amp else ()):
            return super().training_step(*args, **kwargs)

    def token_losses(self, model: torch.nn.Module, inputs: dict[str, Any], labels: torch.Tensor) -> torch.Tensor:
        """Negative log-likelihood of each trained token, shape (trained tokens,).

        On a GPU TRL's fused head does it in tiles. On the CPU that head scores masked positions too, so there the
        model itself is asked for the logits of the positions that count.
        """
        # Without this the model makes a cache, and transformers then no longer confines attention to each row.
        inputs = inputs | {"use_cache": False}
        if labels.device.type == "cuda" or not self.keeps_logits:
            outputs = model(**inputs, labels=labels, fused_lm_head=True)
            return -outputs.log_probs[outputs.label_mask]
        targets = (labels[0] != -100).nonzero()[:, 0]
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
        inputs = {name: value for name, value in inputs.items() if name not in ("rows", "num_items")}
        weights, labels = inputs.pop("loss_weights", None), inputs.pop("labels")
        losses = self.token_losses(model, inputs, labels).float()
        if weights is not None:
            losses = losses * weights[labels != -100]
        loss = losses.sum() / torch.as_tensor(num_items_in_batch).clamp(min=1e-6)
        return loss * self.accelerator.num_processes

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> float | None:
        """The gradient's norm; a non-finite one ends the run before the optimizer step, naming the rows, unless
        float16's loss scaler skips the step: then there is none."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        scaler = self.accelerator.scaler
        if scaler is not None and self.loss_scale.may_skip(norm, scaler.get_scale()):
            return None
        return finite_norm(norm, step=self.state.global_step + 1, rows=self.named_rows())

    def named_rows(self) -> Iterator[str]:
        """The rows of the step so that a person finds them: position, source and how the trained text begins."""
        for position in self.step_rows:
            row = self.train_dataset.rows[position]
            trained = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
            text = self.processing_class.decode(trained[:24], skip_special_tokens=True)
            source = Path(self.settings.sources[row["source"]].id).name
            yield f"{position} from {source} ({text[:60]!r})"

    # Evaluation

    def validation_loss(self) -> float:
        """Mean loss per trained token over all validation rows, the same whatever the number of ranks."""
        size, ranks, rank = self.args.per_device_eval_batch_size, self.args.world_size, self.args.process_index
        model = self.model_wrapped
        sums = torch.zeros(2, dtype=torch.float64)
        with answering(model):
            for start in range(0, len(self.val_rows), size * ranks):
                self.rhythm.raise_if_stopped()
                mine = range(start + rank * size, min(start + (rank + 1) * size, len(self.val_rows)))
                batch = self._prepare_inputs(join_rows([self.val_rows[row] for row in mine]))
                labels = batch.pop("labels")
                batch = {name: batch[name] for name in ("input_ids", "position_ids")}
                with self.compute_loss_context_manager():
                    losses = self.token_losses(model, batch, labels)
                sums += torch.tensor([losses.double().sum().item(), losses.numel()], dtype=torch.float64)
        if ranks > 1:
            sums = self.accelerator.reduce(sums.to(self.args.device), "sum").cpu()
        return (sums[0] / sums[1].clamp(min=1)).item()

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:
        """Loss and perplexity on the validation rows, then the generation evaluation; never shifts random state."""
        with preserved_random_state():
            loss = self.validation_loss()
            metrics = {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0))}
            if self.generation is not None:
                step, check = self.state.global_step, self.rhythm.raise_if_stopped
                metrics |= self.generation.run(self.model, self.accelerator, step=step, interrupted=check)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Keeps the best model whenever an evaluation improves on it, whatever the rhythm of saving."""
        improved = self.rhythm.improved(metrics)
        if improved:
            self.save_best(metrics)
        return improved

    # Saving and stopping

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer does; weights that are not finite are never written."""
        require_finite(self.model, self.state.global_step)
        # Generating leaves its padding in the tokenizer, from where it would go into tokenizer.json.
        backend = getattr(self.processing_class, "backend_tokenizer", None)
        if backend is not None:
            backend.no_padding()
            backend.no_truncation()
        super().save_model(output_dir, _internal_call=_internal_call)

    def _run_epoch(self, **keywords: Any) -> None:  # type: ignore[override]  # by keyword alone
        """A run resumed after its last step has nothing left to train; the Trainer would take one step more."""
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**keywords)

    def save_after_stop(self) -> None:
        """A checkpoint of the last finished step when a stop signal cut off the evaluation that follows it."""
        if self.state.global_step > 0 and not (self.stage.folder / f"checkpoint-{self.state.global_step}").exists():
            self._save_checkpoint(self.model_wrapped, None)

    def save_best(self, metrics: dict[str, float]) -> None:
        """best_model/: adapter, model configuration, tokenizer and best_model_info.json."""
        main = self.args.should_save
        with published_together(self.stage.folder / paths.BEST_MODEL, main=main) as folder:
            self.save_model(str(folder), _internal_call=True)
            if main:
                self.accelerator.unwrap_model(self.model).config.save_pretrained(folder)
                json_files.write_json(folder / paths.BEST_RECORD, best_model_record(self, metrics))

    def _get_output_dir(self, trial: Any) -> str:
        """Where the Trainer's own code puts `checkpoint-<step>`: aside."""
        return str(self.stage.folder / STAGING)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The Trainer's checkpoint, written aside, sealed with checksums and renamed; old ones removed afterwards."""
        name = f"checkpoint-{self.state.global_step}"
        main = self.args.should_save
        with published_together(self.stage.folder / name, main=main, sealed=True) as folder:
            super()._save_checkpoint(model, trial)
            self.rhythm.save(folder)
        if main:
            rotate(self.stage.folder, keep=self.settings.save_total_limit)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: the report of the stage says more."""
