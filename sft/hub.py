"""Whether the hub can be reached, found out at once: its client retries each file for half a minute first."""

import os
import socket
from urllib.parse import urlsplit
from urllib.request import getproxies


def offline_unless_reachable() -> bool:
    """Tell the hub's client to use only its cache where the hub's name can't be resolved; True when it was told.

    Call it before the first import of huggingface_hub, transformers or datasets: they read the choice once.
    """
    host = urlsplit(os.environ.get("HF_ENDPOINT", "")).hostname or "huggingface.co"
    # Behind a proxy, names are resolved by the proxy.
    if "HF_HUB_OFFLINE" in os.environ or getproxies().get("https") or _resolves(host):
        return False
    os.environ["HF_HUB_OFFLINE"] = "1"
    return True


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True
