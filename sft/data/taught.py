"""What an earlier stage was trained on, as far as replaying it needs to be known (SFT_REPLAY)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sft.settings import Settings, Source


@dataclass(frozen=True)
class Taught:
    """An earlier stage's sources, and settings that draw from them as it did and are else those of the present one."""

    stage: int
    sources: tuple[Source, ...]
    settings: Settings
