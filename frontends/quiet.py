"""Keep exporters and model libraries off the terminal: their messages go to edgepress's log."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_LOG = logging.getLogger("edgepress.frontends")
_NOISY = ("torch", "transformers", "onnxscript", "onnx_ir", "huggingface_hub", "httpx", "datasets")


class _ToLog(logging.Handler):
    """Hands every record on as a debug line of our own logger."""

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler.emit`."""
        _LOG.debug("%s: %s", record.name, record.getMessage())


@contextmanager
def to_log() -> Iterator[None]:
    """While inside, warnings and log lines of torch, transformers and the hub go to our log.

    The streams stay as they are (a progress line of ours may be drawing on stderr); handlers,
    levels, warning filters and the libraries' progress bars are put back on leaving.
    """
    forward = _ToLog()
    saved: list[tuple[logging.Logger, list[logging.Handler], bool]] = []
    for logger in _loggers():
        saved.append((logger, list(logger.handlers), logger.propagate))
        logger.handlers = [forward] if logger.name in _NOISY else []
        logger.propagate = logger.name not in _NOISY
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        for logger, handlers, propagate in saved:
            logger.handlers = handlers
            logger.propagate = propagate
    for warning in caught:
        _LOG.debug("%s: %s", warning.category.__name__, warning.message)


def _loggers() -> list[logging.Logger]:
    """The noisy libraries' loggers that print by themselves, and their roots."""
    found = [logging.getLogger(name) for name in _NOISY]
    for name, logger in sorted(logging.root.manager.loggerDict.items()):
        if name in _NOISY or name.partition(".")[0] not in _NOISY or not isinstance(logger, logging.Logger):
            continue
        if any(type(handler) is logging.StreamHandler for handler in logger.handlers):
            found.append(logger)
    return found
