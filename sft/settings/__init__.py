"""The settings of a stage: what other rooms need of them."""

from sft.settings.schema import Settings, load_settings
from sft.settings.values import Source

__all__ = ["Settings", "Source", "load_settings"]
