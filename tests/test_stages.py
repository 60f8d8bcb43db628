"""What is decided about a stage, from folders made by hand; and what its manifest says."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sft.errors import Problems, RunFailed
from sft.settings import Source
from sft.stages.fingerprints import model_fingerprint, source_fingerprint
from sft.stages.manifest import with_digest
from sft.stages.stage import Stage
from sft.storage import json_files, seals
from tests.ladders import add_adapter, add_checkpoint, make_settings, train

ROOT = Path(__file__).parents[1]


def refusal(settings, **options) -> list[str]:
    """The problems `open` raises; `inspect` must list the same and write nothing."""
    before = snapshot(settings.out_lora_dir.parent)
    inspected = Stage.inspect(settings, **options)
    assert inspected.decision == "refuse"
    with pytest.raises(Problems) as refused:
        Stage.open(settings, **options)
    assert inspected.problems == refused.value.problems
    assert snapshot(settings.out_lora_dir.parent) == before
    return refused.value.problems


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def killed(settings, *, checkpoint: int | None = None) -> Stage:
    """A stage that was begun and killed."""
    with Stage.open(settings) as stage:
        stage.begin()
        if checkpoint is not None:
            add_checkpoint(stage.folder, checkpoint)
    return stage


def rewrite_manifest(folder: Path, **fields: object) -> None:
    manifest = json.loads((folder / "stage.json").read_text())
    (folder / "stage.json").write_text(json.dumps(with_digest(manifest | fields)))


# --- decisions about the stage's own folder


@pytest.mark.parametrize("left", [[], ["error.log"], [".DS_Store"]])
def test_no_folder_an_empty_one_and_one_with_only_the_log_of_a_failed_start_are_fresh(tmp_path, left):
    """Nothing in them is a person's work."""
    settings = make_settings(tmp_path)
    assert Stage.inspect(settings).decision == "fresh"
    folder = tmp_path / "out_stage1"
    folder.mkdir()
    for name in left:
        (folder / name).touch()
    assert Stage.inspect(settings).decision == "fresh"
    with Stage.open(settings) as stage:
        assert (stage.decision, stage.checkpoint, stage.number, stage.folder) == ("fresh", None, 1, folder)


def test_looking_at_a_stage_writes_nothing(tmp_path):
    """Not even the folder or the lock."""
    settings = make_settings(tmp_path, 2)
    before = snapshot(tmp_path)
    Stage.inspect(settings)
    assert snapshot(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "rows.jsonl", "stage2.env"]


def test_a_complete_stage_stays_as_it_is_and_is_not_locked(tmp_path):
    """Two may open it at once and no byte changes."""
    settings = make_settings(tmp_path)
    train(settings)
    before = snapshot(tmp_path)
    with Stage.open(settings) as stage, Stage.open(settings) as again:
        assert (stage.decision, again.decision) == ("complete", "complete")
        assert stage.changed == []
    assert snapshot(tmp_path) == before


def test_a_complete_stage_refuses_other_settings_and_lists_old_and_new(tmp_path):
    """Two that matter are listed, a neutral one is not; --fresh is the way."""
    train(make_settings(tmp_path))
    problems = refusal(make_settings(tmp_path, lr="2e-4", lora_alpha=8, logging_steps=1))
    assert problems == [
        f"{tmp_path}/out_stage1: stage 1 is complete, but since then changed:\n"
        "  SFT_LORA_ALPHA: 32 → 8\n"
        "  SFT_LR: 0.0001 → 0.0002\n"
        f"  python train.py --stage 1 --env-dir {tmp_path} --fresh moves it aside and trains again"
    ]


def test_what_cannot_change_the_result_may_change(tmp_path):
    """Five neutral settings changed: still complete."""
    train(make_settings(tmp_path, lr="1e-4"))
    neutral = {"logging_steps": 3, "save_steps": 7, "per_device_eval_bs": 1, "run_name": "x", "report_to": "none"}
    assert Stage.inspect(make_settings(tmp_path, **neutral)).decision == "complete"


@pytest.mark.parametrize(
    ("before", "after", "changed"),
    [
        ((2, 8, 1), (4, 4, 1), []),
        ((2, 8, 1), (2, 4, 1), ["SFT_PER_DEVICE_TRAIN_BS × SFT_GRAD_ACCUM: 16 → 8"]),
        ((2, 8, 1), (2, 4, 2), []),
        ((2, 8, 1), (2, 8, 2), ["rows per step: 16 → 32 (same settings, another number of processes)"]),
        ((2, 8, 4), (2, 8, None), []),
    ],
)
def test_micro_batch_accumulation_and_processes_may_trade_places(tmp_path, before, after, changed):
    """(micro-batch, accumulation, processes) before and after a kill: a step must see the same rows."""
    with Stage.open(
        make_settings(tmp_path, per_device_train_bs=before[0], grad_accum=before[1]), processes=before[2]
    ) as s:
        s.begin()
        add_checkpoint(s.folder, 5)
    settings = make_settings(tmp_path, per_device_train_bs=after[0], grad_accum=after[1])
    stage = Stage.inspect(settings, processes=after[2])
    assert stage.changed == changed
    assert stage.decision == ("refuse" if changed else "resume")


def test_a_complete_stage_may_be_looked_at_with_another_number_of_processes(tmp_path):
    """Trained on four, looked at from one."""
    settings = make_settings(tmp_path)
    with Stage.open(settings, processes=4) as stage:
        stage.begin()
        add_adapter(stage.folder, b"a")
        stage.complete()
    assert Stage.inspect(settings, processes=1).decision == "complete"


def test_edited_data_is_noticed_and_missing_data_is_said(tmp_path):
    """Another content refuses with both checksums; a file that is gone is only a warning once the stage is complete."""
    settings = make_settings(tmp_path)
    train(settings)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "c"}\n')
    (problem,) = refusal(settings)
    assert f"\n  data {rows}: content sha256:000693b3a77e → sha256:37490001bb7c\n" in problem
    rows.unlink()
    stage = Stage.inspect(settings)
    assert stage.decision == "complete"
    assert stage.warnings == [f"[WARNING] {rows} is gone: not compared with what was trained on"]


def test_edited_validation_rows_and_template_are_noticed(tmp_path):
    """Both files' contents are part of what a stage was made from."""
    (tmp_path / "val.jsonl").write_text("1")
    (tmp_path / "chat.jinja").write_text("1")
    settings = make_settings(tmp_path, eval_dataset=tmp_path / "val.jsonl", chat_template=tmp_path / "chat.jinja")
    train(settings)
    for name in ("val.jsonl", "chat.jinja"):
        (tmp_path / name).write_text("2")
    change = "content sha256:6b86b273ff34 → sha256:d4735e3a265e"
    assert Stage.inspect(settings).changed == [
        f"SFT_CHAT_TEMPLATE: {change}",
        f"SFT_EVAL_DATASET {tmp_path / 'val.jsonl'}: {change}",
    ]


def test_a_base_model_that_moved_is_the_same_and_one_that_changed_is_not(tmp_path):
    """A link and its target are one model; other weights, or another id, are not."""
    train(make_settings(tmp_path))
    (tmp_path / "base").rename(tmp_path / "models")
    (tmp_path / "base").symlink_to("models")
    assert Stage.inspect(make_settings(tmp_path, base_model=tmp_path / "models")).decision == "complete"
    (tmp_path / "models" / "model.safetensors").write_bytes(b"other weights")
    stage = Stage.inspect(make_settings(tmp_path))
    assert (stage.decision, len(stage.changed)) == ("refuse", 1)
    assert stage.changed[0].startswith("SFT_BASE_MODEL: content model:")
    assert Stage.inspect(make_settings(tmp_path, base_model="org/model")).changed == [
        f"SFT_BASE_MODEL: {tmp_path / 'base'} → org/model"
    ]


def test_a_killed_stage_resumes_from_its_checkpoint_and_refuses_other_settings(tmp_path):
    """A neutral setting may change in between, the learning rate may not."""
    folder = killed(make_settings(tmp_path), checkpoint=20).folder
    with Stage.open(make_settings(tmp_path, save_steps=7)) as stage:
        assert (stage.decision, stage.checkpoint) == ("resume", folder / "checkpoint-20")
    (problem,) = refusal(make_settings(tmp_path, lr="2e-4"))
    assert problem.startswith(
        f"{folder}: stage 1 is partly trained, but since then changed:\n  SFT_LR: 0.0001 → 0.0002\n"
    )


def test_a_failed_stage_resumes(tmp_path):
    """The manifest has the error until the next start."""
    with pytest.raises(ValueError, match="out of memory"), Stage.open(make_settings(tmp_path)) as stage:
        stage.begin()
        add_checkpoint(stage.folder, 20)
        raise ValueError("out of memory")
    manifest = json.loads((stage.folder / "stage.json").read_text())
    assert (manifest["status"], manifest["error"]) == ("failed", "ValueError: out of memory")
    with Stage.open(make_settings(tmp_path)) as stage:
        assert stage.decision == "resume"
        stage.begin()
        assert "error" not in json.loads((stage.folder / "stage.json").read_text())


@pytest.mark.parametrize("stop", [SystemExit(143), KeyboardInterrupt()])
def test_a_stopped_stage_is_not_a_failed_one(tmp_path, stop):
    """A signal leaves "running", which resumes without an error."""
    with pytest.raises(type(stop)), Stage.open(make_settings(tmp_path)) as stage:
        stage.begin()
        raise stop
    assert json.loads((stage.folder / "stage.json").read_text())["status"] == "running"


def test_a_start_without_checkpoint_takes_corrected_settings(tmp_path):
    """Nothing was trained that could be mixed or lost; what it evaluated is kept beside the new output."""
    killed(make_settings(tmp_path))
    with Stage.open(make_settings(tmp_path, lr="2e-4")) as stage:
        assert (stage.decision, stage.moved) == ("fresh", {})
        stage.begin()
        (stage.folder / "gen_metrics_step0.json").write_text("{}")
    with Stage.open(make_settings(tmp_path, lr="3e-4")) as stage:
        assert stage.changed == ["SFT_LR: 0.0002 → 0.0003"]
        stage.begin()
    (aside,) = stage.moved.values()
    assert aside.name.startswith("out_stage1.old-")
    assert (aside / "gen_metrics_step0.json").exists()
    assert [path.name for path in stage.folder.iterdir()] == ["stage.json"]


@pytest.mark.parametrize("name", ["notes.txt", "checkpoint-5/trainer_state.json", "config.json"])
def test_a_folder_that_is_not_ours_is_not_overwritten(tmp_path, name):
    """Files without a stage.json: exit 2, with another name or --fresh as ways out."""
    settings = make_settings(tmp_path)
    (tmp_path / "out_stage1" / name).parent.mkdir(parents=True)
    (tmp_path / "out_stage1" / name).write_text("{}")
    (problem,) = refusal(settings)
    assert problem == (
        f"SFT_OUT_LORA_DIR={tmp_path}/out: {tmp_path}/out_stage1 holds files, but no stage.json, so it is not "
        f"overwritten; choose another name, or python train.py --stage 1 --env-dir {tmp_path} --fresh moves it aside "
        "and trains again"
    )


def test_fresh_moves_the_old_output_aside_and_keeps_the_merged_base(tmp_path):
    """The first adapter is in the moved folder; what the stage starts from has not changed. Before the stage begins it
    stands where it was: data or model may still be refused."""
    settings = make_settings(tmp_path)
    train(settings, b"first")
    (tmp_path / "out_stage1_merged_base").mkdir()
    assert Stage.inspect(settings, fresh=True).decision == "fresh"
    with pytest.raises(Problems), Stage.open(settings, fresh=True):
        raise Problems(["the data can't be read"])
    assert (tmp_path / "out_stage1" / "adapter_model.safetensors").read_bytes() == b"first"
    with Stage.open(settings, fresh=True) as stage:
        assert stage.decision == "fresh"
        stage.begin()
        assert [path.name for path in stage.folder.iterdir()] == ["stage.json"]
        assert (stage.moved[stage.folder] / "adapter_model.safetensors").read_bytes() == b"first"
    assert (tmp_path / "out_stage1_merged_base").is_dir()


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{"stage": 1', "not readable as JSON"),
        ("[]", "damaged at the whole of it"),
        ("{}", "damaged at stage"),
    ],
)
def test_an_unreadable_manifest_is_named_and_fresh_is_the_way_out(tmp_path, text, place):
    """The file, the place in it, and the command."""
    settings = make_settings(tmp_path)
    train(settings)
    (tmp_path / "out_stage1" / "stage.json").write_text(text)
    (problem,) = refusal(settings)
    assert problem.startswith(f"{tmp_path}/out_stage1/stage.json: {place}")
    assert f"--stage 1 --env-dir {tmp_path} --fresh" in problem
    with Stage.open(settings, fresh=True) as stage:
        assert stage.decision == "fresh"


def test_a_manifest_of_another_stage_or_status_is_damaged(tmp_path):
    """Copied from stage 3, or with a status that does not exist."""
    settings = make_settings(tmp_path)
    train(settings)
    rewrite_manifest(tmp_path / "out_stage1", stage=3)
    assert "is the manifest of stage 3, not of stage 1" in refusal(settings)[0]
    rewrite_manifest(tmp_path / "out_stage1", stage=1, status="comqlete")
    assert "damaged at status" in refusal(settings)[0]


def test_no_flipped_bit_of_a_manifest_ends_in_anything_but_a_decision_or_a_problem(tmp_path):
    """A bit in every hundred bytes of a parent's manifest and of the stage's own, and truncations."""
    settings = make_settings(tmp_path, 2)
    train(make_settings(tmp_path))
    train(settings)
    decisions = set()
    for name in ("out_stage1", "out_stage2"):
        path = tmp_path / name / "stage.json"
        whole = path.read_bytes()
        for bit in range(0, len(whole) * 8, 809):
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            decisions.add(Stage.inspect(settings).decision)
        for length in range(0, len(whole), 997):
            path.write_bytes(whole[:length])
            assert Stage.inspect(settings).decision == "refuse"
        path.write_bytes(whole)
    assert decisions <= {"complete", "refuse", "resume"}
    assert Stage.inspect(settings).decision == "complete"


def test_a_complete_stage_whose_adapter_was_damaged_says_so(tmp_path):
    """Its checksum is not the one that stage.json lists."""
    settings = make_settings(tmp_path)
    train(settings)
    (tmp_path / "out_stage1" / "adapter_model.safetensors").write_bytes(b"adapter 2")
    assert "its weights are not those that stage.json lists" in refusal(settings)[0]


def test_an_output_that_cannot_be_written_is_a_problem_before_anything_is_tried(tmp_path, monkeypatch):
    """Exit 2 with the setting and the way out."""
    settings = make_settings(tmp_path)
    killed(settings)
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "out_stage1" and real(path, mode))
    assert refusal(settings) == [
        f"SFT_OUT_LORA_DIR={tmp_path}/out: {tmp_path}/out_stage1 can't be written by this user; "
        "choose another path or change its permissions"
    ]


def compete(settings, moment: float) -> int:
    """Fork a process that trains the stage at the moment: exit 0 trained, 1 told who holds it, 2 found it complete."""
    child = os.fork()
    if child:
        return child
    time.sleep(max(0.0, moment - time.time()))
    try:
        with Stage.open(settings) as stage:
            if stage.decision == "complete":
                os._exit(2)
            stage.begin()
            add_adapter(stage.folder, b"trained by %d" % os.getpid())
            stage.complete()
    except Problems as refused:
        os._exit(1 if "is in use by process" in refused.problems[0] else 3)
    os._exit(0)


def test_of_starts_at_once_exactly_one_trains(tmp_path):
    """Twenty stages, three starts each: one trains, the others are told or find the finished stage."""
    moment = time.time() + 0.5
    stages = [make_settings(tmp_path / str(turn)) for turn in range(20)]
    starts = [[compete(settings, moment) for _ in range(3)] for settings in stages]
    for settings, children in zip(stages, starts, strict=True):
        ends = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
        assert ends in ([0, 1, 1], [0, 1, 2], [0, 2, 2])
        assert Stage.inspect(settings).decision == "complete"


# --- lineage


def test_parents_are_all_earlier_stages_in_order_with_their_hashes(tmp_path):
    """Stage 3 has stages 1 and 2, whose hashes stand in its manifest."""
    for number in (1, 2):
        train(make_settings(tmp_path, number))
    with Stage.open(make_settings(tmp_path, 3)) as stage:
        assert [(p.stage, p.folder.name, p.kind) for p in stage.parents] == [
            (1, "out_stage1", "adapter"),
            (2, "out_stage2", "adapter"),
        ]
        # printf 'adapter 1' | sha256sum
        assert stage.parents[0].adapter_sha256 == ADAPTER_1
        assert (stage.start_model, stage.warnings) == (str(tmp_path / "base"), [])
        assert stage.merged_base == tmp_path / "out_stage3_merged_base"
        stage.begin()
        assert json.loads((stage.folder / "stage.json").read_text())["parents"][0] == {
            "stage": 1,
            "adapter_sha256": ADAPTER_1,
        }


ADAPTER_1 = subprocess.run(["sha256sum"], input=b"adapter 1", capture_output=True, check=True).stdout[:64].decode()


def test_each_missing_stage_gets_its_warning_and_the_others_are_used(tmp_path):
    """Stage 4 with stage 1 alone: two warnings, one parent."""
    train(make_settings(tmp_path, 1))
    stage = Stage.inspect(make_settings(tmp_path, 4))
    assert stage.warnings == [
        f"[WARNING] Previous stage adapter not found at {tmp_path}/out_stage2, starting from base model",
        f"[WARNING] Previous stage adapter not found at {tmp_path}/out_stage3, starting from base model",
    ]
    assert [parent.stage for parent in stage.parents] == [1]
    assert stage.decision == "fresh"


def test_in_strict_mode_a_missing_stage_is_a_problem(tmp_path):
    """The same words, and how to go on."""
    assert refusal(make_settings(tmp_path, 2, strict=True)) == [
        f"Previous stage adapter not found at {tmp_path}/out_stage1, starting from base model; strict mode forbids "
        f"that: train it with python train.py --stage 1 --env-dir {tmp_path}, or run without strict mode"
    ]


def test_a_changed_figure_in_a_manifest_is_noticed(tmp_path):
    """A flipped bit that leaves stage.json readable: its own digest tells."""
    settings = make_settings(tmp_path)
    train(settings)
    path = tmp_path / "out_stage1" / "stage.json"
    path.write_text(path.read_text().replace('"epoch": 1.0', '"epoch": 1.5'))
    (problem,) = refusal(settings)
    assert problem.startswith(f"{path}: damaged, its content is not what was written; ")


def test_damage_beside_a_parents_weights_is_a_warning(tmp_path):
    """The adapter's configuration has changed since the stage was completed; merging verifies what that means."""
    train(make_settings(tmp_path))
    (tmp_path / "out_stage1" / "adapter_config.json").write_text('{"lora_alpha": 33}')
    with Stage.open(make_settings(tmp_path, 2)) as stage:
        assert stage.warnings == [
            f"[WARNING] {tmp_path}/out_stage1: damaged since it was completed: "
            "adapter_config.json: 18 bytes instead of 2"
        ]


@pytest.mark.parametrize(("status", "state"), [("running", "was stopped before its end"), ("failed", "failed")])
def test_an_unfinished_parent_is_a_problem(tmp_path, status, state):
    """Running, failed: each with what it is and the command that finishes it."""
    killed(make_settings(tmp_path))
    rewrite_manifest(tmp_path / "out_stage1", status=status)
    assert refusal(make_settings(tmp_path, 2)) == [
        f"{tmp_path}/out_stage1: stage 1 {state}; run python train.py --stage 1 --env-dir {tmp_path} again"
    ]


def test_a_parent_in_training_is_named_with_its_process(tmp_path):
    """Who waits for it can look it up."""
    with Stage.open(make_settings(tmp_path)) as stage:
        stage.begin()
        (problem,) = refusal(make_settings(tmp_path, 2))
    assert problem.startswith(f"{tmp_path}/out_stage1: stage 1 is still being trained by process {os.getpid()} on ")


def test_an_adapter_of_another_tool_is_taken_with_a_warning(tmp_path):
    """Without stage.json it is a parent all the same; nothing vouches for its data."""
    add_adapter(tmp_path / "out_stage1", b"x")
    stage = Stage.inspect(make_settings(tmp_path, 2))
    assert stage.decision == "fresh"
    assert [parent.stage for parent in stage.parents] == [1]
    assert stage.warnings == [
        f"[WARNING] {tmp_path}/out_stage1 has no stage.json: nothing says what its adapter was trained on"
    ]


def test_a_parent_folder_without_adapter_is_a_problem_and_a_pickle_is_none(tmp_path):
    """A .bin is never loaded."""
    folder = tmp_path / "out_stage1"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    assert refusal(make_settings(tmp_path, 2))[0].startswith(
        f"{folder}: holds no adapter_config.json with adapter_model.safetensors; train it again with"
    )
    (folder / "adapter_model.bin").write_bytes(b"")
    assert "only adapter_model.bin, a pickle, and no pickle is ever loaded" in refusal(make_settings(tmp_path, 2))[0]


def test_a_damaged_parent_is_a_problem(tmp_path):
    """Other weights than listed, or half a manifest: with the command that mends it."""
    train(make_settings(tmp_path))
    (tmp_path / "out_stage1" / "adapter_model.safetensors").write_bytes(b"adapter 0")
    assert "its weights are not those that stage.json lists" in refusal(make_settings(tmp_path, 2))[0]
    (tmp_path / "out_stage1" / "stage.json").write_text("{")
    assert refusal(make_settings(tmp_path, 2))[0].endswith(
        f"run python train.py --stage 1 --env-dir {tmp_path} --fresh"
    )


def test_a_parent_on_another_base_model_is_a_problem(tmp_path):
    """A ladder has one base model; both are named."""
    train(make_settings(tmp_path))
    (problem,) = refusal(make_settings(tmp_path, 2, base_model="org/other"))
    assert problem == (
        f"SFT_BASE_MODEL=org/other: {tmp_path}/out_stage1 was trained on {tmp_path}/base; "
        "all stages of a ladder need one base model"
    )


def test_after_a_parent_was_retrained_its_children_refuse_and_later_stages_name_the_one_to_train(tmp_path):
    """Stage 2 lists both hashes; stage 3 names stage 2; once that is trained again stage 3 may start."""
    for number in (1, 2):
        train(make_settings(tmp_path, number))
    train(make_settings(tmp_path), b"other", fresh=True)
    stage = Stage.inspect(make_settings(tmp_path, 2))
    assert stage.changed == [f"stage 1's adapter: {ADAPTER_1[:12]} → {seals.sha256(adapter(tmp_path, 1))[:12]}"]
    assert refusal(make_settings(tmp_path, 3)) == [
        f"{tmp_path}/out_stage2: stage 2 was trained on other earlier stages than those there are now; "
        f"train it again with python train.py --stage 2 --env-dir {tmp_path} --fresh"
    ]
    train(make_settings(tmp_path, 2), fresh=True)
    assert Stage.inspect(make_settings(tmp_path, 3)).decision == "fresh"


def adapter(root: Path, number: int) -> Path:
    return root / f"out_stage{number}" / "adapter_model.safetensors"


def test_a_removed_parent_of_a_parent_is_noticed(tmp_path):
    """Stage 2's adapter alone on the base would not be the model that was trained."""
    for number in (1, 2):
        train(make_settings(tmp_path, number))
    (tmp_path / "out_stage1").rename(tmp_path / "elsewhere")
    assert "stage 2 was trained on other earlier stages" in refusal(make_settings(tmp_path, 3))[0]


def train_whole_model(settings) -> None:
    with Stage.open(settings) as stage:
        stage.begin()
        (stage.folder / "config.json").write_text("{}")
        (stage.folder / "model-00001-of-00002.safetensors").write_bytes(b"a")
        (stage.folder / "model-00002-of-00002.safetensors").write_bytes(b"b")
        stage.complete()


def test_after_a_stage_that_trained_all_weights_the_lineage_starts_there(tmp_path):
    """Stage 4 starts from stage 2's model and stage 3's adapter; stage 1 may be gone."""
    train(make_settings(tmp_path, 1))
    train_whole_model(make_settings(tmp_path, 2, use_lora=0))
    train(make_settings(tmp_path, 3))
    stage = Stage.inspect(make_settings(tmp_path, 4))
    assert [(parent.stage, parent.kind) for parent in stage.parents] == [(2, "model"), (3, "adapter")]
    assert stage.start_model == str(tmp_path / "out_stage2")
    assert [parent.stage for parent in stage.adapters] == [3]
    (tmp_path / "out_stage1").rename(tmp_path / "elsewhere")  # it is in the whole model
    assert Stage.inspect(make_settings(tmp_path, 4)).warnings == []
    assert Stage.inspect(make_settings(tmp_path, 4)).decision == "fresh"


def test_what_a_merged_base_is_known_by_follows_the_lineage(tmp_path):
    """The base model's fingerprint, or the result of the last stage that trained all weights."""
    train(make_settings(tmp_path))
    base = model_fingerprint(str(tmp_path / "base"))
    assert Stage.inspect(make_settings(tmp_path, 2)).start_fingerprint == base
    train_whole_model(make_settings(tmp_path, 2, use_lora=0))
    stage = Stage.inspect(make_settings(tmp_path, 3))
    assert stage.start_fingerprint == f"model:{stage.parents[-1].adapter_sha256}"


# --- the manifest


def test_the_manifest_has_the_contracts_keys_from_begin_to_end(tmp_path):
    """All keys from the start, filled in as the stage goes."""
    settings = make_settings(tmp_path)
    with Stage.open(settings, processes=1) as stage:
        sources = [{"id": str(tmp_path / "rows.jsonl"), "split": "train", "weight": 1.0, "rows": 1, "drawn": 1}]
        stage.begin(sources=sources)
        begun = json.loads((stage.folder / "stage.json").read_text())
        add_adapter(stage.folder, b"adapter 1")
        stage.update(train_rows=1, mlflow_run_id="abc")
        stage.complete(steps=3, metrics={"eval_loss": 0.5})
    ended = json.loads((stage.folder / "stage.json").read_text())
    contract = (
        "stage status base_model parents settings sources train_rows val_rows dropped tokens steps metrics merge "
        "adapter_sha256 versions mlflow_run_id started finished"
    ).split()
    assert set(contract) <= set(begun) == set(ended)
    assert set(begun) - set(contract) == {"digest", "inputs", "replay"}
    assert (begun["status"], begun["finished"], begun["adapter_sha256"]) == ("running", None, None)
    assert (ended["status"], ended["adapter_sha256"], ended["steps"]) == ("complete", ADAPTER_1, 3)
    assert begun["settings"]["SFT_LORA_R"] == {"value": 16, "origin": "default"}
    assert ended["sources"] == [sources[0] | {"fingerprint": f"sha256:{seals.sha256(tmp_path / 'rows.jsonl')}"}]
    assert ended["started"] == begun["started"] <= ended["finished"]
    assert set(ended["versions"]) == {
        "python", "torch", "transformers", "peft", "trl", "datasets", "accelerate", "bitsandbytes"
    }  # fmt: skip
    assert ended["inputs"]["global batch"] == "16"


def test_a_resumed_stage_keeps_its_start_and_mlflow_run_and_the_metrics_up_to_its_checkpoint(tmp_path):
    """The line of step 30 goes, since step 20 is resumed."""
    settings = make_settings(tmp_path)
    with Stage.open(settings) as stage:
        stage.begin()
        stage.update(mlflow_run_id="abc", started="2025-01-31T00:00:00+00:00")
        for step in (0, 10, 20, 30):
            json_files.append_line(stage.folder / "metrics.jsonl", json.dumps({"step": step, "loss": 1.5}))
        add_checkpoint(stage.folder, 20)
    with Stage.open(settings) as stage:
        stage.begin()
    manifest = json.loads((stage.folder / "stage.json").read_text())
    assert (manifest["mlflow_run_id"], manifest["started"]) == ("abc", "2025-01-31T00:00:00+00:00")
    assert [record["step"] for record in json_files.read_records(stage.folder / "metrics.jsonl")] == [0, 10, 20]


def test_a_stage_without_weights_does_not_become_complete(tmp_path):
    """It fails instead."""
    with pytest.raises(RunFailed, match="holds no weights"), Stage.open(make_settings(tmp_path)) as stage:
        stage.begin()
        stage.complete()
    assert json.loads((stage.folder / "stage.json").read_text())["status"] == "failed"


def test_processes_beside_the_main_one_write_and_hold_nothing(tmp_path):
    """They see the same decision and checkpoint, and change no byte."""
    settings = make_settings(tmp_path)
    with Stage.open(settings) as main:
        main.begin()
        add_checkpoint(main.folder, 5)
        add_checkpoint(main.folder, 7, sealed=False)
        before = snapshot(tmp_path)
        with Stage.open(settings, main_process=False) as other:
            assert (other.decision, other.checkpoint) == ("resume", main.folder / "checkpoint-5")
            other.begin()
            other.update(train_rows=3)
            other.complete()
        assert snapshot(tmp_path) == before


def test_error_log_and_reason_hide_credentials(tmp_path):
    """Neither the password of an address nor a hub token reaches a file."""
    with Stage.open(make_settings(tmp_path)) as stage:
        stage.begin()
        stage.fail("can't reach https://me:secret@host/x")
        token = "hf_" + "".join(map(chr, range(97, 121)))  # put together here: no file holds one
        path = stage.write_error_log(f"Traceback\nhttps://me:secret@host/x\n{token}")
    assert path == stage.folder / "error.log"
    assert path.read_text() == "Traceback\nhttps://***@host/x\n***"
    assert json.loads((stage.folder / "stage.json").read_text())["error"] == "can't reach https://***@host/x"


def test_an_open_stage_is_held_and_given_back(tmp_path):
    """A second opening is refused until the first one ends."""
    settings = make_settings(tmp_path)
    with Stage.open(settings):
        assert "is in use by process" in Stage.inspect(settings).problems[0]
        with pytest.raises(Problems, match="is in use by process"):
            Stage.open(settings)
    with Stage.open(settings):
        pass


def test_leftovers_of_killed_processes_are_cleared_when_the_stage_is_opened(tmp_path):
    """Half-written folders of this stage go; those of another stage, whose maker may live, stay."""
    settings = make_settings(tmp_path)
    folder = killed(settings, checkpoint=5).folder
    (folder / "checkpoint-6.partial-999999").mkdir()
    (folder / "best_model.replaced-999999").mkdir()
    (tmp_path / "out_stage1_merged_base.partial-999999").mkdir()
    (tmp_path / "out_stage2_merged_base.partial-999999").mkdir()
    with Stage.open(settings):
        pass
    assert sorted(path.name for path in folder.iterdir()) == ["best_model", "checkpoint-5", "stage.json"]
    assert not (tmp_path / "out_stage1_merged_base.partial-999999").exists()
    assert (tmp_path / "out_stage2_merged_base.partial-999999").exists()


LADDER = """
import sys, time
from pathlib import Path
sys.path.insert(0, "tests")
from tests.ladders import add_checkpoint, add_adapter, make_settings
from sft.stages.checkpoints import rotate
from sft.stages.stage import Stage
settings = make_settings(Path(sys.argv[1]))
with Stage.open(settings) as stage:
    first = 1 + (int(stage.checkpoint.name.split("-")[1]) if stage.checkpoint else 0)
    stage.begin()
    print("begun", flush=True)
    for step in range(first, 61):
        add_checkpoint(stage.folder, step)
        rotate(stage.folder, 2)
        time.sleep(0.01)
    add_adapter(stage.folder, b"adapter")
    stage.complete()
"""


def test_a_stage_killed_again_and_again_ends_complete_with_nothing_lost(tmp_path):
    """Eight times kill -9 at different moments: the newest whole checkpoint is never lost, the last start finishes."""
    newest = 0
    for kill in range(9):
        arguments = [sys.executable, "-c", LADDER, str(tmp_path)]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
            assert process.stdout.readline() == "begun\n"
            if kill < 8:
                time.sleep(0.02 * kill)
                process.kill()
        stage = Stage.inspect(make_settings(tmp_path))
        assert stage.decision == ("resume" if kill < 8 else "complete")
        step = int(stage.checkpoint.name.split("-")[1]) if stage.checkpoint else 0
        assert step >= newest
        newest = step
    assert newest == 60


# --- fingerprints


def test_source_fingerprints(tmp_path):
    """A file by its content, a hub data set by its id and revision."""
    (tmp_path / "rows.jsonl").write_bytes(b"abc")
    sha = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert source_fingerprint(Source(id=str(tmp_path / "rows.jsonl"))) == f"sha256:{sha}"
    assert source_fingerprint(Source(id="org/rows")) == "hub:org/rows@main"
    assert source_fingerprint(Source(id="org/rows", revision="v2")) == "hub:org/rows@v2"


def test_model_fingerprints_see_changed_weights_without_reading_all_of_them(tmp_path):
    """17 MiB of weights: another training changes every block, of which 256 are read; notes beside don't count."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(17 << 20))
    first = model_fingerprint(str(tmp_path))
    (tmp_path / "README.md").write_text("x")
    assert model_fingerprint(str(tmp_path)) == first
    (tmp_path / "model.safetensors").write_bytes(b"\1" * (17 << 20))
    assert model_fingerprint(str(tmp_path)) != first
    assert model_fingerprint("org/model") == "hub:org/model@main"
    assert model_fingerprint("org/model", "abc") == "hub:org/model@abc"
