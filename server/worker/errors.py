"""What stops the work on a job inside the worker, beside what a pipeline or a dependency raises."""


class LeaseLost(Exception):
    """Raised when a job is not ours any more: what we have of it is dropped, and nothing else is touched."""


class ModelChanged(Exception):
    """Raised when a job was accepted for a version or for weights of its model that this server has no more."""


class ModelUnavailable(Exception):
    """Raised when a job needs a model that this worker cannot load; another worker may."""


class MemoryInPieces(Exception):
    """Raised when a run ended for want of memory in which one as large has fitted before: another try may do better."""
