"""A job as the lane and its policy see it: what it waits for, and the run that it gets."""

from dataclasses import dataclass

from pipelines.running import LoraChoice, Run, RunRequest
from server.jobs import Priority
from server.worker.hand import JobInHand


@dataclass(eq=False)
class LaneJob:
    """A job whose photos are ready, as the policy sees it.

    Attributes:
        in_hand: the job.
        run: None until its first step, and again when it must start anew.
        is_exclusive: its model cannot have two runs under way.
        had_room: it has had the device's memory to itself.
        waited_seconds: how long others have had the device meanwhile.
    """

    in_hand: JobInHand
    run: Run | None = None
    is_exclusive: bool = False
    had_room: bool = False
    waited_seconds: float = 0.0

    @property
    def priority(self) -> Priority:
        """As it was submitted."""
        return self.in_hand.job.priority

    @property
    def order(self) -> int:
        """Number of its claim."""
        return self.in_hand.order

    @property
    def is_under_way(self) -> bool:
        """Whether its run has begun."""
        return self.run is not None

    @property
    def model(self) -> tuple[str, str]:
        """Which weights it needs in memory."""
        return self.in_hand.job.model, self.in_hand.job.model_version

    @property
    def variant(self) -> object:
        """Its LoRAs: they change the model itself, for all of its runs."""
        return self.in_hand.job.loras

    @property
    def num_pixels(self) -> int:
        """What its run computes on: all that it reads and makes."""
        params = self.in_hand.params
        return params["height"] * params["width"] + sum(one.height * one.width for one in self.in_hand.photos)

    def request(self, area: int) -> RunRequest:
        """Return what its run is asked for, of a model that reads photos at `area` pixels."""
        job = self.in_hand.job
        return RunRequest(
            prompt=job.prompt,
            negative_prompt=job.negative_prompt,
            params=self.in_hand.params,
            area=area,
            loras=tuple(LoraChoice(lora["id"], lora["scale"]) for lora in job.loras),
        )
