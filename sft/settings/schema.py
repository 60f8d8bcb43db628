"""Every setting of a stage: name, type, default, one sentence. Reads, checks and remembers where each came from.

`SFT_LORA_R` in `stage1.env` is `settings.lora_r` in the code. No other module reads the process environment.
"""

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from sft.errors import REPOSITORY, STARTED_AS, Problems, hide_secrets
from sft.scoring.metrics import EXTRACTION_FIELDS, FORGETTING_MARGIN
from sft.scoring.payload import DEFAULT_MARKERS
from sft.settings import values, variants
from sft.settings.env_file import Location, gather, name_of
from sft.settings.mistakes import validate
from sft.settings.values import (
    AtLeastOne,
    AutoOrCount,
    IdOrMix,
    Mix,
    Names,
    NotNegative,
    OffOrCount,
    Optimizer,
    PathText,
    Positive,
    Scheduler,
    Share,
    Source,
    Switch,
    TokenBudget,
)


def setting(default: Any, sentence: str) -> Any:
    return Field(default, description=sentence)


class Settings(BaseModel):
    """What one stage is trained with. Frozen; `origins` says where each value came from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: int
    env_dir: Path
    origins: dict[str, str] = Field(default_factory=dict, repr=False)
    passthrough: dict[str, str] = Field(default_factory=dict, repr=False)
    overrides: tuple[str, ...] = Field(default=(), repr=False)
    tried: tuple[str, ...] = Field(default=(), repr=False)

    base_model: PathText = setting(..., "Base model the ladder starts from: a hub id or a model folder.")
    model_revision: str | None = setting(None, "Branch, tag or commit of the base model on the hub.")
    trust_remote_code: Switch = setting(False, "Run Python code that comes with the model.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = setting(
        "auto", "Number format of the computation; auto: bfloat16 on a GPU that has it, else float16; float32 on a CPU."
    )
    attn: Annotated[str, AfterValidator(values.check_attention)] = setting(
        "auto", "Attention implementation as transformers names it; auto takes the fastest that keeps rows apart."
    )
    load_in_4bit: Switch = setting(False, "Quantise the frozen weights to 4 bits (QLoRA).")
    load_in_8bit: Switch = setting(False, "Quantise the frozen weights to 8 bits.")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = setting("nf4", "Number format of 4-bit weights.")
    bnb_4bit_use_double_quant: Switch = setting(True, "Quantise the constants of 4-bit weights as well.")
    chat_template: Annotated[str, AfterValidator(values.check_chat_template)] | None = setting(
        None, f"Chat template instead of the tokenizer's: {', '.join(values.CHAT_TEMPLATES)} or a .jinja file."
    )

    template_options: Annotated[dict[str, Any], BeforeValidator(values.parse_template_options)] = setting(
        {}, 'Options handed to the chat template, as a JSON object: {"enable_thinking": false}.'
    )

    use_lora: Switch = setting(True, "Train an adapter; 0 trains all weights.")
    lora_r: AtLeastOne = setting(16, "Rank of the adapter's matrices.")
    lora_alpha: AtLeastOne = setting(32, "Scale of the adapter: its output is multiplied by alpha / r.")
    lora_dropout: Share = setting(0.0, "Share of the adapter's inputs dropped at random in training.")
    lora_target_modules: Names = setting(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "Layers that get an adapter: a comma list of name endings, or all-linear.",
    )
    lora_rslora: Switch = setting(False, "Scale the adapter by alpha / sqrt(r) (rank-stabilised LoRA).")
    lora_dora: Switch = setting(False, "Train magnitude and direction apart (DoRA).")
    lora_modules_to_save: Names = setting(
        (),
        "Modules trained in full and kept with the adapter (lm_head,embed_tokens): a comma list of name endings; a tied"
        " head and embedding are one matrix, whichever is named.",
    )

    out_lora_dir: Annotated[Path, BeforeValidator(values.expand), AfterValidator(values.check_folder_name)] = setting(
        ..., "Where results go: stage N writes to this path followed by _stageN."
    )
    merge_dtype: Literal["bfloat16", "float16", "float32"] | None = setting(
        None, "Number format of merged weights; unset keeps that of the base model."
    )
    strict: Switch = setting(False, "Make a missing adapter or data set an error instead of a warning.")

    dataset_id: PathText | None = setting(None, "The data set of a stage that has only one: a hub id, folder or file.")
    dataset_split: str = setting("train", "Split of SFT_DATASET_ID.")
    dataset_mix: Mix = setting((), "Data sets mixed by weight, as a JSON list of sources; wins over SFT_DATASET_ID.")
    dataset_mix_total_size: OffOrCount = setting(-1, "Rows of the mix; -1 is as many as the largest source has.")
    eval_dataset: IdOrMix = setting(
        (), "Validation rows: an id, a path or a JSON list of sources; unset splits off SFT_VAL_RATIO."
    )
    val_ratio: Share = setting(0.05, "Share of every source's rows set apart for validation; 0 is no validation.")
    max_seq_len: Annotated[int, Field(ge=2)] = setting(2048, "Longest row in tokens, prompt and answer together.")
    overlong: Literal["drop", "truncate", "error"] = setting(
        "drop", "What happens to a row longer than SFT_MAX_SEQ_LEN."
    )
    packing: Switch = setting(
        False, "Pack rows into sequences of SFT_MAX_SEQ_LEN; 0 joins the rows of a micro-batch only."
    )
    train_on_prompt: Switch = setting(
        False, "Train on the prompt's tokens too, not on the answers alone; an answer marked as context never is."
    )
    train_turns: Literal["all", "last"] = setting(
        "all", "Which of the assistant's turns are trained; one marked train: false or weight: 0 never is."
    )
    shuffle: Literal["mix", "sources", "none"] = setting(
        "mix",
        "Order of the rows: all mixed, source after source with each mixed in itself, or as the files have them.",
    )
    replay: Share = setting(
        0.0, "Share of the training rows that come from those of the earlier stages, the same from each of them."
    )
    deduplicate: Switch = setting(False, "Keep only the first of rows that are equal.")
    num_proc: AutoOrCount = setting(None, "Processes that prepare the rows; unset chooses by cores and rows.")
    use_upsampling: Switch = setting(False, "Repeat training rows as SFT_UPSAMPLE_RULES says.")
    upsample_rules: Annotated[dict[str, NotNegative], BeforeValidator(values.parse_rules)] = setting(
        {}, 'Multipliers by task key, as a JSON object: {"text_to_toml": 3.0, "pack:hard": 2}.'
    )
    mask_cot: Switch = setting(
        False,
        "Train only on what follows the first output marker of the final answer; reasoning_content, thinking and"
        " <think> blocks are context, and markers count behind them.",
    )
    output_markers: Names = setting(
        DEFAULT_MARKERS,
        "Texts that end the reasoning and start the payload, as a comma list.",
    )
    output_learn_mode: Literal["after_marker", "from_marker"] = setting(
        "after_marker", "Whether the output marker itself is trained on (from_marker) or not."
    )

    masked_loss: Literal["none", "inverse_frequency"] = setting(
        "none", "Leave frequent units out of the loss, so that each is trained on about as often as the average one."
    )
    masked_loss_unit: Literal["path_edge", "json_edge"] = setting(
        "path_edge", "Unit counted: steps of A -> B -> C paths, or parent and child keys of JSON."
    )
    masked_loss_redraw: Literal["epoch", "once"] = setting("epoch", "Draw the mask again in every epoch, or only once.")
    masked_loss_mode: Literal["sample", "weight"] = setting(
        "sample", "Leave units out at random, or weigh their loss by the probability of being kept."
    )

    epochs: NotNegative = setting(1.0, "Passes over the training rows; fractions are allowed.")
    max_steps: OffOrCount = setting(-1, "Optimizer steps to train; -1 goes by SFT_EPOCHS.")
    per_device_train_bs: AtLeastOne = setting(2, "Rows of a micro-batch on each device.")
    per_device_eval_bs: AtLeastOne = setting(2, "Rows of an evaluation batch on each device.")
    grad_accum: AtLeastOne = setting(8, "Micro-batches added up for one optimizer step.")
    micro_batch_tokens: TokenBudget = setting(
        None,
        "Most tokens of a forward pass, into which a step's rows are joined whatever the micro-batches: auto is what"
        " memory allows, on a CPU no more than pays there; 0 leaves the micro-batches as they are.",
    )
    lr: Positive = setting(1e-4, "Highest learning rate.")
    lr_scheduler: Scheduler = setting(
        "cosine",
        "Course of the learning rate, as transformers names it; warmup_stable_decay falls in the last tenth of steps.",
    )
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = setting(0.0, "Lowest learning rate as a share of SFT_LR.")
    warmup_ratio: Share = setting(0.03, "Share of the steps in which the learning rate rises to SFT_LR.")
    warmup_steps: Annotated[int, Field(ge=0)] = setting(
        0, "Steps in which it rises instead; 0 goes by SFT_WARMUP_RATIO."
    )
    weight_decay: NotNegative = setting(0.0, "Decay of the trained weights in every step.")
    adam_beta1: Share = setting(0.9, "Adam's decay of the mean gradient.")
    adam_beta2: Share = setting(0.999, "Adam's decay of the mean squared gradient.")
    adam_epsilon: Positive = setting(1e-8, "Adam's guard against division by zero.")
    max_grad_norm: NotNegative = setting(1.0, "Gradients longer than this are scaled down to it; 0 never scales.")
    optim: Annotated[Optimizer, AfterValidator(values.check_optimizer)] = setting(
        "adamw_torch_fused", "Optimizer, as transformers names it."
    )
    gradient_checkpointing: Annotated[Literal["auto", "0", "1"], BeforeValidator(values.parse_checkpointing)] = setting(
        "auto", "Compute activations twice to save memory; auto does so where they would not fit."
    )
    group_by_length: Switch = setting(False, "Put rows of similar length into the same batch.")
    neftune_noise_alpha: NotNegative = setting(0.0, "Noise added to the embeddings in training (NEFTune); 0 is none.")
    torch_compile: Switch = setting(
        False,
        "Compile the model with torch.compile; joined rows then go through sdpa under a mask of all their tokens.",
    )
    dataloader_workers: Annotated[int, Field(ge=0)] = setting(
        0, "Processes that load batches; 0 loads in the main process."
    )
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = setting(3407, "Seed of every random choice.")

    logging_steps: AtLeastOne = setting(10, "Steps between two log lines.")
    eval_steps: AtLeastOne = setting(50, "Steps between two evaluations.")
    save_steps: AtLeastOne = setting(100, "Steps between two checkpoints.")
    save_total_limit: AtLeastOne = setting(2, "Checkpoints kept.")
    early_stopping_patience: OffOrCount = setting(
        -1, "Evaluations without improvement after which to stop; -1 is never."
    )
    metric_for_best: str = setting(
        "eval_loss", "Metric that chooses the best model: eval_loss, eval_loss/<source>, perplexity or a gen_ metric."
    )

    gen_eval: Annotated[str, AfterValidator(values.check_gen_eval)] = setting(
        "none",
        "Generate answers at every evaluation and score them as structured output or extraction or by a function of"
        " your own, or only show them.",
    )
    json_schema: Annotated[Path, BeforeValidator(values.check_json_schema)] | None = setting(
        None, "File with a JSON Schema that generated answers are held to (gen_schema_rate)."
    )
    general_eval: Switch = setting(
        True,
        "Ask 150 general questions (knowledge, arithmetic, reading, instructions, formats) before and after a stage.",
    )
    gen_eval_dataset: IdOrMix = setting(
        (), "Rows to generate answers for: an id, a path or a JSON list of sources; unset takes the validation rows."
    )
    gen_eval_samples: AtLeastOne = setting(64, "Rows answered at each generation evaluation.")
    gen_max_new_tokens: AtLeastOne = setting(512, "Longest generated answer in tokens.")
    gen_batch_size: AutoOrCount = setting(
        None, "Answers generated at once on each device; auto: what memory allows on a GPU, else 8."
    )
    num_generate_samples: Annotated[int, Field(ge=0)] = setting(5, "Generated answers shown in the log.")
    extraction_fields: Names = setting(EXTRACTION_FIELDS, "Fields compared by the extraction metrics, as a comma list.")
    forgetting_margin: NotNegative = setting(
        FORGETTING_MARGIN, "Drop of an earlier stage's score above which a warning is given."
    )
    gate: Switch = setting(
        False,
        "End with exit code 3 where the complete stage did not raise its own score, or an earlier one or the general"
        " questions fell by more than SFT_FORGETTING_MARGIN and not by chance.",
    )

    mlflow_experiment_name: str = setting("", "MLflow experiment; unset is llm-training-stage followed by the number.")
    mlflow_tracking_uri: str = setting("", "MLflow store; unset is a sqlite database inside mlruns/.")
    report_to: Annotated[Names, AfterValidator(values.check_report_to)] = setting(
        ("mlflow",), "Where metrics go: mlflow, tensorboard, wandb as a comma list, or none."
    )
    run_name: str | None = setting(None, "Name of the run in MLflow.")
    report_language: Literal["auto", "en", "ja"] = setting(
        "auto", "Language of the reports' fixed texts: en, ja, or auto, which follows the locale (LC_ALL, LANG)."
    )

    mirror: Annotated[PathText, AfterValidator(values.check_mirror)] | None = setting(
        None,
        "Where a safety copy of checkpoints and results goes, and a lost stage comes back from: a folder on another "
        "disk, or hf://USER/REPO.",
    )

    @property
    def quantised(self) -> tuple[str, ...]:
        """The switch that quantises the frozen weights, () in full precision. There is but one in valid settings."""
        return tuple(name for name in values.QUANTISING if getattr(self, NAMES[name]))

    @property
    def quantised_further(self) -> tuple[str, ...]:
        """The switches under which the frozen weights would take less, in the order of `QUANTISING`."""
        places = (place for place, name in enumerate(values.QUANTISING, 1) if name in self.quantised)
        return values.QUANTISING[max(places, default=0) :]

    @property
    def sources(self) -> tuple[Source, ...]:
        """The training data sets: the mix, else the one of SFT_DATASET_ID."""
        return self.dataset_mix or (Source(id=self.dataset_id or "", split=self.dataset_split),)

    @property
    def eval_sources(self) -> tuple[Source, ...]:
        """The validation data sets; () where validation rows are split off the training sources."""
        return self.eval_dataset

    @property
    def gen_eval_sources(self) -> tuple[Source, ...]:
        """The data sets of generation evaluation; () where it answers the validation rows."""
        return self.gen_eval_dataset

    @property
    def variant(self) -> str:
        """The name of the variant of its stage that `--try` makes, "" for the stage itself."""
        names = {text.partition("=")[0].strip(): "" for text in self.tried}
        found = self.model_dump(mode="json", include={NAMES[name] for name in names})
        return variants.variant_name({name: found[NAMES[name]] for name in names})

    def command(self, *options: str, stage: int | None = None) -> str:
        """train.py's command line for this stage, or another of its ladder, with the --env-dir and --set given, and
        with the --try of this variant."""
        where = () if self.env_dir == Path() else ("--env-dir", str(self.env_dir))
        # A first stage has nothing to replay and would refuse it.
        given = [each for each in self.overrides if stage != 1 or not each.startswith("SFT_REPLAY=")]
        sets = [word for each in given for word in ("--set", hide_secrets(each))]
        sets += [word for each in (self.tried if stage in (None, self.stage) else ()) for word in (variants.MARK, each)]
        words = ["--stage", str(stage or self.stage), *where, *sets, *options]
        return f"{STARTED_AS} {shlex.join(words)}"

    def export_passthrough(self) -> None:
        """Puts what an env file says for other programs (HF_HOME, CUDA_VISIBLE_DEVICES, ...) into the environment."""
        for name, value in self.passthrough.items():
            os.environ.setdefault(name, value)

    def record(self) -> dict[str, dict[str, Any]]:
        """{NAME: {"value": as JSON, "origin": place}} for the manifest and --check; credentials in URLs are hidden."""
        plain = values.recordable(self.model_dump(mode="json", include=set(NAMES.values())))
        return {name: {"value": plain.get(NAMES[name]), "origin": self.origins.get(name, "default")} for name in NAMES}


_NOT_SETTINGS = {"stage", "env_dir", "origins", "passthrough", "overrides", "tried"}
NAMES = {name_of(attribute): attribute for attribute in Settings.model_fields if attribute not in _NOT_SETTINGS}
"""Name of every setting -> attribute of `Settings`, in the order of docs/settings.md."""


def load_settings(
    stage: int,
    *,
    env_dir: Path,
    overrides: Sequence[str] = (),
    tried: Sequence[str] = (),
    strict: bool = False,
    gate: bool = False,
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """The settings of a stage, from `--try` > `--set` > process environment > `env_dir/stageN.env` > default.

    Args:
        stage: number of the stage, from 1.
        env_dir: folder of the env files.
        overrides: "NAME=VALUE" texts of `--set`.
        tried: "NAME=VALUE" texts that make it one of the variants of `--try`.
        strict, gate: whether `--strict` and `--gate` were given.
        environ: the process environment; None takes the real one.

    Raises:
        Problems: with every mistake at once, in the order of the lines they stand on.
    """
    environ = os.environ if environ is None else environ
    path = Path(env_dir) / f"stage{stage}.env"
    given = gather(tuple(NAMES), path, overrides=overrides, tried=tried, environ=environ)
    for attribute, option in {"strict": strict, "gate": gate}.items():
        if option:
            given.values[name_of(attribute)] = "1"
            given.places[name_of(attribute)] = Location(2, 0, f"--{attribute}")
    texts = {NAMES[name]: text for name, text in given.values.items() if text}
    fixed: dict[str, Any] = {
        "stage": stage,
        "env_dir": Path(env_dir),
        "passthrough": given.passthrough,
        "overrides": tuple(overrides),
        "tried": tuple(tried),
        "origins": given.origins(NAMES),
    }
    texts.setdefault("mlflow_experiment_name", f"llm-training-stage{stage}")
    texts.setdefault("mlflow_tracking_uri", tracking_uri({}))
    context = {"variables": {**given.passthrough, **environ}}
    settings, problems = validate(Settings, fixed, texts=texts, given=given, context=context)
    if problems or given.problems:
        raise Problems(problem.text for problem in sorted(problems + given.problems))
    return settings


def tracking_uri(environ: Mapping[str, str] | None = None) -> str:
    """The MLflow store where no stage says another: MLFLOW_TRACKING_URI, else a database inside mlruns/ of the
    repository; of the current folder where the package was installed, whose own folder is no place for results."""
    database = (REPOSITORY or Path.cwd()) / "mlruns" / "mlflow.db"
    return (os.environ if environ is None else environ).get("MLFLOW_TRACKING_URI") or f"sqlite:///{database}"
