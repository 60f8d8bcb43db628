"""Reports are made from files on disk alone, say what those files say, and hold up against hostile answers."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

from sft.reporting import report
from sft.reporting.facts import stage_facts
from sft.reporting.language import japanese
from sft.reporting.report import forgetting_table, score_table, write_ladder_report, write_report
from sft.reporting.scores import read_answers
from sft.reporting.text import spaces
from sft.scoring.faults import FAULTS
from sft.stages.manifest import Manifest

# Stage 2 keeps stage 1's JSON but loses 0.5 of its TOML: 0.9 -> 0.65 overall.
FORGETTING = {
    "models": ["base", "stage 1", "stage 2"],
    "tasks": ["stage 1", "stage 2"],
    "scores": [[0.1, 0.0], [0.9, None], [0.65, 0.8]],
    "metric": "gen_score",
    "by_task": {
        "base": {"stage 1": {"text_to_json": 0.2, "text_to_toml": 0.0}, "stage 2": {"text_to_xml": 0.0}},
        "stage 1": {"stage 1": {"text_to_json": 0.9, "text_to_toml": 0.9}},
        "stage 2": {"stage 1": {"text_to_json": 0.9, "text_to_toml": 0.4}, "stage 2": {"text_to_xml": 0.8}},
    },
}
LOST = "stage 2 lost 0.250 on the tasks of stage 1 (stage 1 scored 0.900, now 0.650): text_to_toml 0.900 -> 0.400"
HOSTILE = '</pre></script><script>alert("x")</script>\x00\x1b[31m\u202e名前: 佐藤'
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Tags that stay open or close out of order, tags seen, addresses a browser would load, and visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.loaded, self.text, self.faults = [], set(), [], "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(tag)

    def handle_data(self, text):
        self.text += text


def manifest(number: int) -> dict:
    values = {"SFT_LR": 0.001 / number, "SFT_LORA_R": 16, "SFT_GEN_MAX_NEW_TOKENS": 64, "HF_TOKEN": "hf_very_secret"}
    values |= {"MLFLOW_TRACKING_URI": "http://anna:geheim@tracker/"}
    return {
        "stage": number,
        "status": "complete",
        "base_model": "demo/base",
        "parents": [{"stage": 1, "adapter_sha256": "a" * 64}] if number == 2 else [],
        "settings": {name: {"value": value, "origin": f"stage{number}.env"} for name, value in values.items()},
        "sources": [
            {"id": "rows.jsonl", "split": "train", "weight": 1.0, "rows": 95, "validation_rows": 5, "drawn": 95}
        ],
        "train_rows": 95,
        "val_rows": 5,
        "dropped": {"over-long": 3, "empty answer": 0},
        "upsampling": [{"rule": "toml", "multiplier": 2.0, "matched": 12}],
        "tokens": {"total": 4000, "trained": 1500},
        "steps": 20,
        "metrics": {"eval_loss": 0.5},
        "masked_loss": {"units": 100, "distinct_units": 7, "mean_count": 14.25, "masked_share": 0.5},
        "merge": {"max_abs_diff": 0.00002, "kl": 1e-9, "seconds": 2.5, "peak_rss_bytes": 2**30}
        if number == 2
        else None,
        "adapter_sha256": "b" * 64,
        "versions": {"torch": "2.0", "bitsandbytes": None},
        "mlflow_run_id": "run7",
        "started": "2026-01-02T03:00:00+00:00",
        "finished": "2026-01-02T03:01:30+00:00",
        "forgetting": FORGETTING if number == 2 else None,
    }


@pytest.fixture
def folders(tmp_path):
    """Two complete stages, the second with two evaluations of eleven answers each."""
    made = [tmp_path / "lora_stage1", tmp_path / "lora_stage2"]
    for number, folder in enumerate(made, 1):
        folder.mkdir()
        (folder / "stage.json").write_text(json.dumps(manifest(number)), encoding="utf-8")
        rows = [{"step": 10, "time": 1.0, "loss": 2.0, "learning_rate": 1e-4}, {"step": 10, "eval_loss": 1.5}]
        rows += [{"step": 20, "time": 2.0, "loss": 1.0, "learning_rate": 0.0}, {"step": 20, "eval_loss": 0.5}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step, score in ((0, 0.25), (20, 0.75)):
        scores = {"gen_score": score, "gen_score/json": score, "gen_score/text_to_json": score}
        metrics = {"gen_global_step": step, "gen_parse_rate/json": 1, **scores}
        (made[1] / f"gen_metrics_step{step}.json").write_text(json.dumps(metrics))
    samples = [sample(f"answer {number}", number / 10) for number in range(11)]
    samples[0]["answer"] = HOSTILE + "長" * 3_000_000
    (made[1] / "gen_samples_step20.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    return made


def sample(answer: str, score: float) -> dict:
    prompt = [{"role": "user", "content": "Write JSON <now>"}]
    return {"task": "text_to_json", "prompt": prompt, "answer": answer, "reference": "{}", "score": score}


def read(folder: Path) -> tuple[dict, str]:
    page = write_report(folder)
    return json.loads((folder / "report.json").read_text(encoding="utf-8")), page.read_text(encoding="utf-8")


def test_report_json_holds_what_the_files_say(folders):
    """Every fact of report.json is the literal value of a file, or a difference of two of them."""
    facts, _ = read(folders[1])
    assert (facts["stage"], facts["status"], facts["base_model"]) == (2, "complete", "demo/base")
    assert (facts["seconds"], facts["steps"], facts["tokens"]["trained"]) == (90.0, 20, 1500)
    assert facts["curves"]["loss"] == [[10, 2.0], [20, 1.0]]
    assert facts["curves"]["eval_loss"] == [[10, 1.5], [20, 0.5]]
    assert facts["curves"]["gen_score/json"] == [[0, 0.25], [20, 0.75]]
    json_row = {"name": "json", "first": 0.25, "last": 0.75, "delta": 0.5, "better": True}
    assert facts["scores"]["formats"] == [json_row | {"detail": {"gen_parse_rate": 1}}]
    assert [row["name"] for row in facts["scores"]["tasks"]] == ["text_to_json"]
    assert facts["mix"]["dropped"] == {"over-long": 3}
    assert facts["lineage"]["parents"] == [{"stage": 1, "adapter_sha256": "a" * 64}]
    assert facts["changed_settings"] == [{"name": "SFT_LR", "values": {"before": 0.001, "now": 0.0005}}]
    assert facts["forgetting"]["drops"] == [LOST]


def test_page_is_well_formed_and_loads_nothing(folders):
    """Tags nest, no script, and neither the page nor its figures name an address to fetch."""
    for text in (read(folders[1])[1], write_ladder_report(folders, folders[0].parent / "r.html").read_text()):
        page = Page(text)
        assert (page.open, page.faults) == ([], [])
        assert page.tags.isdisjoint({"script", "iframe", "img", "link", "object", "embed"})
        links = ("#", "lora_stage1/report.html", "lora_stage2/report.html")
        assert all(address.startswith(links) for address in page.loaded)
        assert re.findall(r"https?://(?!\*\*\*@tracker/)|url\((?!#)|@import", text) == []
        assert text.count("<svg ") == (3 if "lora_stage1/report.html" not in text else 4)


def test_page_shows_facts_of_every_section(folders):
    """Each part of the report is there, with its figures."""
    text = Page(read(folders[1])[1]).text
    for heading in ("Curves", "Forgetting matrix", "Per format", "Answers to read", "Data", "Masked loss", "Lineage"):
        assert heading in text
    for figure_shown in ("1 min 30 s", "1,500", "+0.500", "fell 0.250", "14.250", "not scored", "1.00e-09", "1.00 GiB"):
        assert figure_shown in text
    assert LOST.replace("->", "→") in text


def test_hostile_answer_is_text_and_short(folders):
    """Markup in an answer is shown, not obeyed; control and direction characters are named; megabytes are cut."""
    facts, text = read(folders[1])
    answer = facts["answers"]["worst"][0]["answer"]
    assert answer.startswith('</pre></script><script>alert("x")</script>⟨U+0000⟩⟨U+001B⟩[31m⟨U+202E⟩名前: 佐藤')
    assert answer.endswith("長\n… shortened: 3,000,055 characters in all")
    assert "<script" not in text and "&lt;script&gt;" in text and "Write JSON &lt;now&gt;" in text
    assert '<pre lang="ja">' in text and len(text) < 120_000


def test_worst_and_best_answers(folders):
    """Of eleven answers the five lowest and the five highest are shown, the most extreme first."""
    answers = stage_facts(folders[1])["answers"]
    assert [row["score"] for row in answers["worst"]] == [0.0, 0.1, 0.2, 0.3, 0.4]
    assert [row["score"] for row in answers["best"]] == [1.0, 0.9, 0.8, 0.7, 0.6]
    assert (answers["step"], answers["count"]) == (20, 11)


@pytest.mark.parametrize(
    ("scores", "worst", "best", "equal"),
    [
        ([1.0, 1.0, 1.0], [], [], 3),
        ([0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], [0.5], [1.0, 1.0, 1.0, 1.0], 0),
        ([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0], 0),
        ([0.2, 0.4, 0.9], [0.2], [0.9, 0.4], 0),
        ([0.7], [], [], 1),
    ],
)
def test_no_answer_is_among_the_lowest_and_the_highest(tmp_path, scores, worst, best, equal):
    """Nor do the two groups share a score; where all score the same there are no lowest and highest."""
    lines = [json.dumps(sample(f"answer {number}", score)) for number, score in enumerate(scores)]
    (tmp_path / "gen_samples_step3.jsonl").write_text("\n".join(lines))
    answers = read_answers(tmp_path, [])
    assert ([row["score"] for row in answers["worst"]], [row["score"] for row in answers["best"]]) == (worst, best)
    assert len(answers["equal"]) == equal
    shown = [row["answer"] for name in ("worst", "best", "equal") for row in answers[name]]
    assert len(shown) == len(set(shown))


def test_the_top_of_the_page_says_what_happened(folders):
    """Own tasks, earlier tasks, best checkpoint and the metric that chose it, and the last evaluation's figure."""
    best = {"best_metric": 0.4, "best_metric_name": "eval_loss", "best_model_checkpoint": "checkpoint-10", "step": 10}
    (folders[1] / "best_model").mkdir()
    (folders[1] / "best_model" / "best_model_info.json").write_text(json.dumps(best))
    facts, text = read(folders[1])
    assert facts["lead"] == [
        "Stage 2 lifted its own tasks from 0.00 to 0.80; on the tasks of stage 1 it fell by 0.25.",
        "Best model: checkpoint-10, where eval_loss was lowest (0.400). The last evaluation had 0.500.",
    ]
    assert facts["best"] == best
    assert all(sentence in Page(text).text for sentence in facts["lead"])
    assert read(folders[0])[0]["lead"] == ["Stage 1 brought the evaluation loss from 1.500 to 0.500."]
    page = write_ladder_report(folders, folders[0].parent / "r.html", "en").read_text()
    assert facts["lead"][0] in Page(page).text


@pytest.mark.parametrize(
    ("lowest", "english", "word"),
    [
        (0.5, "The difference is real (95 % interval +0.500 to +0.500 over 8 questions).", "とはいえません"),
        (1.0, "The difference is within noise (95 % interval +0.000 to +0.000 over 8 questions).", "範囲内です"),
    ],
)
def test_the_best_model_is_held_against_the_last_by_their_answers(folders, lowest, english, word):
    """Question by question, in both languages: eight that scored 1.0 at step 10 and less, or the same, at step 30."""
    best = {"best_metric": 1.0, "best_metric_name": "gen_score", "best_model_checkpoint": "checkpoint-10", "step": 10}
    (folders[1] / "best_model").mkdir()
    (folders[1] / "best_model" / "best_model_info.json").write_text(json.dumps(best))
    for step, score in ((10, 1.0), (30, lowest)):
        lines = "".join(json.dumps(sample(f"answer {number}", score)) + "\n" for number in range(8))
        (folders[1] / f"gen_samples_step{step}.jsonl").write_text(lines)
        (folders[1] / f"gen_metrics_step{step}.json").write_text(json.dumps({"gen_score": score}))
    facts = read(folders[1])[0]
    assert facts["lead"][1].endswith(english)
    assert facts["best"]["against_last"]["mean"] == pytest.approx(1.0 - lowest)
    assert word in write_report(folders[1], "ja").read_text(encoding="utf-8")
    best["step"] = 30  # the last itself: nothing to compare
    (folders[1] / "best_model" / "best_model_info.json").write_text(json.dumps(best))
    assert read(folders[1])[0]["best"] == best


def test_cells_carry_intervals_where_the_questions_are_known(folders):
    """The change from the model above with its interval, in facts and page; none for the first model."""
    asked = {
        "base": {"stage 1": [0.1] * 8},
        "stage 1": {"stage 1": [0.9] * 8},
        "stage 2": {"stage 1": [0.4, 0.9] * 4},
    }
    (folders[1] / "stage.json").write_text(
        json.dumps(manifest(2) | {"forgetting": FORGETTING | {"by_question": asked}})
    )
    facts, text = read(folders[1])
    first, second, third = (row["cells"][0]["change"] for row in facts["forgetting"]["rows"])
    assert first is None
    assert (second["since"], second["mean"], second["real"]) == ("base", pytest.approx(0.8), True)
    assert third["mean"] == pytest.approx(-0.25) and third["low"] < -0.25 < third["high"]
    assert "<small>−0.250 (" in text and "95 % interval of the loss 0." in text


@pytest.mark.parametrize(("after", "said"), [([0.6, 0.5] * 4, " (within noise)."), ([0.9] * 8, ".")])
def test_what_a_stage_did_is_called_chance_where_its_interval_holds_nothing(folders, after, said):
    """Its own tasks against the model before it: +0.05 by four of eight answers that fell and four that rose, +0.40."""
    scores = [[0.1], [0.5], [sum(after) / 8]]
    asked = {"base": {"stage 2": [0.1] * 8}, "stage 1": {"stage 2": [0.4, 0.6] * 4}, "stage 2": {"stage 2": after}}
    one = FORGETTING | {"tasks": ["stage 2"], "scores": scores, "by_task": {}, "by_question": asked}
    (folders[1] / "stage.json").write_text(json.dumps(manifest(2) | {"forgetting": one}))
    end = f"{scores[2][0]:.2f}{said}"
    assert stage_facts(folders[1])["lead"] == [f"Stage 2 lifted its own tasks from 0.50 to {end}"]


def test_nothing_earlier_fell(folders):
    """Said where earlier tasks were asked and none fell by more than the margin."""
    kept = FORGETTING | {"scores": [[0.1, 0.0], [0.9, 0.59], [0.9, 1.0]]}
    (folders[1] / "stage.json").write_text(json.dumps(manifest(2) | {"forgetting": kept}))
    lead = stage_facts(folders[1])["lead"]
    assert lead == ["Stage 2 lifted its own tasks from 0.59 to 1.00; nothing earlier fell."]


def test_white_space_of_answers_can_be_seen():
    """At line ends, tabs, wide blanks and line ends at the end; what stands between words stays a space."""
    shown = spaces("a b  \n\tc\u3000<d>\n\n")
    plain = re.sub(r"<[^>]+>", "", shown)
    assert plain == "a b··\n⇥\tc␣&lt;d&gt;⏎\n⏎\n"
    assert spaces("plain text") == "plain text"


def test_figures_read_as_they_are_meant(folders):
    """Counts are whole numbers, the peak learning rate is the one that was set, a mix is a table."""
    record = manifest(2)
    mix = [{"id": "a.jsonl", "weight": 1.0}, {"id": "b.jsonl", "weight": 2.5, "limit": 7}]
    record["settings"]["SFT_DATASET_MIX"] = {"value": mix, "origin": "stage2.env"}
    record["metrics"] = {"gen_samples": 64.0, "eval_loss": 0.5}
    (folders[1] / "stage.json").write_text(json.dumps(record))
    (folders[1] / "gen_metrics_step20.json").write_text(json.dumps({"gen_score": 0.75, "gen_samples": 64.0}))
    text = read(folders[1])[1]
    assert "64.000" not in text and text.count('<td class="number">64</td>') == 2
    assert "<th>limit</th>" in text and re.search(r"<code[^>]*>b.jsonl</code></td><td><code[^>]*>2.5</code>", text)
    page = write_ladder_report(folders, folders[0].parent / "r.html").read_text()
    assert '<td class="number">0.001</td>' in page and '<td class="number">0.0005</td>' in page


def test_faults_are_counted_and_stand_with_each_answer(tmp_path):
    """A table says how many answers have which fault, and what it means."""
    rows = [sample("a", 0.0) | {"faults": ["fence", "wrong key"]}, sample("b", 1.0) | {"faults": ["fence"]}]
    (tmp_path / "gen_samples_step3.jsonl").write_text("\n".join(map(json.dumps, rows)))
    facts, text = read(tmp_path)
    assert [(fault["name"], fault["answers"]) for fault in facts["answers"]["faults"]] == [
        ("fence", 2),
        ("wrong key", 1),
    ]
    assert "it stands in a code fence" in text
    assert facts["answers"]["worst"][0]["faults"] == ["fence", "wrong key"]


def test_the_page_speaks_japanese(folders, monkeypatch):
    """By the setting or the locale; report.json stays as it is, and headings and sentences leave no English word."""
    english_facts = read(folders[1])[0]
    text = write_report(folders[1], "ja").read_text(encoding="utf-8")
    assert '<html lang="ja">' in text
    for words in ("忘却行列", "点の低い回答", "ステージ2は自分の課題の点を0.00から0.80に上げました", "ステージ1の課題"):
        assert words in text
    assert re.findall(r"<h[23]>[^<]*[A-Za-z]{4,}[^<]*</h[23]>", text) == []
    assert json.loads((folders[1] / "report.json").read_text(encoding="utf-8")) == english_facts
    monkeypatch.setenv("LC_ALL", "ja_JP.UTF-8")
    assert write_report(folders[1]).read_text(encoding="utf-8") == text
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    assert '<html lang="en">' in write_report(folders[1]).read_text(encoding="utf-8")


def test_every_fixed_text_has_its_japanese():
    """Whatever a template or the code hands to the translation is in the table, with the same places for values."""
    room = Path(report.__file__).parent
    texts = set()
    for path in [
        *room.glob("templates/*.jinja"),
        *(room / f"{name}.py" for name in ("report", "lead", "text", "variants")),
    ]:
        source = path.read_text(encoding="utf-8")
        texts |= set(re.findall(r"\b(?:_|say)\(\s*\"([^\"]+)\"", source))
    texts |= {*FAULTS, *FAULTS.values()}
    table = japanese()
    assert texts - table.keys() == set()
    for text, translation in table.items():
        assert set(re.findall(r"{\w+}", text)) == set(re.findall(r"{\w+}", translation)), text


def test_no_secret_reaches_the_report(folders):
    """A setting named like a secret is left out, a password in an address is dotted; new TOKENS are no secret."""
    facts, text = read(folders[1])
    for place in (text, json.dumps(facts)):
        assert "hf_very_secret" not in place and "geheim" not in place and "anna" not in place
    assert facts["settings"]["SFT_GEN_MAX_NEW_TOKENS"]["value"] == 64
    assert facts["settings"]["MLFLOW_TRACKING_URI"]["value"] == "http://***@tracker/"


@pytest.mark.parametrize("name", ["lora_stage1", "elsewhere"])
def test_empty_folder_still_makes_a_page(tmp_path, name):
    """Without any file of a run the report has a heading and no sections."""
    (tmp_path / name).mkdir()
    facts, text = read(tmp_path / name)
    assert (facts["curves"], facts["scores"], facts["forgetting"], facts["answers"]) == ({}, None, None, None)
    assert "<h2>" not in text and Page(text).faults == []


def test_killed_run_is_reported_up_to_its_last_whole_line(tmp_path):
    """A manifest without results and a metrics file cut in mid-line give the curves so far, and one notice."""
    folder = tmp_path / "lora_stage1"
    folder.mkdir()
    record = {
        "stage": 1,
        "status": "running",
        "started": "1970-01-01T00:01:40+00:00",
        "finished": None,
        "steps": None,
        "tokens": {"trained": None},
    }
    (folder / "stage.json").write_text(json.dumps(record))
    (folder / "metrics.jsonl").write_text(
        '{"step": 1, "time": 130, "loss": 3.0}\n{"step": 2, "loss": NaN}\n{"step": 3, "lo'
    )
    facts, text = read(folder)
    assert facts["curves"] == {"loss": [[1, 3.0]]}
    assert (facts["seconds"], facts["last_step"], facts["status"]) == (30.0, 2, "running")
    assert facts["notices"] == ["metrics.jsonl: 1 unreadable line left out"]
    assert "so far" in text and "Forgetting" not in text


def test_damaged_manifest_is_named(tmp_path):
    """A stage.json that is not JSON is no crash: the report says so."""
    folder = tmp_path / "lora_stage1"
    folder.mkdir()
    (folder / "stage.json").write_text('{"stage": 1')
    assert read(folder)[0]["notices"][0].startswith("stage.json could not be read")


def test_extraction_metrics_have_directions(tmp_path):
    """A falling false-positive rate is better, a falling field rate worse, a count neither."""
    folder = tmp_path / "lora_stage1"
    folder.mkdir()
    rate, field, count = "gen_fp_rate_on_negative", "gen_field_exact_match_rate/age", "gen_avg_pred_offender_count"
    for step, value in ((0, 0.5), (10, 0.25)):
        (folder / f"gen_metrics_step{step}.json").write_text(json.dumps({rate: value, field: value, count: value}))
    scores = read(folder)[0]["scores"]
    assert {row["name"]: row["better"] for row in scores["overall"] + scores["fields"]} == {
        rate: True,
        "age": False,
        count: None,
    }


def test_later_line_of_a_repeated_step_counts(tmp_path):
    """A resumed run logs steps again: the curve has each step once, with the later value."""
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 5, "loss": 2.0}\n{"step": 6, "loss": 1.9}\n{"step": 5, "loss": 1.0}\n'
    )
    assert stage_facts(tmp_path)["curves"]["loss"] == [[5, 1.0], [6, 1.9]]


def test_long_curve_is_averaged(tmp_path):
    """Of 4,000 steps, groups of ten become one point at the last step with the mean value."""
    lines = (json.dumps({"step": step, "loss": float(step)}) for step in range(1, 4001))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    curve = stage_facts(tmp_path)["curves"]["loss"]
    assert (len(curve), curve[0], curve[-1]) == (400, [10, 5.5], [4000, 3995.5])


def test_score_table(folders):
    """Base and stages by format and overall, which is over what all were asked; what was not scored is a dash."""
    assert score_table(folders).splitlines() == [
        "model    overall   json   toml    xml",
        "-------------------------------------",
        "base       0.100  0.200  0.000  0.000",
        "stage 1    0.900  0.900  0.900      –",
        "stage 2    0.650  0.900  0.400  0.800",
    ]
    assert score_table(folders[:1]) == ""


def test_forgetting_table():
    """The fallen cell has a mark, and a line below names what fell."""
    assert forgetting_table(Manifest(forgetting=FORGETTING)).splitlines() == [
        "model    stage 1 tasks  stage 2 tasks",
        "-------------------------------------",
        "base            0.100          0.000 ",
        "stage 1         0.900              – ",
        "stage 2         0.650!         0.800 ",
        "! " + LOST,
    ]
    assert forgetting_table(Manifest()) == ""


def test_ladder_report(folders):
    """The page links the stages; its json compares them."""
    page = write_ladder_report(folders, folders[0].parent / "lora_report.html")
    facts = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    assert [(stage["stage"], stage["loss"], stage["seconds"]) for stage in facts["stages"]] == [
        (1, [2.0, 1.0], 90.0),
        (2, [2.0, 1.0], 90.0),
    ]
    assert facts["seconds"] == 180.0
    assert facts["differing_settings"] == [{"name": "SFT_LR", "values": {"stage 1": 0.001, "stage 2": 0.0005}}]
    assert 'href="lora_stage2/report.html"' in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(("trackers", "shown"), [(["mlflow", "none"], True), (["none"], False)])
def test_the_end_of_a_ladder_names_mlflow_where_a_stage_was_tracked(folders, capsys, trackers, shown):
    """The report's path always; a store that nothing was sent to is not to be opened."""
    out = folders[0].with_name("lora")
    common = {"out_lora_dir": out, "report_language": "en", "mlflow_tracking_uri": "sqlite:///a.db"}
    tracked = trackers * (2 // len(trackers))
    report.close_ladder([SimpleNamespace(stage=n, report_to=(name,), **common) for n, name in enumerate(tracked, 1)])
    said = capsys.readouterr().out
    assert f"Report: {out}_report.html" in said
    assert ("MLflow: " in said) == shown


def test_same_files_same_page(folders):
    """Nothing in a page depends on when or how often it was made."""
    assert read(folders[1])[1] == read(folders[1])[1]
