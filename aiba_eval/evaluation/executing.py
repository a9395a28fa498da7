"""Where tasks run: here one after the other, or on dask's workers. Both give the same results, since a task depends on nothing else."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from aiba_eval.evaluation.configuration import CannotEvaluate
from aiba_eval.evaluation.workshop import Workshop

#: what the system says when there is no room: on the disk, or within a user's quota
FULL = (errno.ENOSPC, errno.EDQUOT)


class DiskFull(OSError):
    """There is no room for results. What was finished is kept, and the same command goes on there."""


@dataclass(frozen=True)
class Outcome:
    """What became of a task.

    Attributes
    ----------
    task : its name
    error : empty, or ``Type: message``
    full : whether there was no room on the disk
    """

    task: str
    error: str = ""
    full: bool = False


class Executor(Protocol):
    """Runs the tasks of one phase, in any order and anywhere."""

    def __call__(self, tasks: Sequence[str]) -> Iterator[Outcome]: ...


def attempt(workshop: Workshop, task: str) -> Outcome:
    """Do a task; whatever goes wrong with it is its outcome. An interrupt is not."""
    try:
        workshop.perform(task)
    except Exception as error:  # one broken file or prompt must not end a run of days: it is reported and counted
        return Outcome(task, f"{type(error).__name__}: {error}", _full(error))
    return Outcome(task)


def _full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that there is no room."""
    seen = 0
    while error is not None and seen < 10:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        error, seen = error.__cause__ or error.__context__, seen + 1
    return False


def here(workshop: Workshop) -> Executor:
    """In this process."""

    def run(tasks: Sequence[str]) -> Iterator[Outcome]:
        for task in tasks:
            yield attempt(workshop, task)

    return run


@contextmanager
def on_dask(workshop: Workshop, where: str) -> Iterator[Executor]:
    """On dask.distributed: ``"local:N"`` starts N processes on this machine, anything else is a scheduler's address.

    Workers write into the run's folder, which they have to see under the same path. Where workers declare a resource ``GPU`` and the
    model runs on one, each task holds one.

    Raises
    ------
    CannotEvaluate
        dask is not installed, the scheduler cannot be reached, the address is malformed, or the model was given as an object.
    """
    try:
        from distributed import Client, LocalCluster, as_completed
    except ModuleNotFoundError:
        raise CannotEvaluate('--dask needs dask.distributed: pip install "aiba[dask]"') from None
    from aiba_eval.loading import Loaded

    if isinstance(workshop.model, Loaded):
        raise CannotEvaluate(
            "with dask, give the model by its name or folder: an object in memory cannot travel to workers"
        )
    cluster = None
    if where.startswith("local:"):
        count = where.removeprefix("local:")
        if not count.isdecimal() or int(count) < 1:
            raise CannotEvaluate(f"--dask {where!r}: give local:N with a number of processes, or a scheduler's address")
        # no limit of memory: dask would set one by the number of cores, pause its workers above it and wait for ever; what they hold
        # is the model, not results
        cluster = LocalCluster(
            n_workers=int(count), threads_per_worker=1, processes=True, memory_limit=0, dashboard_address=None
        )
    try:
        try:
            client = Client(cluster if cluster is not None else where, timeout="30s")
        except (OSError, ValueError, TimeoutError) as error:
            raise CannotEvaluate(
                f"no dask scheduler at {where!r} ({error}): start one with `dask scheduler`, or give local:N"
            ) from error
        with client:
            # each worker has one, and with it the model, for as long as this client; not by content, or another run's would be found
            shared = client.scatter(workshop, broadcast=True, hash=False)
            workers: dict[str, Any] = client.scheduler_info(n_workers=-1)["workers"]
            gpu = workshop.model.device.startswith("cuda") and any("GPU" in w["resources"] for w in workers.values())
            options: dict[str, Any] = {"resources": {"GPU": 1}} if gpu else {}

            def run(tasks: Sequence[str]) -> Iterator[Outcome]:
                futures = client.map(_attempt_there, [shared] * len(tasks), tasks, pure=False, **options)
                tasks_of = {future.key: task for future, task in zip(futures, tasks, strict=True)}
                for future, outcome in as_completed(futures, with_results=True, raise_errors=False):
                    if isinstance(outcome, Outcome):
                        yield outcome
                        continue
                    # the worker died too often: what comes instead is its error, or (type, error, traceback)
                    error = outcome[1] if isinstance(outcome, tuple) else outcome
                    yield Outcome(tasks_of[future.key], f"{type(error).__name__}: {error}")

            yield run
    finally:
        if cluster is not None:
            cluster.close()


_LOCK = threading.Lock()


def _attempt_there(workshop: Workshop, task: str) -> Outcome:
    """In a worker. What was read of earlier phases may be out of date for another phase, so that it is read again."""
    phase = task.rpartition("/")[0]
    with _LOCK:  # torch's number of threads is the process's
        workshop.forget(phase)
        return attempt(workshop, task)
