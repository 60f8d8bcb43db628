"""What counts as a change: content, by the place in the settings; never a path, never a file that nobody loads."""

import json
from pathlib import Path

import pytest

from sft.errors import Problems
from sft.settings import Settings, Source
from sft.settings.rules import resume_neutral
from sft.stages import fingerprints
from sft.stages.fingerprints import is_same, model_fingerprint, source_fingerprint
from sft.stages.stage import Stage
from tests.ladders import add_adapter, add_checkpoint, make_settings, train

ONE, TWO = "1" * 40, "2" * 40


def rows(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"prompt": "a", "completion": text}) + "\n")
    return path


def mixed(root: Path, *names: str, **values: object) -> Settings:
    """A stage on these files of `root`, in this order."""
    sources = [name if isinstance(name, dict) else {"id": str(root / name)} for name in names]
    return make_settings(root, dataset_mix=json.dumps(sources), **values)


def partly_trained(settings: Settings, **facts: object) -> Stage:
    with Stage.open(settings) as stage:
        stage.begin(**facts)
        add_checkpoint(stage.folder, 10)
    return stage


def test_a_stage_with_a_checkpoint_refuses_when_a_source_is_gone_and_a_complete_one_warns(tmp_path):
    """It would go on with another mix (trust H1); what is complete needs its data no more."""
    for name in ("a.jsonl", "b.jsonl"):
        rows(tmp_path / name, name)
    settings = mixed(tmp_path, "a.jsonl", "b.jsonl")
    partly_trained(settings)
    (tmp_path / "b.jsonl").rename(tmp_path / "elsewhere.jsonl")
    stage = Stage.inspect(settings)
    assert stage.decision == "refuse"
    assert [text.split(" content ")[0] for text in stage.changed] == [f"data {tmp_path / 'b.jsonl'}:"]
    assert stage.changed[0].endswith("→ not there")
    (tmp_path / "elsewhere.jsonl").rename(tmp_path / "b.jsonl")
    assert Stage.inspect(settings).decision == "resume"
    train(settings)
    (tmp_path / "b.jsonl").unlink()
    stage = Stage.inspect(settings)
    assert (stage.decision, stage.warnings) == (
        "complete",
        [f"[WARNING] {tmp_path / 'b.jsonl'} is gone: not compared with what was trained on"],
    )


@pytest.mark.parametrize("name", ["eval_dataset", "gen_eval_dataset"])
def test_a_stage_with_a_checkpoint_refuses_when_a_validation_set_is_gone(tmp_path, name):
    """Its rows would be trained on, or the best model chosen by others."""
    for each in ("v.jsonl", "w.jsonl"):
        rows(tmp_path / each, each)
    both = json.dumps([{"id": str(tmp_path / each)} for each in ("v.jsonl", "w.jsonl")])
    settings = make_settings(tmp_path, **{name: both})
    partly_trained(settings)
    (tmp_path / "w.jsonl").unlink()
    stage = Stage.inspect(settings)
    assert stage.decision == "refuse"
    assert [text.split(":")[0] for text in stage.changed] == [f"SFT_{name.upper()} {tmp_path / 'w.jsonl'}"]


def test_a_source_that_appears_or_changes_beside_a_missing_one_is_a_change(tmp_path):
    """One record per source, by its place in the settings, whatever could be loaded (trust H2)."""
    rows(tmp_path / "a.jsonl", "a")
    settings = mixed(tmp_path, "b.jsonl", "a.jsonl")
    with Stage.open(settings) as stage:
        counted = {"id": str(tmp_path / "a.jsonl"), "split": "train", "weight": 1.0, "rows": 1, "drawn": 1}
        stage.begin(sources=[counted | {"fingerprint": "of the cache"}])
        add_adapter(stage.folder, b"x")
        stage.complete()
    records = json.loads((stage.folder / "stage.json").read_text())["sources"]
    assert [(Path(r["id"]).name, r["rows"], r["fingerprint"] is None) for r in records] == [
        ("b.jsonl", 0, True),
        ("a.jsonl", 1, False),
    ]
    assert Stage.inspect(settings).decision == "complete"
    rows(tmp_path / "b.jsonl", "b")
    (change,) = Stage.inspect(settings).changed
    assert change.startswith(f"data {tmp_path / 'b.jsonl'}: content not there → sha256:")
    (tmp_path / "b.jsonl").unlink()
    rows(tmp_path / "a.jsonl", "other")
    assert [text.split(":")[0] for text in Stage.inspect(settings).changed] == [f"data {tmp_path / 'a.jsonl'}"]


def test_a_stage_of_before_whose_missing_source_was_not_listed_is_compared_all_the_same(tmp_path):
    """Manifests of earlier versions list only what was loaded."""
    rows(tmp_path / "a.jsonl", "a")
    settings = mixed(tmp_path, "b.jsonl", "a.jsonl")
    stage = train(settings)
    from tests.test_stages import rewrite_manifest

    listed = json.loads((stage.folder / "stage.json").read_text())["sources"]
    rewrite_manifest(stage.folder, sources=listed[1:])
    assert Stage.inspect(settings).decision == "complete"
    rows(tmp_path / "a.jsonl", "other")
    assert len(Stage.inspect(settings).changed) == 1


def test_what_moved_is_the_same_and_what_changed_is_not(tmp_path):
    """Data, validation rows, template, base model and output on another disk: nothing has changed."""
    here, there = tmp_path / "a", tmp_path / "b"
    here.mkdir()

    def settings(root: Path) -> Settings:
        return make_settings(
            root,
            dataset_mix=json.dumps([{"id": str(root / "m.jsonl"), "weight": 2.0}, {"id": str(root / "n.jsonl")}]),
            eval_dataset=root / "v.jsonl",
            gen_eval_dataset=root / "g.jsonl",
            chat_template=root / "chat.jinja",
        )

    for name in "mnvg":
        rows(here / f"{name}.jsonl", name)
    (here / "chat.jinja").write_text("x")
    train(settings(here))
    here.rename(there)
    assert Stage.inspect(settings(there)).changed == []
    assert Stage.inspect(settings(there)).decision == "complete"
    rows(there / "n.jsonl", "other")
    (there / "chat.jinja").write_text("y")
    assert [text.split(":")[0] for text in Stage.inspect(settings(there)).changed] == [
        "SFT_CHAT_TEMPLATE",
        "SFT_DATASET_MIX",
    ]


def test_a_killed_stage_goes_on_from_another_disk(tmp_path):
    """The single data set of SFT_DATASET_ID under another path."""
    partly_trained(make_settings(tmp_path / "a"))
    (tmp_path / "a").rename(tmp_path / "b")
    stage = Stage.inspect(make_settings(tmp_path / "b"))
    assert (stage.decision, stage.changed) == ("resume", [])


def test_another_content_under_another_name_names_both(tmp_path):
    """The setting, both paths and both digests."""
    train(make_settings(tmp_path))
    other = rows(tmp_path / "other.jsonl", "other")
    (change,) = Stage.inspect(make_settings(tmp_path, dataset_id=other)).changed
    assert change.startswith(f"SFT_DATASET_ID: {tmp_path / 'rows.jsonl'} → {other} (content sha256:")


@pytest.mark.parametrize("option", [{"weight": 3.0}, {"limit": 1}, {"split": "test"}, {"columns": {"prompt": "q"}}])
def test_other_options_of_a_source_are_a_change(tmp_path, option):
    """The rows of the stage would be others although the file is the same."""
    source = {"id": str(rows(tmp_path / "a.jsonl", "a"))}
    train(mixed(tmp_path, source))
    (change,) = Stage.inspect(mixed(tmp_path, source | option)).changed
    assert change.startswith(f"data {tmp_path / 'a.jsonl'}: {next(iter(option))} ")


def test_sources_in_another_order_or_number_are_a_change(tmp_path):
    """The draw goes by the place of a source."""
    for name in ("a.jsonl", "b.jsonl"):
        rows(tmp_path / name, name)
    train(mixed(tmp_path, "a.jsonl", "b.jsonl"))
    assert len(Stage.inspect(mixed(tmp_path, "b.jsonl", "a.jsonl")).changed) == 2
    assert len(Stage.inspect(mixed(tmp_path, "a.jsonl")).changed) == 1


def test_two_revisions_of_one_data_set_are_kept_apart(tmp_path):
    """The same hub id twice: each has its own record (house.md, section 8)."""
    settings = mixed(tmp_path, {"id": "org/rows", "revision": ONE}, {"id": "org/rows", "revision": TWO})
    stage = train(settings)
    records = json.loads((stage.folder / "stage.json").read_text())["sources"]
    assert [record["fingerprint"] for record in records] == [f"hub:org/rows@{ONE}", f"hub:org/rows@{TWO}"]
    assert Stage.inspect(settings).decision == "complete"


def test_a_hub_data_set_is_known_by_the_commit_that_its_branch_stands_at(tmp_path, monkeypatch):
    """As far as it can be known: the cache's word without a network, the branch's name without either."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    settings = mixed(tmp_path, {"id": "org/rows"})
    assert source_fingerprint(Source(id="org/rows")) == "hub:org/rows@main"
    reference = tmp_path / "hub" / "datasets--org--rows" / "refs" / "main"
    reference.parent.mkdir(parents=True)
    reference.write_text(ONE)
    assert source_fingerprint(Source(id="org/rows")) == f"hub:org/rows@{ONE}"
    train(settings)
    reference.write_text(TWO)
    assert len(Stage.inspect(settings).changed) == 1
    reference.unlink()
    assert Stage.inspect(settings).decision == "complete"


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        (None, None, True),
        ("sha256:1", None, False),
        ("sha256:1", "sha256:1", True),
        (f"hub:a/b@{ONE}", f"hub:a/b@{TWO}", False),
        (f"hub:a/b@{ONE}", "hub:a/b@main", True),
        ("hub:a/b@main", "hub:a/b@v2", False),
        (f"hub:a/b@{ONE}", "hub:a/c@main", False),
        (None, "hub:a/b@main", True),
        (None, f"hub:a/b@{ONE}", False),
    ],
)
def test_what_is_not_known_is_no_difference(old, new, same):
    """A commit that can't be found out is neither equal nor other; the id beside it is compared."""
    assert is_same(old, new) is same
    assert is_same(new, old) is same


def test_other_counts_than_the_checkpoint_was_trained_on_are_refused(tmp_path):
    """A hub data set out of reach, other libraries: whatever the cause, the rows would be others."""
    settings = make_settings(tmp_path)
    source = {"id": str(tmp_path / "rows.jsonl"), "split": "train", "weight": 1.0, "rows": 40, "drawn": 40}
    facts = {"sources": [source], "train_rows": 38, "val_rows": 2, "tokens": {"total": 900, "trained": 300}}
    folder = partly_trained(settings, **facts).folder
    before = (folder / "stage.json").read_bytes()
    with Stage.open(settings) as stage, pytest.raises(Problems) as refused:
        stage.begin(**facts | {"train_rows": 30, "sources": [source | {"rows": 32, "drawn": 32}]})
    assert refused.value.problems[0].splitlines() == [
        f"{folder}: stage 1 was partly trained on other rows than there are now:",
        "  train_rows: 38 → 30",
        f"  data {tmp_path / 'rows.jsonl'}: 40 rows → 32 rows",
        f"  bring back what is different, or python train.py --stage 1 --env-dir {tmp_path} --fresh moves it aside and "
        "trains again",
    ]
    assert (folder / "stage.json").read_bytes() == before
    with Stage.open(settings) as stage:
        stage.begin(**facts)
    with Stage.open(settings) as stage, pytest.raises(Problems, match="tokens: 900"):
        stage.begin(**facts | {"tokens": {"total": 901, "trained": 300}})


def test_what_is_evaluated_may_change_when_a_stage_goes_on(tmp_path):
    """A metric that can't be computed must not lose what was trained (trust H4); a complete stage keeps its best."""
    wrong = {"gen_eval": "structured", "metric_for_best": "gen_score", "eval_steps": 5}
    right = {"gen_eval": "samples", "metric_for_best": "eval_loss", "eval_steps": 7}
    partly_trained(make_settings(tmp_path, **wrong))
    assert Stage.inspect(make_settings(tmp_path, **right)).decision == "resume"
    train(make_settings(tmp_path, **wrong))
    assert Stage.inspect(make_settings(tmp_path, **right)).decision == "refuse"


@pytest.mark.parametrize("decides", [{"early_stopping_patience": 2}, {"lr_scheduler": "reduce_lr_on_plateau"}])
def test_what_is_evaluated_may_not_change_where_it_decides_the_training(tmp_path, decides):
    """Early stopping and schedulers that go by the loss."""
    partly_trained(make_settings(tmp_path, eval_steps=5, **decides))
    assert Stage.inspect(make_settings(tmp_path, eval_steps=7, **decides)).changed == ["SFT_EVAL_STEPS: 5 → 7"]
    assert resume_neutral({"SFT_EARLY_STOPPING_PATIENCE": 2}, {}) == frozenset()


def test_remedies_carry_the_env_dir_and_the_overrides(tmp_path):
    """A copied command acts on this ladder, not on that of the current folder."""
    from sft.settings import load_settings

    make_settings(tmp_path)
    token = "hf_" + "".join(map(chr, range(97, 121)))  # put together here: no file holds one
    overrides = [f"SFT_OUT_LORA_DIR={tmp_path}/my out", f"SFT_RUN_NAME={token}"]
    settings = load_settings(1, env_dir=tmp_path, overrides=overrides, environ={})
    train(settings)
    changed = load_settings(1, env_dir=tmp_path, overrides=[*overrides, "SFT_LR=2e-4"], environ={})
    assert Stage.inspect(changed).problems[0].splitlines()[-1] == (
        f"  python train.py --stage 1 --env-dir {tmp_path} --set 'SFT_OUT_LORA_DIR={tmp_path}/my out' "
        "--set 'SFT_RUN_NAME=***' --set SFT_LR=2e-4 --fresh moves it aside and trains again"
    )


def test_files_of_a_data_folder_that_nobody_reads_do_not_matter(tmp_path):
    """A folder written by save_to_disk, and one of plain files; a glob is its files."""
    saved, plain = tmp_path / "saved", tmp_path / "plain"
    for path in (saved / "state.json", saved / "data-0.arrow", plain / "1.jsonl", plain / "2.jsonl"):
        rows(path, path.name)
    places = [Source(id=str(saved)), Source(id=str(plain)), Source(id=str(plain / "*.jsonl"))]
    before = [source_fingerprint(place) for place in places]
    for path in (saved / "notes.json", saved / "cache-1.arrow", saved / "README.md", plain / "README.md"):
        rows(path, "new")
    assert [source_fingerprint(place) for place in places] == before
    rows(saved / "data-0.arrow", "new")
    rows(plain / "2.jsonl", "new")
    assert not set(before) & {source_fingerprint(place) for place in places}
    assert source_fingerprint(Source(id=str(plain / "*.csv"))) is None


def test_files_of_a_base_model_that_nobody_loads_do_not_matter_and_its_code_does(tmp_path):
    """Notes beside the weights are nobody's; *.py counts where the configuration names code, pickles without better."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")

    def known() -> str:
        return model_fingerprint(str(tmp_path))

    first = known()
    for name in ("notes.txt", "eval_results.json", "helper.py", "pytorch_model.bin", "training_args.bin"):
        (tmp_path / name).write_text("new")
        assert known() == first, name
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoModelForCausalLM": "helper.Own"}}')
    second = known()
    (tmp_path / "helper.py").write_text("other code")
    assert len({first, second, known()}) == 3
    third = known()
    (tmp_path / "chat_template.jinja").write_text("x")
    assert known() != third
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_text("a")
    fourth = known()
    (tmp_path / "pytorch_model.bin").write_text("b")
    assert known() != fourth
    assert fingerprints.is_unresolved(model_fingerprint("org/model"))
