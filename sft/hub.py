"""Whether the hub can be reached, found out at once: its client retries each file for half a minute first."""

import os
import socket
from urllib.parse import urlsplit
from urllib.request import getproxies


def offline_unless_reachable() -> bool:
    """Tell the hub's client to use only its cache where the hub's name can't be resolved; True when it was told.

    Call it before the first import of huggingface_hub, transformers or datasets: they read the choice once.
    """
    host = urlsplit(hub_address()).hostname or "huggingface.co"
    # Behind a proxy, names are resolved by the proxy.
    if "HF_HUB_OFFLINE" in os.environ or getproxies().get("https") or _resolves(host):
        return False
    os.environ["HF_HUB_OFFLINE"] = "1"
    return True


def hub_address() -> str:
    """The hub, or the mirror that HF_ENDPOINT names."""
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def hub_is_off() -> bool:
    """Whether the person has switched it off."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True
