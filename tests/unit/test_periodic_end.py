"""Tasks are ended for sure, also where a library loses a cancellation."""

import asyncio

from server.periodic import end_tasks


def test_a_task_that_loses_a_cancellation_is_cancelled_again() -> None:
    """Whoever swallows the first cancellation ends at a later one, and nobody waits for ever."""

    async def deaf(num_lost: int) -> None:
        for _ in range(num_lost):
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                continue
        await asyncio.sleep(3600)

    async def run() -> list[bool]:
        tasks = [asyncio.create_task(deaf(num_lost)) for num_lost in (0, 1, 2)]
        await asyncio.sleep(0)
        async with asyncio.timeout(30):
            await end_tasks(tasks)
        return [task.cancelled() for task in tasks]

    assert asyncio.run(run()) == [True, True, True]
