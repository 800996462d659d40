"""Whether weights that timm publishes can be had at all, found out in a moment.

The hub's client tries ten times before it gives up, which without a network takes more than a minute. One connection
that does not come about within `PATIENCE_S` tells the same.
"""

import socket
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants
from torch import hub

if TYPE_CHECKING:
    from timm.models import PretrainedCfg

PATIENCE_S = 3.0


def hindrance(config: "PretrainedCfg") -> str | None:
    """Why the weights of `config`, which are not in the hub's cache, cannot be downloaded; None where they can, as far
    as one connection tells."""
    if config.hf_hub_id:
        repository = config.hf_hub_id.partition("@")[0].replace("/", "--")
        if config.custom_load and (Path(constants.HF_HUB_CACHE) / f"models--{repository}" / "snapshots").is_dir():
            return None  # in a format of their authors, under a name that timm knows
        if constants.HF_HUB_OFFLINE:
            return "HF_HUB_OFFLINE is set"
        return _unreachable(constants.ENDPOINT)
    if not config.url or (Path(hub.get_dir()) / "checkpoints" / Path(urlsplit(config.url).path).name).exists():
        return None
    return _unreachable(config.url)


def _unreachable(url: str) -> str | None:
    """Why the host of `url`, or the proxy in front of it, takes no connection; None where it does."""
    scheme = urlsplit(url).scheme
    target = urlsplit(getproxies().get(scheme) or url)
    port = target.port or {"http": 80}.get(target.scheme, 443)
    answers: list[str | None] = []

    def connect() -> None:
        try:
            socket.create_connection((target.hostname, port), PATIENCE_S).close()
            answers.append(None)
        except OSError as error:
            answers.append(error.strerror or str(error))

    # In a thread, because looking up a name has no limit of its own.
    thread = Thread(target=connect, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    why = answers[0] if answers else f"no answer within {PATIENCE_S:g} s"
    return None if why is None else f"{target.hostname}: {why}"
