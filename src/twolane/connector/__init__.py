"""The KV connector: the plugin inside each vLLM process that moves KV from a prefill to a decode instance.

vLLM loads it with `"kv_connector": "TwoLaneConnector", "kv_connector_module_path": "twolane.connector"`. The class is
resolved on first access, so that the pure parts below can be imported where there is no vLLM.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "TwoLaneConnector":
        from twolane.connector.connector import TwoLaneConnector  # noqa: PLC0415 - vLLM only where it is wanted

        return TwoLaneConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
