"""TwoLane: vLLM in two lanes, prefill and decode, on one machine."""

__version__ = "0.1.0"
