"""Opening a stage on one process or many; torch is imported only where there are many."""

from __future__ import annotations

from sft.quiet import silence_libraries, silence_torch
from sft.settings import Settings, launched
from sft.stages import Stage


def open_stage(settings: Settings, *, fresh: bool) -> Stage:
    """The stage, held by the main process; the others look at it after the main process has decided.

    Raises:
        Problems: anything wrong with lineage, output folder or lock (said by the main process).
    """
    silence_libraries()
    settings.export_passthrough()
    processes = launched().processes
    if processes == 1:
        stage = Stage.open(settings, fresh=fresh, processes=1)
    else:
        silence_torch()
        from accelerate import PartialState

        state = PartialState()
        with state.main_process_first():
            main = state.is_main_process
            stage = Stage.open(settings, fresh=fresh and main, main_process=main, processes=processes)
    return stage
