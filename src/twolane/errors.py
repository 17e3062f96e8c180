"""Every error TwoLane raises on purpose: one tree by cause, one HTTP status each.

A message names the cause and the remedy, since it is printed as it stands: to the terminal by the CLI, to the client as
an OpenAI error object by the proxy.
"""

from __future__ import annotations

from typing import ClassVar


class TwoLaneError(Exception):
    """Base of the tree. `status` is the HTTP status the proxy answers with, `kind` the `type` of the error object."""

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "internal_error"


class ConfigError(TwoLaneError):
    """A setting, flag or environment variable is wrong, or the machine can't do what it asks for."""


class StartError(TwoLaneError):
    """A service did not come up."""


class BadRequestError(TwoLaneError):
    """The client's request can't be understood."""

    status = 400
    kind = "invalid_request_error"


class UnauthorizedError(BadRequestError):
    """The proxy has keys of its own, and the client gave none of them."""

    status = 401
    kind = "authentication_error"


class NotFoundError(BadRequestError):
    status = 404
    kind = "not_found_error"


class MethodNotAllowedError(BadRequestError):
    status = 405

    def __init__(self, method: str, path: str, allowed: tuple[str, ...]) -> None:
        super().__init__(f"{path} doesn't take {method}; it takes {', '.join(allowed)}")
        self.allowed = allowed


class RequestTimeoutError(BadRequestError):
    """The client took too long to send its request."""

    status = 408


class BodyTooLargeError(BadRequestError):
    status = 413


class HeaderTooLargeError(BadRequestError):
    status = 431


class TooBusyError(TwoLaneError):
    """More requests than the proxy was told to take at once, and no turn came within the deadline."""

    status = 429
    kind = "rate_limit_error"


class NoInstanceError(TwoLaneError):
    """No instance can take the request now; worth trying again soon."""

    status = 503
    kind = "service_unavailable"


class UpstreamError(TwoLaneError):
    """An instance failed before it sent a byte of its answer, and no other could take over."""

    status = 502
    kind = "bad_gateway"
    cause: ClassVar[str] = "answer"  # what counts of retries are by: a 5xx, no HTTP, too much of it, ...


class UpstreamConnectionError(UpstreamError):
    """The connection to an instance was refused or broke: the instance is taken out until it answers a probe."""

    cause = "connection"


class StaleConnectionError(UpstreamConnectionError):
    """A kept-alive connection ended before a byte of the answer; says nothing about the instance's health."""

    cause = "stale_connection"


class UpstreamTimeoutError(UpstreamError):
    status = 504
    kind = "gateway_timeout"
    cause = "timeout"


class NoDescriptorError(UpstreamError):
    """The proxy could open no connection for want of something of its own: says nothing about the instance's health."""

    status = 503
    kind = "service_unavailable"


RETRY_CAUSES = tuple(
    error.cause for error in (UpstreamError, UpstreamConnectionError, StaleConnectionError, UpstreamTimeoutError)
)


class TransferError(TwoLaneError):
    """A KV transfer can't go on. Never reaches a client: the decode instance recomputes the prompt."""


class IncompatibleError(TransferError):
    """The two sides' KV caches don't match (model, dtype, block size, layout, version)."""
