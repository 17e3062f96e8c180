"""Pure: what a starting vLLM instance is doing, from its own log lines (0.26 to 0.32)."""

from __future__ import annotations

IMPORTING = "importing"
FIRST_ANSWER = "serving a first token"
REGISTERING = "registering"
READY = "ready"
STARTING_SERVER = "starting the server"
RESTARTING = "restarting"
DRAINING = "draining"  # gets nothing new, ends what it has
GIVEN_UP = "given up"
SILENT = "silent"  # was ready; nobody hears from its node
# A line that holds the text means that the phase has begun. In the order in which they come.
MARKS: tuple[tuple[str, str], ...] = (
    ("non-default args", "reading the model's config"),
    ("Initializing a V1 LLM engine", "starting the engine"),
    ("Starting to load model", "loading weights"),
    ("Loading weights took", "warming up"),
    ("torch.compile takes", "warming up"),
    ("Start compiling function", "compiling"),
    ("Dynamo bytecode transform", "compiling"),
    ("Capturing CUDA graphs", "capturing CUDA graphs"),
    ("init engine (profile", STARTING_SERVER),
    ("Application startup complete", REGISTERING),
)


def next_phase(phase: str, lines: list[str]) -> str:
    """The phase after these log lines, given the one before them."""
    for line in lines:
        for mark, name in MARKS:
            if mark in line:
                phase = name
    return phase
