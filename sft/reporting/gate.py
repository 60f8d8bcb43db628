"""The gate of a stage as people and pipelines are told it, and the exit code it ends with."""

import json
import sys
from collections.abc import Sequence
from typing import Any

from sft.distributed.launch import launched
from sft.scoring.forgetting import Matrix
from sft.scoring.gates import Gate, judge
from sft.settings import Settings
from sft.stages import paths
from sft.stages.manifest import read_manifest

FAILED = 3


def judge_stage(settings: Settings) -> dict[str, Any]:
    """{"stage", "gate"} of a complete stage by the scores it recorded and the present SFT_FORGETTING_MARGIN, the same
    on every rank; said on stderr."""
    verdict: dict[str, Any] = {}
    if launched().rank == 0:
        folder = paths.stage_folder(settings.out_lora_dir, settings.stage)
        manifest = read_manifest(folder, settings.stage)
        matrix = Matrix.read(manifest.forgetting) if manifest else None
        if matrix:
            matrix.margin = settings.forgetting_margin
        gate = judge(matrix, settings.stage)
        verdict = {"stage": settings.stage, "gate": gate.record()}
        print(gate_text(gate), file=sys.stderr, flush=True)
    if launched().processes > 1:
        from sft.distributed import ranks

        verdict = ranks.from_main(verdict, "the main process to judge the gate")
    return verdict


def passed(verdict: dict[str, Any]) -> bool:
    return bool(verdict["gate"]["passed"])


def exit_code(verdicts: Sequence[dict[str, Any]], *, as_json: bool) -> int:
    """0 where all gates passed, else 3; `as_json` prints the verdicts as the last line on stdout, that of one stage as
    an object, of several as a list."""
    if as_json and launched().rank == 0:
        print(json.dumps(verdicts[0] if len(verdicts) == 1 else verdicts, ensure_ascii=False), flush=True)
    return 0 if all(map(passed, verdicts)) else FAILED


def gate_text(gate: Gate) -> str:
    """Passed or failed, why, and what held."""
    head = f"Gate of stage {gate.stage}: {'passed' if gate.passed else 'failed; nothing was deleted'}"
    held = [f"  held: {check.sentence()}" for check in gate.checks if not check.reason]
    return "\n".join([head, *(f"  {reason}" for reason in gate.reasons), *held])
