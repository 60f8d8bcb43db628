"""What `--check` shows to people, part by part: the figures of the document in words, nothing else."""

from types import SimpleNamespace

from sft.evaluation.at_once import AnswerBatch
from sft.planning import tables
from sft.planning.activations import BatchShape
from sft.planning.document import Lineage, Steps
from sft.planning.memory import Estimate
from sft.planning.need import Need
from sft.planning.step_time import Forecast
from sft.settings.values import SourceRecord

GIB = 2**30


def test_only_settings_that_were_given_are_listed():
    """With value and origin in columns; the others are counted."""
    record = {
        "SFT_LR": {"value": 2e-4, "origin": "stage1.env line 3"},
        "SFT_EPOCHS": {"value": 1.0, "origin": "default"},
        "SFT_RUN_NAME": {"value": "x" * 80, "origin": "--set"},
    }
    short = "x" * 67 + "..."
    assert tables.settings_table(record).splitlines() == [
        f"SFT_LR        {'0.0002'.ljust(70)}  stage1.env line 3",
        f"SFT_RUN_NAME  {short}  --set",
        "1 settings at their defaults (docs/settings.md)",
    ]


def test_lineage_names_what_the_stage_is_made_from_and_what_changed():
    """Parents there are with their adapters, parents that come first, and every change."""
    lineage = Lineage("refuse", [{"stage": 1, "adapter_sha256": "0123456789abcdef"}], ["SFT_LR: 0.1 → 0.2"])
    assert tables.lineage_text(lineage, coming=[2]).splitlines() == [
        "refuse: can't be run as things are",
        "made from: base model + stage 1 (0123456789ab) + stage 2 (trained first)",
        "changed: SFT_LR: 0.1 → 0.2",
    ]


def test_sources_have_a_line_each():
    """The file's name without its folder, and the rows as they are, held out, drawn."""
    source = SourceRecord(id="/data/rows.jsonl", weight=2.0, rows=1000, validation_rows=50, drawn=667)
    heading, _, line = tables.sources_table([source]).splitlines()
    assert heading.split("  ")[0] == "source"
    assert line.split() == ["rows.jsonl", "train", "2.0", "1,000", "50", "667"]


def test_upsampling_has_rule_multiplier_and_matches():
    """A rule that matches nothing is a zero to be seen."""
    text = tables.upsampling_table([{"rule": "toml", "multiplier": 2.5, "matched": 0}])
    assert text.splitlines()[2].split() == ["toml", "2.5", "0"]


def test_masked_loss_shows_the_edges_that_occur_most():
    """Counts, the masked share, and how often the commonest edge is kept."""
    edge = {"edge": "root -> a", "count": 60, "keep": 0.05}
    report = {"units": 100, "distinct_units": 4, "mean_count": 3.0, "masked_share": 0.418, "top": [edge]}
    lines = tables.masked_loss_text(report | {"trained_at_least_once": {"expected": 80.4, "drawn": 81.0}}).splitlines()
    assert lines[:2] == [
        "100 units, 4 distinct; mean count 3.00",
        "41.8 % masked in an epoch; trained at least once: 80 expected, 81 drawn",
    ]
    assert lines[4].split() == ["root", "->", "a", "60", "5.0", "%"]


def test_steps_divide_the_global_batch():
    """32 rows a step are 2 x 8 on two devices; packed, they are sequences."""
    settings = SimpleNamespace(packing=False, per_device_train_bs=2, grad_accum=8)
    steps = Steps(global_batch=32, per_epoch=100, total=150)
    text = "150 steps, 100 an epoch, 32 rows a step (2 x 8 accumulated x 2 devices)"
    assert tables.steps_text(steps, settings, None) == text
    settings.packing = True
    assert "32 sequences a step" in tables.steps_text(steps, settings, None)


def test_time_is_shown_with_what_it_was_measured_on_or_why_there_is_none():
    """The peak of a GPU stands beside either."""
    measured = Forecast(7200.0, 1.5, 12345.6, "H100, forward and backward", peak=3 * GIB)
    first, second = tables.time_lines(measured)
    assert first.endswith("1.5 s a step, without evaluating and saving")
    assert second == "measured on H100, forward and backward: 12,346 tokens/s, peak 3.00 GiB"
    assert tables.time_lines(Forecast(reason="too large")) == ["no estimate of the time: too large"]


def test_memory_shows_each_part_and_what_it_was_worked_out_for():
    """Generation only where answers are made, and a word where the activations are a rule of thumb."""
    estimate = Estimate(GIB, 2, 3, 4, 5, 8 * GIB, generation=6, traced=False)
    need = Need(estimate, BatchShape(tokens=1000, trained=300, rows=4), AnswerBatch(8, 2000), checkpointing=True)
    text = tables.memory_table(need)
    assert "largest micro-batch: 4 rows, 1,000 tokens; with gradient checkpointing" in text
    assert "8 answers, 2,000 tokens with their prompts" in text
    assert "by a rule of thumb" in text
    alone = Need(
        Estimate(GIB, 2, 3, 4, 5, 8 * GIB), BatchShape(tokens=1000, trained=300, rows=4), None, checkpointing=False
    )
    assert "generation" not in tables.memory_table(alone)
    assert "rule of thumb" not in tables.memory_table(alone)


def test_sizes_are_in_gib_from_one_on():
    """3 GiB, and half of one in MiB."""
    assert [tables.size(number) for number in (3 * GIB, GIB // 2)] == ["3.00 GiB", "512.00 MiB"]


def test_a_value_stands_on_one_line():
    """Line ends become spaces; more than 70 characters are cut."""
    assert tables.cut("a\n  b") == "a b"
    assert tables.cut("x" * 71) == "x" * 67 + "..."
