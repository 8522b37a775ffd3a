"""Notices when a device's free memory has gone to pieces: only another process has it in one piece again."""

# So many runs of a model did not fit, although one as large did before and nothing else was in memory.
MOST_ODD_FAILURES = 3


class Wear:
    """What fitted into the device so far, by model; for the lane alone.

    Attributes:
        is_worn_out: whether the process should end.
    """

    def __init__(self) -> None:
        self._largest_pixels: dict[str, int] = {}
        # Of each model: the pixels of the runs that failed oddly since one as large as any of them has fitted.
        self._odd_failures: dict[str, list[int]] = {}
        self.is_worn_out = False

    def note_fit(self, model: str, num_pixels: int) -> None:
        """Hear that a run went well; smaller ones that do say nothing of the larger that failed."""
        self._largest_pixels[model] = max(self._largest_pixels.get(model, 0), num_pixels)
        if num_pixels >= max(self._odd_failures.get(model, []), default=0):
            self._odd_failures.pop(model, None)

    def note_failure(self, model: str, num_pixels: int) -> bool:
        """Hear that memory ended, although the run had the device to itself; tells whether that is odd.

        It is where a run as large has fitted before.
        """
        if num_pixels > self._largest_pixels.get(model, 0):
            return False
        failures = self._odd_failures.setdefault(model, [])
        failures.append(num_pixels)
        self.is_worn_out = self.is_worn_out or len(failures) >= MOST_ODD_FAILURES
        return True
