"""What can go wrong while a photo is edited, as the worker tells it apart.

PipelineError
├─ BadInput            the photo or the request; the job fails as `invalid_input` and is not tried again
├─ OutOfMemory         the device; evict, try once more, then the job fails as `out_of_memory`
├─ Cancelled           a cancel reached the run
├─ DeadlineExceeded    the run used up its time on the device
├─ OptimizationUnavailable  this machine cannot run the model as its entry asks; the worker serves the others
└─ WeightsError        the model cannot be loaded; the worker serves the others
   └─ WeightsMissing   its folder is not there, as on every machine that serves only some of the models
"""


class PipelineError(Exception):
    """Base of what the worker expects from a run."""


class BadInput(PipelineError):
    """Raised when a photo cannot be decoded or a request cannot be run by its model."""


class OutOfMemory(PipelineError):
    """Raised when the device has too little memory for a run."""


class Cancelled(PipelineError):
    """Raised when a run was told to stop before its next step."""


class DeadlineExceeded(PipelineError):
    """Raised when a run used up its time on the device."""


class OptimizationUnavailable(PipelineError):
    """Raised when a model cannot be run here as its entry's `optimizations` ask."""


class WeightsError(PipelineError):
    """Raised when a model's weights are missing, damaged, of the wrong format or of another model."""


class WeightsMissing(WeightsError):
    """Raised when the folder of a model's weights is not there at all."""
