"""Error kinds of pymoe, and the one sentence they all speak.

Every message has the form ``<call>: <argument> must <rule>; got <value>. <remedy>.`` (see :func:`complaint`).
"""

__all__ = [
    "ArgumentError",
    "BackendUnavailableError",
    "CheckpointError",
    "ClosedError",
    "CommError",
    "DTypeError",
    "KernelCompileError",
    "PymoeError",
    "ShapeError",
    "UnsupportedError",
    "complaint",
]


class PymoeError(Exception):
    """Base of every error that pymoe raises on purpose."""


class ShapeError(PymoeError, ValueError):
    """An array has the wrong number of axes or the wrong length along one of them."""


class DTypeError(PymoeError, TypeError):
    """An argument has the wrong type, or an array the wrong element type."""


class ArgumentError(PymoeError, ValueError):
    """An argument has the right type and shape but a value outside its rule."""


class UnsupportedError(PymoeError, NotImplementedError):
    """This backend cannot do what was asked; another backend, or a later version, may."""


class BackendUnavailableError(PymoeError, ImportError):
    """A library, driver or device that the call needs is not there."""


class KernelCompileError(PymoeError, RuntimeError):
    """A device kernel did not compile; carries the source path, the options and the log."""


class CheckpointError(PymoeError, ValueError):
    """A checkpoint file is malformed, hostile, incomplete, or of a family that pymoe does not know."""


class CommError(PymoeError, RuntimeError):
    """The ranks disagree, or one of them failed or stalled.

    Attributes
    ----------
    rank : int or None
        The rank that failed, or the first that differs.
    field : str or None
        What the ranks disagree in; None where a rank raised or stalled.
    """

    rank: int | None = None
    field: str | None = None


class ClosedError(PymoeError, RuntimeError):
    """The object was closed before this call."""


def complaint(call: str, argument: str, rule: str, value: object, remedy: str = "") -> str:
    """Return ``<call>: <argument> must <rule>; got <value>.`` and the remedy, if there is one.

    Parameters
    ----------
    call, argument : str
        The public function and the argument's own name.
    rule : str
        What the argument must be or do, without the word "must".
    value : object
        What was given; shown by ``str``.
    remedy : str
        One sentence without its full stop; empty for none.

    Examples
    --------
    >>> complaint("permute", "topk_ids", "have an integer dtype", "float32", "Use topk_ids.astype('int32')")
    "permute: topk_ids must have an integer dtype; got float32. Use topk_ids.astype('int32')."
    """
    text = f"{call}: {argument} must {rule}; got {value}."
    return f"{text} {remedy}." if remedy else text
