"""SFT_REPLAY: rows of earlier stages come again: as many as asked for, never a validation row, from what it was."""

import json
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from sft.data.chosen import REPLAYED
from sft.data.mixture import Mix, mix
from sft.data.replay import replayed_rows
from sft.data.taught import Taught
from sft.errors import Problems
from sft.settings import Settings, load_settings
from sft.settings.schema import NAMES
from sft.stages.taught import taught_before
from sft.training.batches import blocks_of, packs_of
from tests import ladders, launching
from tests.test_mixture import answers, labelled, texts
from tests.test_plan import run_check
from tests.tiny import metric_lines, run_train, write_model, write_rows, write_stage


def of_stage(stage: int, rows: list[Any], settings: Settings) -> tuple[Taught, list[Any]]:
    return Taught(stage, tuple(each.source for each in rows), settings), rows


def again(mixed: Mix) -> list[int]:
    """The numbers of the replayed rows in their own source, in the order they are trained in."""
    pairs = zip(mixed.train["source"], mixed.train["row"], strict=True)
    return [row for source, row in pairs if source == REPLAYED]


@pytest.mark.parametrize(
    ("own", "share", "expected"),
    [(950, 0.05, 50), (990, 0.01, 10), (900, 0.1, 100), (100, 0.5, 100), (10, 0.001, 1), (1, 0.9, 9)],
)
def test_the_share_is_one_of_the_final_mix(own: int, share: float, expected: int):
    """50 beside 950 are 5 % of 1000; a share of a row is a row."""
    assert replayed_rows(own, share) == expected


def test_the_rows_line_adds_up_with_upsampling_and_replay(make_settings: Any):
    """100 drawn, 80 more by a rule, and 20 again: 10 % of 200 - with the share of the final mix, not of the drawn."""
    settings = make_settings(
        val_ratio=0.0, replay=0.1, use_upsampling=True, upsample_rules={"text_to_toml": 2.0, "csv_to_json": 1.0}
    )
    keys = ["text_to_toml"] * 80 + ["csv_to_json"] * 20
    before = of_stage(1, [labelled(texts(60, "b"), id="old/first.jsonl")], make_settings(val_ratio=0.0))
    mixed = mix([labelled(texts(100), task_keys=keys, id="new.jsonl")], settings, taught=[before])
    assert mixed.rows_in_words() == (
        "200 to train (new.jsonl 100; upsampling +80 + 20 replayed from stage 1), 0 to validate"
    )
    assert mixed.replay == [{"stage": 1, "rows": 20, "available": 60, "sources": ["old/first.jsonl"]}]
    assert len(mixed.train) == 200
    assert len(again(mixed)) == len(set(again(mixed))) == 20
    assert mixed.tokens["total"] == 2 * 200


def test_own_rows_are_those_without_replay(make_settings: Any):
    """Replay adds: which rows of its own a stage is trained on, and what it is validated on, stays."""
    rows = [labelled(texts(200))]
    plain = mix(rows, make_settings(val_ratio=0.1))
    before = of_stage(1, [labelled(texts(50, "b"))], make_settings(val_ratio=0.1))
    mixed = mix(rows, make_settings(val_ratio=0.1, replay=0.2), taught=[before])
    own = [row for source, row in zip(mixed.train["source"], mixed.train["row"], strict=True) if source != REPLAYED]
    assert sorted(own) == sorted(plain.train["row"])
    assert answers(mixed.val) == answers(plain.val)
    assert (mixed.sources, mixed.names) == (plain.sources, plain.names)


def test_each_stage_gives_the_same_number_and_short_ones_give_rows_several_times(make_settings: Any):
    """Of 100 rows beside 100 stage 1 (1,000 rows) and stage 2 (20 rows) give 50 each."""
    settings = make_settings(val_ratio=0.0, replay=0.5)
    taught = [of_stage(1, [labelled(texts(1000, "b"))], settings), of_stage(2, [labelled(texts(20, "c"))], settings)]
    mixed = mix([labelled(texts(100))], settings, taught=taught)
    assert [(each["stage"], each["rows"], each["available"]) for each in mixed.replay] == [(1, 50, 1000), (2, 50, 20)]
    said = "200 to train (source 100 + 50 replayed from stage 1 + 50 replayed from stage 2), 0 to validate"
    assert mixed.rows_in_words() == said


def test_rows_come_as_the_earlier_stage_drew_them(make_settings: Any):
    """Its weights and rules: of two sources at 1 : 3 that rule doubles, about a quarter and three quarters come."""
    earlier = make_settings(val_ratio=0.0, dataset_mix_total_size=400)
    sources = [labelled(texts(400, "b"), id="b"), labelled(texts(400, "c"), id="c", weight=3.0)]
    trained = Counter(mix(sources, earlier).train["source"])
    assert trained == {0: 100, 1: 300}
    settings = make_settings(val_ratio=0.0, replay=0.5)
    mixed = mix([labelled(texts(400))], settings, taught=[of_stage(1, sources, earlier)])
    # All 400 rows that were trained on come once, so that which source each is from is known exactly.
    places = Counter(again(mixed))
    exact = Counter(mix(sources, earlier).train["row"])
    assert places == exact


def test_no_validation_row_comes_again(make_settings: Any):
    """Neither one of the earlier stage, nor of this one, nor a question of either: both have the same data here."""
    earlier = make_settings(val_ratio=0.2, seed=5)
    shared = labelled(texts(100))
    first = mix([shared], earlier)
    settings = make_settings(val_ratio=0.2, seed=6, replay=0.9)
    questions = {"a question of an earlier stage": first.held}
    mixed = mix([shared], settings, questions=questions, taught=[of_stage(1, [shared], earlier)])
    trained = {texts(100)[row] for row in mixed.train["row"]}
    assert len(answers(first.val)) == len(answers(mixed.val)) == 20
    assert not trained & {*answers(first.val), *answers(mixed.val)}
    assert mixed.replay[0]["available"] == len(set(again(mixed)))


def test_the_same_seed_gives_the_same_rows_in_the_same_order(make_settings: Any):
    """Whatever was drawn before from numpy; another seed gives others."""
    before = labelled(texts(300, "b"))

    def drawn(seed: int) -> list[int]:
        settings = make_settings(val_ratio=0.0, replay=0.1, seed=seed)
        return again(mix([labelled(texts(200))], settings, taught=[of_stage(1, [before], make_settings())]))

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


@pytest.mark.parametrize("shuffle", ["none", "sources"])
def test_where_an_order_is_kept_they_are_spread_over_it(make_settings: Any, shuffle: str):
    """Every tenth row or so, in whatever order the own rows stand; they stay where they stand in every epoch, and no
    block of a source is cut in two by them."""
    settings = make_settings(val_ratio=0.0, replay=0.1, shuffle=shuffle, dataset_mix_total_size=90, packing=True)
    before = of_stage(1, [labelled(texts(50, "c"))], make_settings(val_ratio=0.0))
    mixed = mix([labelled(texts(45)), labelled(texts(45, "b"))], settings, taught=[before])
    sources = mixed.train["source"]
    places = [place for place, source in enumerate(sources) if source == REPLAYED]
    assert len(places) == 10
    assert {after - before for before, after in pairwise(places)} == {10}
    own = [source for source in sources if source != REPLAYED]
    assert own == [0] * 45 + [1] * 45
    blocks = blocks_of(mixed.train, settings)
    assert blocks is not None
    if shuffle == "sources":
        assert blocks.tolist() == [0] * (45 + 5) + [1] * (45 + 5)
        assert max(map(len, packs_of(mixed.train, settings) or [])) > 10


def test_nothing_left_of_a_stage_is_a_problem(make_settings: Any):
    """All its rows are asked: said by name, with a way out."""
    first = labelled(texts(10, "b"))
    questions = {"a question of an earlier stage": first.dataset["content_hash"][:]}
    settings = make_settings(val_ratio=0.0, replay=0.1)
    with pytest.raises(Problems, match=r"SFT_REPLAY=0\.1: no row of stage 1 can be trained on here: all of them"):
        mix([labelled(texts(10))], settings, questions=questions, taught=[of_stage(1, [first], settings)])


# What earlier stages were trained on, by their manifests


def rows_file(path: Path, count: int = 3) -> Path:
    return write_rows(path, count)


def trained_ladder(folder: Path, **first: object) -> Settings:
    """A stage 1 that is complete, and the settings of a stage 2 that replays it."""
    one = rows_file(folder / "one.jsonl")
    ladders.train(ladders.make_settings(folder, dataset_id=one, **first))
    return ladders.make_settings(folder, 2, replay=0.05)


def test_sources_and_draw_are_those_of_the_manifest(tmp_path: Path):
    """Whatever stage1.env says by now; what is not about drawing is this stage's."""
    mixing = json.dumps([{"id": str(rows_file(tmp_path / "two.jsonl")), "weight": 2.0, "limit": 2, "repeat": 1.5}])
    settings = trained_ladder(tmp_path, dataset_mix=mixing, seed=9, val_ratio=0.25, max_seq_len=99)
    (tmp_path / "stage1.env").unlink()
    (found,) = taught_before(settings)
    assert found.stage == 1
    assert [(s.id, s.weight, s.limit, s.repeat) for s in found.sources] == [(str(tmp_path / "two.jsonl"), 2.0, 2, 1.5)]
    assert (found.settings.seed, found.settings.val_ratio) == (9, 0.25)
    assert (found.settings.max_seq_len, found.settings.stage) == (2048, 2)
    assert taught_before(settings.model_copy(update={"replay": 0.0})) == []


def test_every_setting_that_decides_about_the_draw_is_taken_along():
    """What `choose` reads of its settings is what a manifest is asked for."""
    import ast

    from sft.data import chosen
    from sft.stages.taught import _DRAWING

    tree = ast.parse(Path(chosen.__file__).read_text())
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "settings"
    }
    assert read == {NAMES[name] for name in _DRAWING}


def test_validation_rows_of_their_own_leave_nothing_split_off(tmp_path: Path):
    """A stage with SFT_EVAL_DATASET was trained on all of its sources."""
    settings = trained_ladder(tmp_path, eval_dataset=rows_file(tmp_path / "asked.jsonl"), val_ratio=0.25)
    assert taught_before(settings)[0].settings.val_ratio == 0.0


def test_a_source_that_changed_or_vanished_is_named(tmp_path: Path):
    """With the stage, both contents and what can be done; as it was, it is taken."""
    settings = trained_ladder(tmp_path)
    one = tmp_path / "one.jsonl"
    kept = one.read_text()
    one.write_text(kept + "\n" + kept.splitlines()[0] + "\n")
    with pytest.raises(Problems) as changed:
        taught_before(settings)
    (text,) = changed.value.problems
    assert text.startswith(f"SFT_REPLAY=0.05: stage 1 was trained on {one}, whose content has changed since (sha256:")
    assert text.endswith("--fresh, or set SFT_REPLAY=0")
    one.unlink()
    with pytest.raises(Problems, match=r"one\.jsonl, which is gone; bring it back, or set SFT_REPLAY=0"):
        taught_before(settings)
    one.write_text(kept)
    assert [found.stage for found in taught_before(settings)] == [1]


def test_a_source_that_moved_is_the_same(tmp_path: Path):
    """Where the earlier stage's env file, or this one's, names data of that content; other content stays refused."""
    settings = trained_ladder(tmp_path)
    moved = tmp_path / "elsewhere.jsonl"
    (tmp_path / "one.jsonl").rename(moved)
    with pytest.raises(Problems, match="which is gone"):
        taught_before(settings)
    ladders.make_settings(tmp_path, dataset_id=moved)
    assert [source.id for source in taught_before(settings)[0].sources] == [str(moved)]
    (tmp_path / "stage1.env").unlink()
    here = ladders.make_settings(tmp_path, 2, replay=0.05, dataset_id=moved)
    assert [source.id for source in taught_before(here)[0].sources] == [str(moved)]
    moved.write_text('{"prompt": "x", "completion": "y"}\n')
    with pytest.raises(Problems, match="which is gone"):
        taught_before(here)


def test_a_stage_that_nothing_is_known_of_is_named(tmp_path: Path):
    """An adapter without stage.json; nothing at all where stage 1 should be."""
    settings = ladders.make_settings(tmp_path, 2, replay=0.05)
    with pytest.raises(Problems, match=r"there is no earlier stage whose rows could .*out_stage1\); train"):
        taught_before(settings)
    given = load_settings(2, env_dir=tmp_path, environ={}, overrides=["SFT_REPLAY=0.1", "SFT_LR=1"])
    with pytest.raises(Problems) as found:  # the command in it would be refused with what was given to stage 2
        taught_before(given)
    assert "--set SFT_REPLAY" not in found.value.problems[0]
    assert "--stage 1 " in found.value.problems[0]
    assert "--set SFT_LR=1" in found.value.problems[0]
    ladders.add_adapter(tmp_path / "out_stage1", b"a")
    with pytest.raises(Problems, match="nothing says what stage 1 was trained on"):
        taught_before(settings)


def test_the_first_stage_and_shares_of_all_are_refused(tmp_path: Path):
    """Each by name, before anything is looked at."""
    with pytest.raises(Problems, match=r"SFT_REPLAY=0.05: stage 1 has no earlier stage"):
        ladders.make_settings(tmp_path, replay=0.05)
    for value in ("1", "1.5", "-0.1", "nan", "much"):
        with pytest.raises(Problems, match=f"SFT_REPLAY={value}"):
            ladders.make_settings(tmp_path, 2, replay=value)
    assert load_settings(2, env_dir=tmp_path, environ={}, overrides=["SFT_REPLAY=0"]).replay == 0.0


# The ladder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 1 taught JSON, stage 2 teaches YAML with a fifth of it JSON."""
    folder = tmp_path_factory.mktemp("replay")
    base = write_model(folder / "base")
    write_rows(folder / "json.jsonl", 40)
    write_rows(folder / "yaml.jsonl", 40, target="yaml")
    common = {"SFT_BASE_MODEL": base, "SFT_OUT_LORA_DIR": folder / "out", "SFT_MAX_STEPS": 4, "SFT_SAVE_TOTAL_LIMIT": 9}
    write_stage(folder, 1, common | {"SFT_DATASET_ID": folder / "json.jsonl"})
    write_stage(folder, 2, common | {"SFT_DATASET_ID": folder / "yaml.jsonl", "SFT_REPLAY": 0.2})
    assert run_train("--stage", 1, "--env-dir", folder) == 0
    return folder


@pytest.mark.slow
def test_check_run_manifest_and_report_say_the_same(trained: Path, capsys: pytest.CaptureFixture[str]):
    """36 rows of its own and 9 again are 45; --check knows it before, also where stage 1 is not trained yet."""
    rows = "Rows: 45 to train (yaml.jsonl 36 + 9 replayed from stage 1), 4 to validate"
    record = {"stage": 1, "rows": 9, "available": 36, "sources": [str(trained / "json.jsonl")]}
    code, document, _ = run_check(trained, capsys, "--stage", 2)
    assert (code, document["replay"], document["train_rows"]) == (0, [record], 45)
    code, documents, _ = run_check(trained, capsys, "--stage", "all", "--set", f"SFT_OUT_LORA_DIR={trained / 'none'}")
    assert (code, documents[1]["replay"], documents[0]["replay"]) == (0, [record], [])
    assert run_train("--check", "--stage", 2, "--env-dir", trained) == 0
    page = capsys.readouterr().out
    assert rows in page
    assert "stage 1     9  36  json.jsonl" in page
    assert run_train("--stage", 2, "--env-dir", trained) == 0
    assert rows in capsys.readouterr().out
    manifest, report = (json.loads((trained / "out_stage2" / f"{n}.json").read_text()) for n in ("stage", "report"))
    assert manifest["replay"] == report["mix"]["replay"] == [record]
    assert manifest["train_rows"] == 45
    assert "Rows of earlier stages that come again" in (trained / "out_stage2" / "report.html").read_text()


@pytest.mark.slow
def test_a_stage_resumed_from_a_checkpoint_sees_the_same_rows(trained: Path, tmp_path: Path):
    """From step 2 to the end as the uninterrupted run went: the same adapter to the bit."""
    folder = tmp_path / "ladder"
    shutil.copytree(trained, folder)
    settings = ("--stage", 2, "--env-dir", folder, "--set", f"SFT_OUT_LORA_DIR={folder / 'out'}")
    shutil.rmtree(folder / "out_stage2", ignore_errors=True)
    assert run_train(*settings) == 0
    whole = (folder / "out_stage2" / "adapter_model.safetensors").read_bytes()
    stage = folder / "out_stage2"
    record = json.loads((stage / "stage.json").read_text()) | {"status": "running", "adapter_sha256": None}
    del record["digest"]
    (stage / "stage.json").write_text(json.dumps(record))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (stage / name).unlink()
    shutil.rmtree(stage / "checkpoint-4")
    assert run_train(*settings) == 0
    assert (stage / "adapter_model.safetensors").read_bytes() == whole
    (folder / "json.jsonl").write_text("")
    assert run_train(*settings) == 0  # a complete stage does not miss what it was made from


@pytest.mark.slow
def test_two_processes_replay_the_same_rows_and_end_with_the_same_gate(trained: Path, tmp_path: Path):
    """The same losses and record as alone; a model that learnt nothing in four steps fails the gate: 3 from all."""
    results = {}
    for name in ("alone", "together"):
        folder = tmp_path / name
        shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("out_stage2*"))
        asked = ("--stage", 2, "--env-dir", folder, "--gate", "--set", f"SFT_OUT_LORA_DIR={folder / 'out'}")
        for more in ("SFT_GEN_EVAL=structured", "SFT_GEN_EVAL_SAMPLES=2", "SFT_GEN_MAX_NEW_TOKENS=2"):
            asked += ("--set", more)
        if name == "alone":
            assert run_train(*asked) == 3
        else:
            halved = ("--set", "SFT_PER_DEVICE_TRAIN_BS=2")
            code, shown = launching.run("torchrun", tmp_path / "mark", *asked, *halved)
            # torchrun ends with 1 whatever its ranks ended with, and says what that was.
            assert code == 1, shown
            assert "exitcode  : 3" in shown
            assert shown.count("Gate of stage 2: failed") == 1
        stage = folder / "out_stage2"
        losses = metric_lines(stage, "loss")
        results[name] = losses, json.loads((stage / "stage.json").read_text())["replay"]
    assert results["together"][0] == pytest.approx(results["alone"][0], abs=1e-5)
    assert results["together"][1] == results["alone"][1] != []


@pytest.mark.slow
@pytest.mark.parametrize("change", ["changed", "gone"])
def test_check_and_run_refuse_another_source_in_the_same_words(trained: Path, tmp_path: Path, capsys: Any, change: str):
    """Exit 2 with the file's name, and nothing written."""
    folder = tmp_path / "ladder"
    shutil.copytree(trained, folder)
    shutil.rmtree(folder / "out_stage2", ignore_errors=True)
    write_stage(folder, 1, {"SFT_BASE_MODEL": folder / "base", "SFT_OUT_LORA_DIR": folder / "out"})
    source = trained / "json.jsonl"
    text = source.read_text()
    try:
        source.write_text(text.replace("blue", "brown")) if change == "changed" else source.unlink()
        out = f"SFT_OUT_LORA_DIR={folder / 'out'}"
        code, document, errors = run_check(folder, capsys, "--stage", 2, "--set", out)
        assert run_train("--stage", 2, "--env-dir", folder, "--set", out) == code == 2
    finally:
        source.write_text(text)
    said = capsys.readouterr().err
    (problem,) = document["problems"]
    assert f"stage 1 was trained on {source}" in problem
    assert f"[ERROR] {problem}" in errors
    assert f"[ERROR] {problem}" in said
    assert not (folder / "out_stage2").exists()
