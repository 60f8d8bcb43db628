"""Variants of a stage: their names, which can be compared, the ranking, `--adopt` and `--drop-tries`, a whole try."""

import io
import json
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sft import cli, variants
from sft.errors import Problems
from sft.planning import disk
from sft.reporting.variants import variants_facts, variants_table, write_variants_report
from sft.settings import Settings, load_settings
from sft.settings.schema import NAMES
from sft.settings.variants import FREELY, TRIED, chosen, pairings, value_text, variant_name
from sft.stages import paths
from sft.stages.manifest import SettingRecord
from sft.stages.safety_copy import copy_finished, restore
from sft.stages.stage import Stage
from sft.stages.variants import differences, find_variants
from sft.storage.json_files import read_json
from tests.ladders import add_adapter, make_settings, train
from tests.stops import before, tell
from tests.tiny import run_train, write_model, write_rows, write_stage

# Names and values


@pytest.mark.parametrize(
    ("value", "text"),
    [(5e-5, "5e-5"), (0.00025, "2.5e-4"), (0.03, "0.03"), (3.0, "3"), (16, "16"), ("cosine", "cosine"), (True, "1")],
)
def test_a_value_has_one_text_however_it_was_written(value: object, text: str):
    """So that 0.00005 and 5e-5 are one variant, in one folder."""
    assert value_text(value) == text


def test_the_texts_of_values_are_read_back_as_the_values():
    """`--adopt` reads the settings again with them."""
    for value in (1e-5, 2.5e-4, 0.009999, 0.01, 0.1234567, 123456.0, 7e22):
        assert float(value_text(value)) == value


def test_a_person_may_name_a_variant_in_several_ways():
    """The whole name, the setting's own name, the value alone, pairs in any order; what is not there is nothing."""
    names = [variant_name({"SFT_LR": lr, "SFT_LORA_R": r}) for lr in (1e-5, 5e-5) for r in (8, 16)]
    assert names[0] == "lora_r=8+lr=1e-5"
    for text in ("lora_r=8+lr=1e-5", "lr=0.00001+lora_r=8", "SFT_LR=1e-5+SFT_LORA_R=8", "1e-5+8"):
        assert chosen(text, names) == [names[0]]
    assert chosen("0.00005", ["lr=1e-5", "lr=5e-5"]) == ["lr=5e-5"]
    assert chosen("8", ["lora_r=8", "grad_accum=8"]) == ["lora_r=8", "grad_accum=8"]
    assert chosen("1e-4", names) == []


def test_every_pair_of_values_is_a_variant():
    """Two names with two and three values: six, each a text of every name."""
    found, problems = pairings(["SFT_LR=1e-5, 5e-5", "SFT_LORA_R=8,16,32"], NAMES, [])
    assert problems == [] and len(found) == 6
    assert found[0] == ("SFT_LR=1e-5", "SFT_LORA_R=8") and found[-1] == ("SFT_LR=5e-5", "SFT_LORA_R=32")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("SFT_LRR=1", "did you mean SFT_LR?"),
        ("SFT_LR", "has no values"),
        ("SFT_LR=", "has no value"),
        ("SFT_LR=1e-5,,1e-4", "between two commas"),
        ("SFT_BASE_MODEL=a,b", "could not be compared"),
        ("SFT_SEED=1,2", "could not be compared"),
        ("SFT_VAL_RATIO=0.1,0.2", "could not be compared"),
        ("SFT_OUT_LORA_DIR=a,b", "could not be compared"),
        ("SFT_LORA_TARGET_MODULES=q_proj,v_proj", "is a list itself"),
        ("SFT_GRAD_ACCUM=2,4", "--set names it as well"),
    ],
)
def test_what_can_not_be_tried_is_refused_with_the_reason(text: str, reason: str):
    """Unknown names, missing values, and settings that change what variants are compared by."""
    found, problems = pairings([text], NAMES, ["SFT_GRAD_ACCUM=1"])
    assert found == [] and len(problems) == 1
    assert problems[0].startswith(f"--try {text.partition('=')[0]}") and reason in problems[0]


def test_what_may_be_tried_are_settings():
    """A setting that is renamed is renamed here as well."""
    assert NAMES.keys() >= TRIED


# Folders


def variant_of(settings: Settings, **tried: object) -> Settings:
    texts = [f"SFT_{name.upper()}={value}" for name, value in tried.items()]
    return load_settings(settings.stage, env_dir=settings.env_dir, tried=texts, environ={})


def options(settings: Settings, **given: object) -> SimpleNamespace:
    usual = {"stage": str(settings.stage), "env_dir": settings.env_dir, "overrides": [], "strict": False, "gate": False}
    none = {"tries": [], "adopt": None, "drop_tries": None, "check": False, "fresh": False, "json": False}
    return SimpleNamespace(**(usual | none | given))


@pytest.fixture
def tried(tmp_path: Path) -> Settings:
    """Stage 1 with two complete variants, without any training; the env file says 1e-4."""
    settings = make_settings(tmp_path, lr="1e-4", general_eval=0)
    for rate in ("1e-5", "5e-5"):
        train(variant_of(settings, lr=rate), b"adapter of %s" % rate.encode())
    return settings


def test_variants_lie_beside_the_stage_and_share_its_lock_and_merged_base(tmp_path: Path):
    """One process tree per stage, one merge for all of them."""
    settings = make_settings(tmp_path)
    stage = Stage.inspect(variant_of(settings, lr="5e-5"))
    assert stage.folder == tmp_path / "out_stage1.try-lr=5e-5"
    assert stage.merged_base == tmp_path / "out_stage1_merged_base"
    with Stage.open(settings), pytest.raises(Problems, match="in use by"):
        Stage.open(variant_of(settings, lr="1e-5"))


def test_a_complete_variant_is_complete_when_it_is_tried_again(tried: Settings):
    """And another value is a new one; the stage itself does not exist."""
    assert Stage.inspect(variant_of(tried, lr="0.00005")).decision == "complete"
    assert Stage.inspect(variant_of(tried, lr="1e-3")).decision == "fresh"
    assert Stage.inspect(tried).decision == "fresh"


def test_an_adopted_variant_is_the_stage(tried: Settings, capsys: pytest.CaptureFixture[str]):
    """Renamed with its manifest; with the value in the env file the stage is complete and the next one builds on it.
    Until then the refusal says which line to write."""
    variants.adopt_variant(options(tried, adopt="5e-5"))
    assert "Write SFT_LR=5e-5 into stage1.env; it is 1e-4 (stage1.env) so far" in capsys.readouterr().err
    folder = tried.env_dir / "out_stage1"
    assert (folder / paths.ADAPTER).read_bytes() == b"adapter of 5e-5"
    assert (folder / paths.REPORT).is_file()
    assert not (tried.env_dir / "out_stage1.try-lr=5e-5").exists()
    assert (tried.env_dir / "out_stage1.try-lr=1e-5" / paths.MANIFEST).is_file()
    refused = Stage.inspect(tried)
    assert refused.decision == "refuse" and "SFT_LR: 5e-05 → 0.0001" in refused.problems[0]
    assert "write SFT_LR=5e-5 into stage1.env; or python train.py --stage 1" in refused.problems[0]
    written = make_settings(tried.env_dir, lr="5e-5", general_eval=0)
    assert Stage.inspect(written).decision == "complete"
    assert [parent.stage for parent in Stage.inspect(make_settings(tried.env_dir, 2)).parents] == [1]
    assert [v.name for v in find_variants(folder, 1).values() if v.adopted] == ["lr=5e-5"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("7e-5", "no such variant; choose one of lr=1e-5, lr=5e-5"), ("lora_r=8", "no such variant")],
)
def test_adopting_what_is_not_there_names_what_is(tried: Settings, name: str, message: str):
    """And renames nothing."""
    with pytest.raises(Problems, match=message):
        variants.adopt_variant(options(tried, adopt=name))
    assert not (tried.env_dir / "out_stage1").exists()


def test_variants_are_in_the_safety_copy_and_so_is_the_adopted_one(tried: Settings):
    """A variant whose folder is gone is brought back as such, and OUT_stageN is there once a variant became it."""
    place = tried.env_dir.parent / f"{tried.env_dir.name}_safe"
    place.mkdir()
    settings = make_settings(tried.env_dir, lr="1e-4", general_eval=0, mirror=place)
    one = variant_of(settings, lr="1e-5")
    copy_finished(Stage.inspect(one))
    shutil.rmtree(tried.env_dir / "out_stage1.try-lr=1e-5")
    assert [sentence.partition(" from ")[0] for sentence in restore(one)] == [
        f"Restored {tried.env_dir / 'out_stage1.try-lr=1e-5'}"
    ]
    assert Stage.inspect(one).decision == "complete"
    variants.adopt_variant(options(settings, adopt="5e-5"))
    shutil.rmtree(tried.env_dir / "out_stage1")
    assert len(restore(settings)) == 1
    assert (tried.env_dir / "out_stage1" / paths.ADAPTER).read_bytes() == b"adapter of 5e-5"


def test_an_unfinished_variant_is_not_adopted(tried: Settings):
    """The command that goes on with it is named."""
    with Stage.open(variant_of(tried, lr="1e-3")) as stage:
        stage.begin()
    with pytest.raises(Problems, match=r"is running, not complete; python train.py .*--try SFT_LR=1e-3 goes on"):
        variants.adopt_variant(options(tried, adopt="1e-3"))


def test_a_variant_of_settings_that_have_changed_is_not_adopted(tried: Settings):
    """The same words as for any stage: adopting it would hide what it was trained with."""
    changed = make_settings(tried.env_dir, lr="1e-4", general_eval=0, epochs=3)
    with pytest.raises(Problems, match=r"SFT_EPOCHS: 1\.0 → 3\.0"):
        variants.adopt_variant(options(changed, adopt="5e-5"))


def test_a_stage_that_is_there_is_moved_aside_only_when_asked(tried: Settings):
    """--fresh, as everywhere; nothing is deleted."""
    train(tried, b"the stage")
    with pytest.raises(Problems, match="is there already; --adopt lr=5e-5 --fresh moves it aside"):
        variants.adopt_variant(options(tried, adopt="lr=5e-5"))
    variants.adopt_variant(options(tried, adopt="lr=5e-5", fresh=True))
    aside = list(tried.env_dir.glob("out_stage1.old-*"))
    assert [(folder / paths.ADAPTER).read_bytes() for folder in aside] == [b"the stage"]
    assert (tried.env_dir / "out_stage1" / paths.ADAPTER).read_bytes() == b"adapter of 5e-5"


def test_variants_are_dropped_by_name_all_or_none(tried: Settings):
    """A name too many drops nothing; what was adopted is the stage and stays."""
    with pytest.raises(Problems, match="no such variant"):
        variants.drop_variants(options(tried, drop_tries="1e-5,1e-3"))
    variants.adopt_variant(options(tried, adopt="5e-5"))
    with pytest.raises(Problems, match="was adopted"):
        variants.drop_variants(options(tried, drop_tries="1e-5,5e-5"))
    assert set(find_variants(tried.env_dir / "out_stage1", 1)) == {"lr=1e-5", "lr=5e-5"}
    variants.drop_variants(options(tried, drop_tries="1e-5"))
    assert not list(tried.env_dir.glob("out_stage1.try-*"))


def test_only_what_is_asked_the_same_is_compared(tried: Settings):
    """Another tried value or global batch is what variants differ by; another number of epochs is not."""
    manifests = [each.manifest for each in find_variants(tried.env_dir / "out_stage1", 1).values()]
    assert differences(*manifests) == []
    other = manifests[1].changed(inputs=manifests[1].inputs | {"global batch": "64"})
    assert differences(manifests[0], other) == []
    epochs = SettingRecord(value=2.0, origin="stage1.env")
    assert differences(
        manifests[0], other.model_copy(update={"settings": other.settings | {"SFT_EPOCHS": epochs}})
    ) == ["SFT_EPOCHS"]
    assert differences(manifests[0], other.changed(val_rows=7)) == ["val_rows"]


def test_more_than_eight_variants_are_asked_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On a terminal a question; elsewhere exit 2 with the count and how to go on. Eight go through."""
    ladder = [variant_of(make_settings(tmp_path), lora_r=r) for r in range(1, FREELY + 2)]
    variants.require_confirmed(ladder[:FREELY])
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    with pytest.raises(Problems, match=r"9 variants of stage 1 would be trained; .* at most 8 a command"):
        variants.require_confirmed(ladder)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    variants.require_confirmed(ladder)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    with pytest.raises(Problems, match="were not confirmed"):
        variants.require_confirmed(ladder)


def test_more_variants_than_disk_are_refused_with_how_many_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Three of 100 bytes with one merged base of 50: 350; of 260 free ones two fit."""
    stages = [Stage.inspect(variant_of(make_settings(tmp_path), lora_r=r)) for r in (1, 2, 3)]
    monkeypatch.setattr(disk, "needed_bytes", lambda *_: {"checkpoints": 60, "result": 40, "merged base": 50})
    monkeypatch.setattr(disk, "load_config", lambda _: None)
    monkeypatch.setattr(disk.atomic, "free_bytes", lambda _: 350)
    disk.require_space_for_all(stages)
    monkeypatch.setattr(disk.atomic, "free_bytes", lambda _: 260)
    with pytest.raises(Problems, match=r"3 variants .* enough for 2"):
        disk.require_space_for_all(stages)


# The ranking


def write_scores(folder: Path, scores: list[float], step: int = 4) -> None:
    lines = [json.dumps({"prompt": [{"role": "user", "content": "?"}], "answer": "a", "score": s}) for s in scores]
    (folder / f"gen_samples_step{step}.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture
def scored(tmp_path: Path) -> Settings:
    """Three variants with scores of 20 questions: one clearly worse, one a little, and validation losses."""
    settings = make_settings(tmp_path, general_eval=0)
    for rank, scores in {8: [0.0] * 18 + [1.0] * 2, 16: [1.0] * 15 + [0.0] * 5, 32: [1.0] * 14 + [0.0] * 6}.items():
        with Stage.open(variant_of(settings, lora_r=rank)) as stage:
            stage.begin(val_rows=2)
            add_adapter(stage.folder, b"adapter")
            write_scores(stage.folder, scores)
            (stage.folder / paths.ROW_LOSSES).write_text(json.dumps({"losses": [rank, 6.0], "tokens": [2.0, 4.0]}))
            matrix = {"models": ["base", "stage 1"], "tasks": ["stage 1"], "scores": [[0.25], [sum(scores) / 20]]}
            stage.complete(steps=4, metrics={"epoch": 1.0, "gen_score": sum(scores) / 20}, forgetting=matrix)
    return settings


def test_variants_are_ranked_by_their_answers_question_by_question(scored: Settings):
    """The difference to the best is paired: one question of 20 is no difference, thirteen are."""
    facts = variants_facts(list(find_variants(scored.env_dir / "out_stage1", 1).values()), 1)
    assert (facts["metric"], facts["questions"]) == ("gen_score", 20)
    assert [row["name"] for row in facts["variants"]] == ["lora_r=16", "lora_r=32", "lora_r=8"]
    best, near, far = (row["difference"] for row in facts["variants"])
    assert best is None
    assert near["mean"] == pytest.approx(-0.05) and not near["real"]
    assert far["mean"] == pytest.approx(-0.65) and far["real"]
    assert facts["lead"][0] == "Best: lora_r=16, gen_score 0.750."
    assert "Not to be told from it: lora_r=32:" in facts["lead"][1]
    assert [row["model"] for row in facts["matrix"]["rows"]] == ["base", "lora_r=16", "lora_r=32", "lora_r=8"]
    assert [row["cells"][0]["score"] for row in facts["matrix"]["rows"]] == [0.25, 0.75, 0.7, 0.1]
    table = variants_table(facts)
    assert table.splitlines()[2].split()[:2] == ["lora_r=16", "0.750"]
    assert "? holds 0: may be chance" in table


def test_without_scored_answers_the_loss_per_token_ranks_row_by_row(scored: Settings):
    """(8 + 6) / 6 trained tokens is the best eval_loss; lower is better."""
    for path in scored.env_dir.glob("out_stage1.try-*/gen_samples*"):
        path.unlink()
    facts = variants_facts(list(find_variants(scored.env_dir / "out_stage1", 1).values()), 1)
    assert (facts["metric"], facts["questions"]) == ("eval_loss", 2)
    assert [row["name"] for row in facts["variants"]] == ["lora_r=8", "lora_r=16", "lora_r=32"]
    assert [row["value"] for row in facts["variants"]] == pytest.approx([14 / 6, 22 / 6, 38 / 6])
    assert facts["variants"][1]["difference"]["mean"] == pytest.approx(8 / 6)


def test_what_can_not_be_compared_is_named(scored: Settings):
    """Variants that are not complete, or were trained under other settings, are left out of the ranking."""
    with Stage.open(variant_of(scored, lora_r=64)) as stage:
        stage.begin()
    longer = make_settings(scored.env_dir, general_eval=0, epochs=2)
    train(variant_of(longer, lora_r=128))
    facts = variants_facts(list(find_variants(scored.env_dir / "out_stage1", 1).values()), 1)
    assert len(facts["variants"]) + len(facts["left_out"]) == 5
    assert "lora_r=64: running" in facts["left_out"]


@pytest.mark.parametrize(("language", "words"), [("en", "Variants of stage 1"), ("ja", "ステージ1の比較試行")])
def test_the_page_of_the_variants(scored: Settings, language: str, words: str):
    """One page with links to each report, the ranking and the matrix rows, and the same facts beside it."""
    target = paths.variants_report(scored.env_dir / "out_stage1")
    found = list(find_variants(scored.env_dir / "out_stage1", 1).values())
    facts = write_variants_report(found, target, 1, language)
    text = target.read_text(encoding="utf-8")
    assert words in text and 'href="out_stage1.try-lora_r%3D16/report.html"' in text
    assert "http" not in text.replace("http://www.w3.org", "")
    assert read_json(target.with_suffix(".json"))["variants"] == facts["variants"]


# A whole try


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 1 is trained; stage 2 has validation rows and no generation evaluation."""
    folder = tmp_path_factory.mktemp("try")
    common = {
        "SFT_BASE_MODEL": write_model(folder / "base"), "SFT_OUT_LORA_DIR": folder / "out", "SFT_MAX_STEPS": 4,
        "SFT_NUM_GENERATE_SAMPLES": 0,
    }  # fmt: skip
    write_stage(folder, 1, common | {"SFT_DATASET_ID": write_rows(folder / "json.jsonl", 40)})
    write_stage(folder, 2, common | {"SFT_DATASET_ID": write_rows(folder / "yaml.jsonl", 60, target="yaml")})
    write_stage(folder, 3, common | {"SFT_DATASET_ID": folder / "json.jsonl"})
    assert run_train("--stage", 1, "--env-dir", folder) == 0
    return folder


@pytest.mark.slow
def test_check_shows_every_variant_shortly_and_lists_what_is_wrong(ladder: Path, capsys: pytest.CaptureFixture[str]):
    """A line each, one document each with --json; a value the setting refuses, and a stage too many, are exit 2."""
    command = ["--stage", 2, "--env-dir", ladder, "--check"]
    assert run_train(*command, "--try", "SFT_LR=1e-3,1e-2") == 0
    shown = capsys.readouterr().out
    assert [line.split()[:2] for line in shown.splitlines() if line.startswith("lr=")] == [
        ["lr=1e-3", "fresh"],
        ["lr=0.01", "fresh"],
    ]
    assert run_train(*command, "--json", "--try", "SFT_LR=1e-3,1e-2") == 0
    documents = json.loads(capsys.readouterr().out)
    assert [each["settings"]["SFT_LR"] for each in documents] == [
        {"value": 1e-3, "origin": "--try"},
        {"value": 1e-2, "origin": "--try"},
    ]
    assert run_train(*command, "--try", "SFT_LR=1e-3,-1") == 2
    assert "SFT_LR=-1: is out of range; give more than 0 (--try)" in capsys.readouterr().err
    assert run_train("--stage", "all", "--env-dir", ladder, "--try", "SFT_LR=1e-3") == 2
    assert "--try: varies one stage" in capsys.readouterr().err
    assert run_train(*command, "--try", "SFT_LR=1e-3,0.001") == 2
    assert "lr=1e-3 is named twice" in capsys.readouterr().err
    assert run_train(*command, "--try", "SFT_LR=1e-3", "--set", "SFT_VAL_RATIO=0") == 2
    assert "nothing to be ranked by" in capsys.readouterr().err
    assert not list(ladder.glob("out_stage2*"))


@pytest.mark.slow
def test_a_try_from_start_to_the_next_stage(ladder: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    """Stopped in the second of three variants, gone on with by the same command, one of them failing: the others are
    ranked, exit 1. What is complete is not trained again, the base is merged once, the result of the stopped variant is
    that of an undisturbed one, and the adopted one is the stage: complete, and what stage 3 is made from."""
    command = ["--stage", 2, "--env-dir", ladder, "--try", "SFT_LR=1e-3,1e30,1e-2"]
    rates = {name: ladder / f"out_stage2.try-lr={name}" for name in ("1e-3", "0.01", "1e+30")}
    with monkeypatch.context() as patched:
        place = "sft.training.trainer.StagedTrainer._save_checkpoint"
        before(patched, place, lambda: tell(signal.SIGTERM), lambda self, *_: "0.01" in str(self.folder))
        assert run_train("--stage", 2, "--env-dir", ladder, "--try", "SFT_LR=1e-3,1e-2") == 143
    merged = ladder / "out_stage2_merged_base" / "model.safetensors"
    when = merged.stat().st_mtime_ns
    first = (rates["1e-3"] / "stage.json").read_bytes()
    assert json.loads((rates["0.01"] / "stage.json").read_text())["status"] == "running"
    capsys.readouterr()
    assert run_train(*command) == 1
    shown = capsys.readouterr()
    assert "Variant lr=1e-3: complete already" in shown.err
    assert "Found latest checkpoint: checkpoint-2" in shown.out + shown.err
    assert "Variant lr=1e+30 failed; the others go on" in shown.err
    assert "Not compared: lr=1e+30: failed" in shown.out
    assert merged.stat().st_mtime_ns == when and (rates["1e-3"] / "stage.json").read_bytes() == first
    manifests = [json.loads((rates[name] / "stage.json").read_text()) for name in ("1e-3", "0.01")]
    assert manifests[0]["merge"]["kl"] == manifests[1]["merge"]["kl"]
    ranked = read_json(ladder / "out_stage2.tries.json")
    assert ranked["metric"] == "eval_loss" and ranked["questions"] == 6
    losses = {"lr=1e-3": manifests[0]["metrics"]["eval_loss"], "lr=0.01": manifests[1]["metrics"]["eval_loss"]}
    assert {row["name"]: row["value"] for row in ranked["variants"]} == pytest.approx(losses, rel=1e-6)
    out = ladder / "direct"
    assert run_train("--stage", 1, "--env-dir", ladder, "--set", f"SFT_OUT_LORA_DIR={out}") == 0
    assert run_train("--stage", 2, "--env-dir", ladder, "--set", f"SFT_OUT_LORA_DIR={out}") == 0
    own = (rates["0.01"] / paths.ADAPTER).read_bytes()
    assert own == (ladder / "direct_stage2" / paths.ADAPTER).read_bytes()
    assert run_train("--stage", 2, "--env-dir", ladder, "--adopt", "1e-2") == 0
    assert run_train("--stage", 2, "--env-dir", ladder) == 0
    assert "Training has already been completed" in "".join(capsys.readouterr())
    assert run_train("--stage", 3, "--env-dir", ladder) == 0
    assert (ladder / "out_stage2" / paths.ADAPTER).read_bytes() == own


@pytest.mark.slow
def test_two_names_and_values_under_one_launcher(tmp_path: Path):
    """Two processes step through the variants together; each has the whole global batch of its settings."""
    from tests.launching import run

    write_stage(tmp_path, 1, {
        "SFT_BASE_MODEL": write_model(tmp_path / "base"), "SFT_DATASET_ID": write_rows(tmp_path / "json.jsonl", 40),
        "SFT_OUT_LORA_DIR": tmp_path / "out", "SFT_MAX_STEPS": 2,
    })  # fmt: skip
    command = ["--stage", 1, "--env-dir", tmp_path, "--try", "SFT_LR=1e-3,1e-2"]
    code, text = run("ddp", tmp_path / "mark", *command)
    assert code == 0, text[-3000:]
    assert [row["steps"] for row in read_json(tmp_path / "out_stage1.tries.json")["variants"]] == [2, 2]
    code, text = run("ddp", tmp_path / "mark2", *command)
    assert code == 0 and text.count("complete already") == 2, text[-3000:]


def test_help_names_the_options():
    """What people type is listed."""
    text = cli.parser().format_help()
    for option in ("--try", "--adopt", "--drop-tries"):
        assert option in text
