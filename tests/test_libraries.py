"""What we lean on in other libraries without their promise: it is there, and our overrides are called by them.

Whoever uses another private name finds it missing in `PRIVATE` below; whoever raises a version sees here what is gone.
"""

import ast
import importlib
import importlib.util
import inspect
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from sft.environment import TRIED, untested_versions
from tests.tiny import run_train, write_model, write_rows, write_stage

ROOT = Path(__file__).resolve().parents[1]
TRAINER = "transformers.trainer:Trainer"
EXPERTS = "transformers.models.qwen3_moe.modeling_qwen3_moe:Qwen3MoeExperts"

NAMES = {
    f"{TRAINER}._prepare_inputs": "batches go to the device",
    "torch.distributed.distributed_c10d:_get_default_store": "ranks wait for each other in it",
    "torch._subclasses.fake_tensor:FakeTensorMode": "a step of shapes",
    "torch.utils._python_dispatch:TorchDispatchMode": "its operations are seen",
    "torch.utils._pytree:tree_iter": "its tensors are found",
    "torch:ops.aten._grouped_mm": "products of experts among them",
    "torch:ops.aten._softmax_backward_data": "attention of a row on a CPU",
    "transformers:AttentionInterface._global_mapping": "attention of shapes in place of the real one",
    "transformers:AttentionMaskInterface.register": "rows keep to themselves",
    "transformers.masking_utils:sdpa_mask": "the mask of what is no joined row",
    "transformers.integrations.sdpa_attention:sdpa_attention_forward": "and its attention",
    "transformers.cache_utils:DynamicLayer.lazy_initialization": "a roomy cache of answers",
    "transformers:GenerationMixin._optimize_model_for_decode": "experts as transformers' own loop has them",
    "transformers.modeling_utils:set_zero3_state": "a model of shapes under ZeRO-3",
    "transformers.quantizers.base:get_keys_to_not_convert": "what bitsandbytes leaves alone",
    "transformers.quantizers.quantizers_utils:should_convert_module": "and what it converts",
    "transformers.conversion_mapping:get_model_conversion_mapping": "names in files and in the model",
    "transformers.core_model_loading:rename_source_key": "and how one becomes the other",
    "transformers.core_model_loading:WeightConverter": "fused experts",
    "transformers.core_model_loading:WeightRenaming": "renamed keys",
    "transformers.core_model_loading:Concatenate": "gate and up in one",
    "transformers.core_model_loading:MergeModulelist": "experts in one",
    "transformers.core_model_loading:dot_natural_key": "their order",
    "transformers.utils.chat_template_utils:render_jinja_template": "rows as text",
    "transformers.integrations:unset_hf_deepspeed_config": "the stage before left it",
    "transformers.pytorch_utils:Conv1D": "GPT-2's linear layer",
    "trl.trainer.utils:add_fused_lm_head": "the loss in tiles",
    "trl.kernels.chunked_logprob:_TRITON_AVAILABLE": "switched off where there is no compiler",
    "peft.tuners.lora.layer:ParamWrapper.get_delta_factors": "adapters on experts",
    "accelerate.utils:DeepSpeedPlugin.set_deepspeed_weakref": "a model loaded whole under ZeRO-3",
    "torch.utils._pytree:tree_map": "what a layer returns, cast",
    "peft.utils:ModulesToSaveWrapper": "modules trained in full",
    f"{EXPERTS}._apply_gate": "experts' activation",
    "dotenv.parser:parse_stream": "env files with their line numbers",
    "datasets:Dataset.map": "its results are found by `_fingerprint`",
    "trl:SFTTrainer._prepare_dataset": "a benchmark takes its time",
    "mlflow.system_metrics.system_metrics_monitor:SystemMetricsMonitor": "the machine's load in MLflow",
    "peft.import_utils:is_bnb_4bit_available": "answered without bitsandbytes being loaded",
    "trl.import_utils:PACKAGE_DISTRIBUTION_MAPPING": "filled as far as it is asked",
    "deepspeed.ops:__compatible_ops__": "no compilation on a CPU",
}
"""module:attribute -> what for."""

TEXTS = {
    (f"{TRAINER}._inner_training_loop", "self._tr_loss = torch.tensor"): "filled again after a resume",
    (f"{TRAINER}._inner_training_loop", "self._globalstep_last_logged = "): "likewise",
    (f"{TRAINER}._run_epoch", "self._tr_loss += tr_loss_step"): "saved with a checkpoint",
    (f"{TRAINER}._run_epoch", "self.state.epoch = epoch + "): "a resumed run's epoch",
    (f"{TRAINER}.training_step", "if self.loss_is_scaled_for_ga is not None"): "our loss is divided already",
    ("deepspeed.runtime.zero.stage_1_and_2", '_global_grad_norm = float("inf")'): "a step that float16 skips",
    ("deepspeed.runtime.zero.stage_1_and_2", "loss_scale = property("): "and the scale it was skipped at",
    ("accelerate.state:AcceleratorState", "self._mixed_precision"): "float16 on a CPU, for rehearsals and tests",
    (f"{TRAINER}.log", 'if self.args.include_num_input_tokens_seen != "no"'): "the state's counter of tokens is ours",
    ("transformers:TrainingArguments", "self._n_gpu = "): "one process takes one GPU",
    ("transformers.cache_utils:DynamicLayer", "is_initialized"): "a roomy cache of answers",
    ("transformers.utils.chat_template_utils:render_jinja_template", "return_assistant_tokens_mask"): "trained spans",
    ("transformers:PreTrainedModel", "all_tied_weights_keys"): "tied heads in a merge",
    ("transformers:PretrainedConfig", "_attn_implementation"): "which attention a model has",
    ("trl.trainer.utils:add_fused_lm_head", "log_probs"): "the loss of each token",
    ("trl.trainer.utils:add_fused_lm_head", "label_mask"): "and which tokens they are",
    ("peft.tuners.tuners_utils:BaseTunerLayer", "cast_input_dtype_enabled"): "casts left to autocast",
    ("peft.tuners.lora.layer:ParamWrapper", "parameter_name"): "adapters on experts",
    ("peft.utils:ModulesToSaveWrapper", "copy.deepcopy(self.original_module)"): "what is trained is a copy",
    ("peft.tuners.lora:LoraModel._add_modules_to_save_to_tie", "modules_to_tie"): "a tied pair trained as one",
    ("transformers.integrations.moe", "has_gate"): "layouts of experts that are known",
    ("transformers.integrations.moe", "is_transposed"): "likewise",
    ("datasets:Dataset", "self._indices"): "a view's column of numbers at once",
    ("datasets:Dataset", "self._fingerprint"): "the name of prepared rows",
    ("transformers:PretrainedConfig", "_name_or_path"): "the folder that was loaded, for the format it was merged in",
    ("transformers.integrations.moe", "_is_expert_parallel"): "experts that other processes hold",
    ("torch.distributed.tensor._api", "_local_tensor"): "this rank's part of a gradient",
    ("peft.import_utils:is_bnb_4bit_available", 'hasattr(bnb.nn, "Linear4bit")'): "what PEFT asks of bitsandbytes",
    ("accelerate.utils.other:extract_model_from_parallel", "import DeepSpeedEngine"): "known without DeepSpeed",
    ("bitsandbytes.nn:Linear4bit", "support_avx512bf16_for_cpu"): "switched off: packed weights can't be trained on",
    ("deepspeed.runtime.zero.partition_parameters", "ds_tensor"): "this rank's part of a weight under ZeRO-3",
}
"""(object, text of its source) -> what for: attributes that only exist while something runs."""

PRIVATE = {
    "_TRITON_AVAILABLE", "_apply_gate", "_attn_implementation", "_fingerprint", "_indices", "_get_default_store",
    "_global_mapping", "_globalstep_last_logged", "_grouped_mm", "_is_expert_parallel", "_local_tensor", "_n_gpu",
    "_name_or_path", "_optimize_model_for_decode", "_prepare_dataset", "_prepare_inputs", "_pytree", "_python_dispatch",
    "_softmax_backward_data", "_subclasses", "_tr_loss",
}  # fmt: skip
"""Private names of others in our code; each stands in a table above."""
NO_LIBRARY = {"_asdict", "_replace", "_exit"}  # namedtuples and os
CALLED_BY_US = {"train"}
LIBRARIES = ("transformers", "trl", "peft", "accelerate", "torch", "datasets")


def found(place: str) -> Any:
    """What stands at module:attribute.attribute; skips where the package itself is not installed (deepspeed)."""
    module, _, path = place.partition(":")
    if importlib.util.find_spec(module.split(".")[0]) is None:
        pytest.skip(f"{module} is not installed")
    thing = importlib.import_module(module)
    for name in path.split(".") if path else ():
        thing = getattr(thing, name)
    return thing


@pytest.mark.parametrize("place", NAMES)
def test_the_name_is_still_there(place: str):
    """Otherwise an ImportError or AttributeError in the middle of somebody's run."""
    assert found(place) is not None


@pytest.mark.parametrize(("place", "text"), TEXTS)
def test_the_library_still_does_it_that_way(place: str, text: str):
    """Attributes that are made while something runs: the line that makes or reads them is there."""
    assert text in inspect.getsource(found(place))


def private_names(path: Path) -> set[str]:
    """Private attributes, also by getattr and its like, and private parts of imported paths."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "").endswith("attr") and len(node.args) > 1:
            names.add(str(getattr(node.args[1], "value", "")))
        elif isinstance(node, ast.ImportFrom):
            names |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def own_names(path: Path) -> set[str]:
    """What a file defines: functions, classes, variables, attributes it assigns and slots it declares."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return names


def overrides() -> set[str]:
    """Methods of StagedTrainer that the libraries' trainers have as well."""
    from trl import SFTTrainer

    from sft.training.trainer import StagedTrainer

    named = {name for name, value in vars(StagedTrainer).items() if inspect.isfunction(value)}
    return {name for name in named if hasattr(SFTTrainer, name) and not name.startswith("__")}


def test_every_private_name_we_use_stands_in_the_tables():
    """A new one is a decision: it has to be written down here, with what it is for."""
    folders = ("sft", "official_content", "benchmarks")
    files = [*(path for folder in folders for path in (ROOT / folder).rglob("*.py")), ROOT / "train.py"]
    defined = set().union(*(own_names(path) for path in files)) - PRIVATE
    used = set().union(*(private_names(path) for path in files))
    assert used - defined - overrides() - NO_LIBRARY - PRIVATE == set()
    tables = " ".join((*NAMES, *(f"{place} {text}" for place, text in TEXTS)))
    assert [name for name in PRIVATE if name not in tables] == []


def test_no_private_override_hangs_in_the_air():
    """A method of ours with a private name is an override, or the library no longer calls it; our own have public
    names."""
    from sft.training.trainer import StagedTrainer

    private = {name for name in vars(StagedTrainer) if name.startswith("_") and not name.startswith("__")}
    assert {name for name in private if inspect.isfunction(vars(StagedTrainer)[name])} <= overrides()


@pytest.mark.slow
def test_every_override_is_called_by_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two steps with evaluation and checkpoints: each method we override is called from their code, not only ours."""
    from sft.training.trainer import StagedTrainer

    callers: dict[str, set[str]] = {name: set() for name in overrides()}
    assert len(callers) >= 13

    def watch(name: str) -> None:
        method = getattr(StagedTrainer, name)

        def recorded(self: Any, *arguments: Any, **keywords: Any) -> Any:
            callers[name].add(sys._getframe(1).f_globals["__name__"].split(".")[0])
            return method(self, *arguments, **keywords)

        monkeypatch.setattr(StagedTrainer, name, recorded)

    for name in callers:
        watch(name)
    write_stage(tmp_path, 1, {
        "SFT_BASE_MODEL": write_model(tmp_path / "base"), "SFT_DATASET_ID": write_rows(tmp_path / "rows.jsonl", 24),
        "SFT_OUT_LORA_DIR": tmp_path / "out", "SFT_MAX_STEPS": 2, "SFT_EVAL_STEPS": 2,
    })  # fmt: skip
    assert run_train("--stage", 1, "--env-dir", tmp_path) == 0
    assert {name for name, seen in callers.items() if not seen & {"transformers", "trl"}} == CALLED_BY_US


def test_trls_marked_templates_are_where_we_look():
    """`X_training.jinja` beside `X.jinja`: otherwise the masks of such models change silently."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None and spec.submodule_search_locations
    templates = Path(spec.submodule_search_locations[0]) / "chat_templates"
    assert len(list(templates.glob("*_training.jinja"))) >= 10


# Versions


def test_the_pinned_versions_lie_within_the_bounds():
    """constraints.txt is what was tested; both bounds stand in pyproject.toml for every library we lean on."""
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = {each.name: each.specifier for each in map(Requirement, project["dependencies"])}
    assert [name for name in bounds if name in pins and not bounds[name].contains(pins[name])] == []
    assert [name for name in LIBRARIES if {each.operator for each in bounds[name]} != {">=", "<"}] == []
    assert bounds["torch"].contains("2.11.0")


def test_an_installation_outside_the_bounds_is_one_line():
    """Name, version, bounds, remedy; nothing about packages inside them, not installed, or of an extra."""
    versions = {"torch": "2.10.1", "transformers": "5.23.0", "trl": "2.0.0", "pytest": "1.0"}
    asked = ["torch<2.14,>=2.11", "transformers<6,>=5.17", "trl<1.17,>=1.16", "nothing", 'pytest>9; extra == "dev"']
    assert untested_versions(asked, versions.get) == (
        "[WARNING] Untested versions: torch 2.10.1 (tested: <2.14,>=2.11), trl 2.0.0 (tested: <1.17,>=1.16); "
        "make install, or pip install -c constraints.txt ., installs tested ones"
    )
    assert untested_versions(["torch<2.14,>=2.11"], {"torch": "2.13.0+cpu"}.get) == ""


def test_a_torch_later_than_those_tried_is_used_and_named():
    """The package's bound is wider than what was run: 2.14.1 passes unsaid, 2.19 does not."""
    asked = ["torch<3,>=2.11", *TRIED]
    assert untested_versions(asked, {"torch": "2.14.1+cu130"}.get) == ""
    assert "torch 2.19.0 (tested: <2.15,>=2.11)" in untested_versions(asked, {"torch": "2.19.0"}.get)
