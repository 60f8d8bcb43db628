"""Where a stage lives, what it is made from, what is to be done about it, and its manifest while it is trained.

`Stage.open` looks first and writes nothing until everything is in order; then it takes the lock of the stage.
"""

import contextlib
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from sft.distributed.launch import launched
from sft.errors import Problems, RunFailed, plainly
from sft.stages import checkpoints, paths
from sft.stages.changes import counted_sources, other_rows, source_record, stage_inputs
from sft.stages.decision import Decision, Verdict, decide, traces, unwritable
from sft.stages.lineage import Lineage, Parent, find_lineage, holds_nothing, result_sha256
from sft.stages.manifest import Manifest, ParentRecord, blank_manifest, versions, with_digest
from sft.storage.atomic import clear_leftovers, set_aside, sync_tree, write_text
from sft.storage.json_files import write_json
from sft.storage.lock import Lock, current_holder
from sft.storage.seals import seal

if TYPE_CHECKING:
    from sft.settings import Settings


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass
class Stage:
    """One stage on disk. As a context manager it gives the lock back and records a failure."""

    settings: "Settings"
    processes: int | None = None
    main_process: bool = True
    verdict: Verdict = field(default_factory=Verdict)
    manifest: Manifest = field(default_factory=Manifest)
    moved: dict[Path, Path] = field(default_factory=dict)  # what `begin` set aside, by where it was
    damaged: Collection[str] | None = None  # names of checkpoints the main process found so; None reads them through
    _lineage: Lineage = field(default_factory=Lineage, repr=False)
    _seen: set[tuple[str, int]] = field(default_factory=set, repr=False)
    _start: Manifest = field(default_factory=Manifest, repr=False)
    _lock: Lock | None = field(default=None, repr=False)
    _begun: bool = field(default=False, repr=False)
    _supersedes: bool = field(default=False, repr=False)

    @property
    def number(self) -> int:
        """Which stage, from 1."""
        return self.settings.stage

    @property
    def folder(self) -> Path:
        """OUT_stageN, or OUT_stageN.try-NAME of a variant."""
        return paths.own_folder(self.settings)

    @property
    def lock_path(self) -> Path:
        """One for a stage and its variants: they share the merged base."""
        return paths.lock_path(paths.stage_folder(self.settings.out_lora_dir, self.number))

    @property
    def merged_base(self) -> Path:
        """OUT_stageN_merged_base, of all variants as well."""
        return paths.merged_base(paths.stage_folder(self.settings.out_lora_dir, self.number))

    @property
    def parents(self) -> tuple[Parent, ...]:
        """The results of earlier stages that this one is made from, in order."""
        return self._lineage.parents

    @property
    def decision(self) -> Decision:
        """What is to be done about the stage."""
        return self.verdict.decision

    @property
    def checkpoint(self) -> Path | None:
        """The newest whole checkpoint."""
        return self.verdict.checkpoint

    @property
    def changed(self) -> list[str]:
        """What is different from the last time."""
        return self.verdict.changed

    @property
    def problems(self) -> list[str]:
        """What the person must change."""
        return self.verdict.problems

    @property
    def warnings(self) -> list[str]:
        """What the person should know."""
        return self.verdict.warnings

    @property
    def start_model(self) -> str:
        """What adapters are merged into: the base model, or an earlier stage's where all weights were trained."""
        whole = [parent for parent in self.parents if parent.kind == "model"]
        return str(whole[-1].folder) if whole else self.settings.base_model

    @property
    def start_fingerprint(self) -> str:
        """What the content of `start_model` is known by."""
        whole = [parent.adapter_sha256 for parent in self.parents if parent.kind == "model"]
        return f"model:{whole[-1]}" if whole else self._start.inputs["SFT_BASE_MODEL"]

    @property
    def adapters(self) -> tuple[Parent, ...]:
        """The parents to merge into `start_model`, in order; () where it is trained as it is."""
        return tuple(parent for parent in self.parents if parent.kind == "adapter")

    @classmethod
    def inspect(cls, settings: "Settings", *, fresh: bool = False, processes: int | None = None) -> Self:
        """Decide as `open` would. Writes nothing, holds nothing, raises nothing: see `problems` and `warnings`."""
        stage = cls(settings, processes)
        stage._assess(fresh=fresh)
        if stage.decision in ("fresh", "resume") and (holder := current_holder(stage.lock_path)):
            what = f"stage {stage.number} is in use by {holder}; wait until it ends or stop it"
            stage.verdict.refuse(f"{stage.folder}: {what}")
        return stage

    @classmethod
    def open(
        cls,
        settings: "Settings",
        *,
        fresh: bool = False,
        main_process: bool = True,
        processes: int | None = None,
        damaged: Collection[str] | None = None,
    ) -> Self:
        """Decide, then hold the stage. Raises Problems when anything is wrong; nothing has been written then.

        A completed stage is not held. Of several processes only the main one locks, clears up and writes; the others
        open the stage after it (accelerate's `main_process_first`) and find what it left. `processes`: how many train;
        `damaged`: the checkpoints that the main process found so.
        """
        stage = cls(settings, processes, main_process, damaged=damaged)
        stage._assess(fresh=fresh)
        stage._raise_problems()
        if main_process and stage.decision != "complete":
            stage._hold(fresh=fresh)
        return stage

    def _assess(self, *, fresh: bool) -> None:
        try:
            self._look_back()
            self._decide(fresh=fresh)
        except (PermissionError, NotADirectoryError) as error:
            self.verdict.refuse(f"{error.filename}: can't be read ({error.strerror}); make it readable for this user")

    def _look_back(self) -> None:
        """Lineage and fingerprints: read once, they don't depend on the stage's own folder."""
        inputs = stage_inputs(self.settings, self.processes)
        self._lineage = find_lineage(self.settings, inputs)
        self._start = blank_manifest().changed(
            stage=self.number,
            base_model=self.settings.base_model,
            parents=[ParentRecord(stage=each.stage, adapter_sha256=each.adapter_sha256) for each in self.parents],
            settings=self.settings.record(),
            sources=[source_record(source) for source in self.settings.sources],
            inputs=inputs,
        )

    def _raise_problems(self) -> None:
        if self.problems:
            raise Problems(self.problems)

    def _decide(self, *, fresh: bool) -> None:
        """Set the decision from what lies in the folder now."""
        self._seen = traces(self.folder)
        verdict = Verdict() if fresh else self._judged()
        verdict.warnings[:0] = self._lineage.warnings
        verdict.problems[:0] = self._lineage.problems
        verdict.decision = "refuse" if verdict.problems else verdict.decision
        if verdict.decision in ("fresh", "resume") and (place := unwritable(self.folder)):
            what = f"{place} can't be written by this user; choose another path or change its permissions"
            verdict.refuse(f"SFT_OUT_LORA_DIR={self.settings.out_lora_dir}: {what}")
        self.verdict, self.manifest = verdict, verdict.manifest

    def _judged(self) -> Verdict:
        return decide(self.folder, self._start, damaged=self.damaged, again=self.settings.command("--fresh"))

    def _hold(self, *, fresh: bool) -> None:
        """Lock, look again where another process may have worked meanwhile, clear up what killed ones left."""
        self._lock = Lock(self.lock_path)
        self._lock.acquire()
        with contextlib.ExitStack() as on_error:
            on_error.callback(self.close)
            if traces(self.folder) != self._seen:
                self._decide(fresh=fresh)
                self._raise_problems()
            self.warnings.extend([f"[WARNING] {self._lock.warning}"] if self._lock.warning else [])
            self._clear_up(fresh=fresh)
            if self.decision != "complete":
                on_error.pop_all()

    def _clear_up(self, *, fresh: bool) -> None:
        names = frozenset({self.folder.name, self.merged_base.name})
        clear_leftovers(self.folder.parent, names=names, alone=True)
        clear_leftovers(self.folder, alone=True)
        if (fresh and not holds_nothing(self.folder)) or (self.changed and self._has_results()):
            # Moved by `begin`: data and model have not been looked at, and a refusal leaves everything where it was.
            self._supersedes, self.verdict.existed = True, False

    def _has_results(self) -> bool:
        rewritten = {paths.MANIFEST, paths.error_log(0), paths.METRICS}
        return any(path.name not in rewritten and not path.name.startswith(".") for path in self.folder.iterdir())

    def begin(self, **rows: Any) -> None:
        """Write the manifest as running. A resumed stage keeps its start, its MLflow run and metrics up to here.

        `rows`: what was counted of the rows (sources, train_rows, val_rows, tokens). Raises Problems where a checkpoint
        was trained on others, whatever made the difference: a data set out of reach, other libraries.
        """
        start = self._start.changed(**rows)
        if "sources" in rows:
            start = start.changed(sources=counted_sources(self._start.sources, start.sources))
        if self.decision == "resume" and self.checkpoint and (different := other_rows(self.manifest, start)):
            raise Problems([self._rows_refusal(different)])
        kept = ("started", "mlflow_run_id", "merge") if self.decision == "resume" else ()
        earlier = {name: value for name in kept if (value := getattr(self.manifest, name))}
        self.manifest = start.changed(**{"versions": versions(), "started": _now()} | earlier)
        self._begun = True
        if self.main_process:
            if self._supersedes:
                self.moved[self.folder] = set_aside(self.folder, "old")
            else:
                self.moved |= {folder: set_aside(folder, "broken") for folder, _ in self.verdict.broken}
            self.folder.mkdir(parents=True, exist_ok=True)
            self._save()
            checkpoints.rewind_metrics(self.folder / paths.METRICS, self.checkpoint)

    def _rows_refusal(self, different: list[str]) -> str:
        listed = "".join(f"\n  {change}" for change in different)
        remedy = f"bring back what is different, or {self.settings.command('--fresh')} moves it aside and trains again"
        what = f"stage {self.number} was partly trained on other rows than there are now"
        return f"{self.folder}: {what}:{listed}\n  {remedy}"

    def _save(self) -> None:
        if self.main_process:
            write_json(self.folder / paths.MANIFEST, with_digest(self.manifest.record()))

    def update(self, **fields: Any) -> None:
        """Set keys of the manifest on disk."""
        self.manifest = self.manifest.changed(**fields)
        self._save()

    def complete(self, *, report: Callable[[Manifest], object] | None = None, **fields: Any) -> None:
        """Record the result. Everything else in the folder is on the disk before the status says so.

        `report` is called with the finished manifest before it is written: a complete stage has its report. Logs of
        starts that failed go, they tell of another run than this one.
        """
        if not self.main_process:
            return
        result = result_sha256(self.folder)
        if result is None:
            raise RunFailed(f"{self.folder} holds no weights after training; run the same command again to resume")
        sync_tree(self.folder)
        seal(self.folder, among=paths.SEALED)
        finished = {**fields, "adapter_sha256": result[1], "status": "complete", "finished": _now()}
        if report:
            report(self.manifest.changed(**finished))
        for log in self.folder.glob(paths.ERROR_LOGS):
            log.unlink(missing_ok=True)
        self.update(**finished)

    def fail(self, reason: str) -> None:
        """Record that the stage failed and why. It resumes from its last checkpoint when started again."""
        if self.manifest.stage:
            self.update(status="failed", finished=_now(), error=plainly(reason))

    def write_error_log(self, text: str) -> Path | None:
        """Keep a traceback in OUT_stageN/error.log (error.rank<k>.log), without credentials; None where it can't be."""
        path = self.folder / paths.error_log(0 if self.main_process else launched().rank)
        try:
            write_text(path, plainly(text))
        except OSError:
            return None
        return path

    def _writes(self) -> bool:
        """Whether a log may be left: by who holds the stage, and by other ranks where the folder is there."""
        earlier_output = self._supersedes and not self._begun
        return (self._lock is not None and not earlier_output) or (not self.main_process and self.folder.is_dir())

    def close(self) -> None:
        """Give the lock back; a stage that was refused leaves nothing behind."""
        if self._lock:
            self._lock.release(unused=not self._begun)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A stop (SystemExit, KeyboardInterrupt) leaves the stage running: it resumes. A full disk can't take the note.
        if isinstance(error, Exception) and self._lock and self.manifest.status == "running":
            with contextlib.suppress(OSError):
                self.fail(f"{type(error).__name__}: {error}")
        if isinstance(error, Exception) and not isinstance(error, Problems) and self._writes():
            log = self.write_error_log("".join(traceback.format_exception(error)))
            error.add_note(f"Details: {log}" if log else "Details could not be written: the disk is full")
        self.close()
