"""Several processes that compress one model together, as torchrun starts them.

Each runs its part of the calibration samples and does its part of the decompositions; process 0
reads the calibration data, writes the result, and speaks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from lorap.errors import (
    Interrupted,
    LorapError,
    LostProcessError,
    ResumableError,
    UsageError,
    first_line,
)

T = TypeVar("T")
Result = tuple[dict[str, Tensor], Any]
"""Tensors, and what JSON can hold."""

TIMEOUT = timedelta(hours=2)
"""Longest wait for another process. One that has died is missed at once; this ends the wait for one
whose machine does not answer, and is longer than any piece of work."""

MEETING = timedelta(minutes=10)
"""Longest wait for the others to be there."""

_FAILURE = "lorap/failure"

_KINDS: tuple[type[LorapError], ...] = (UsageError, ResumableError, LorapError)
"""Of an error, the first that it is."""


class Processes:
    """The processes of a run, and this one among them.

    What is done together has to be called by all of them, in the same order. By default one process
    that is alone, for which that is no work at all.

    Parameters
    ----------
    rank : int
        Number of this process, from 0.
    size : int
        Number of processes.
    local_rank, local_size : int
        The same among those on this machine.
    store : Store, optional
        Of torch.distributed, for words between processes that have ended; needed for more than one.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        local_rank: int = 0,
        local_size: int = 1,
        store: Store | None = None,
    ) -> None:
        self.rank = rank
        self.size = size
        self.local_rank = local_rank
        self.local_size = local_size
        self._store = store

    def part(self, count: int) -> slice:
        """Return which of so many samples are this process's own.

        Notes
        -----
        SPEC: ``algorithm.processes``.
        """
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def device(self, device: torch.device) -> torch.device:
        """Return this process's own device of that kind.

        Raises
        ------
        UsageError
            If this machine has fewer GPUs than processes.
        """
        if self.size == 1 or device.type != "cuda":
            return device
        count = torch.cuda.device_count()
        if self.local_rank >= count:
            raise UsageError(
                f"expected a GPU for each process, got {count} for the {self.local_size} processes "
                "of a machine; start fewer (--nproc-per-node), or give --device cpu"
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def wait(self) -> None:
        """Wait until all processes have come so far."""
        self.total(0)

    def sum_(self, *tensors: Tensor) -> None:
        """Replace tensors by their sums over the processes, the same in all.

        Parameters
        ----------
        *tensors : Tensor
            Contiguous, of the same shapes in all.

        Notes
        -----
        SPEC: ``algorithm.processes``.
        """
        for tensor in tensors:
            self._together(dist.all_reduce, tensor)

    def total(self, *numbers: float) -> list[float]:
        """Return the sums of numbers over the processes."""
        sums = torch.tensor(numbers, dtype=torch.float64)
        self.sum_(sums)
        return sums.tolist()

    def tell(self, value: T, source: int = 0) -> T:
        """Return what one process has to say; what the others give is not looked at.

        Parameters
        ----------
        value : object
            What JSON can hold.
        source : int
            Number of the process.
        """
        if self.size == 1:
            return value
        text = bytearray(json.dumps(value).encode())
        length = torch.tensor([len(text)])
        self._together(dist.broadcast, length, src=source)
        said = torch.empty(int(length), dtype=torch.uint8)
        if self.rank == source:
            said = torch.frombuffer(text, dtype=torch.uint8)
        self._together(dist.broadcast, said, src=source)
        result: T = json.loads(said.numpy().tobytes())
        return result

    def share(self, tensors: Mapping[str, Tensor], source: int = 0) -> dict[str, Tensor]:
        """Return the tensors of one process; what the others give is not looked at.

        Parameters
        ----------
        tensors : mapping
        source : int
            Number of the process.

        Returns
        -------
        dict
            Equal to the last bit in all processes, each on its own device of the kind.
        """
        if self.size == 1:
            return dict(tensors)
        about = [
            (name, str(t.dtype).removeprefix("torch."), list(t.shape), t.device.type)
            for name, t in tensors.items()
        ]
        found = {}
        for name, dtype, shape, place in self.tell(about, source):
            if self.rank == source:
                tensor = tensors[name].contiguous()
            else:
                tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=place)
            # As bytes: not every backend knows every dtype.
            self._together(dist.broadcast, tensor.view(-1).view(torch.uint8), src=source)
            found[name] = tensor
        return found

    def each(
        self, jobs: Sequence[T], cost: Callable[[T], float], work: Callable[[T], Result]
    ) -> Iterator[tuple[T, Result]]:
        """Do each of several jobs in one process, and give the results to all.

        Parameters
        ----------
        jobs : sequence
        cost : callable
            About how long a job takes, in any unit.
        work : callable
            Does a job; the jobs do not depend on each other.

        Yields
        ------
        job, result
            In the order of the jobs.

        Notes
        -----
        SPEC: ``algorithm.processes``.
        """
        owners = shared_out([cost(job) for job in jobs], self.size)
        if self.size == 1:
            yield from ((job, work(job)) for job in jobs)
            return
        own = {i: work(job) for i, job in enumerate(jobs) if owners[i] == self.rank}
        for index, job in enumerate(jobs):
            tensors, said = own.pop(index, ({}, None))
            shared = self.share(tensors, owners[index])
            yield job, (shared, self.tell(said, owners[index]))

    def failed(self, error: BaseException) -> None:
        """Let the others know why this process ends."""
        if self._store is None or isinstance(error, LostProcessError):
            return
        kind = next((i for i, kind in enumerate(_KINDS) if isinstance(error, kind)), None)
        failure = {
            "rank": self.rank,
            "interrupted": isinstance(error, KeyboardInterrupt),
            "message": None if kind is None else str(error),
            "kind": kind,
        }
        # The process that keeps the store may be gone.
        with contextlib.suppress(RuntimeError):
            if self._store.add(f"{_FAILURE}/count", 1) == 1:
                self._store.set(_FAILURE, json.dumps(failure))

    def said(self, text: str) -> bool:
        """Return whether a process has said the same before; from now on one has."""
        key = hashlib.sha256(text.encode()).hexdigest()
        try:
            return self._store is not None and self._store.add(f"lorap/said/{key}", 1) > 1
        except RuntimeError:
            return False

    def _together(self, operation: Callable[..., object], tensor: Tensor, **options: Any) -> None:
        if self.size == 1:
            return
        try:
            if tensor.is_cuda:
                # Here a process that is gone gives an error; NCCL would wait for it.
                dist.all_reduce(torch.zeros(1))
            operation(tensor, **options)
        except RuntimeError as error:
            # torchrun tells all processes to end, which must not interrupt the tidying up.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise self._lost() from error

    def _lost(self) -> LorapError:
        """Return what to raise in the place of an error that another process has caused."""
        assert self._store is not None
        failure = None
        with contextlib.suppress(RuntimeError):
            if self._store.check([_FAILURE]):
                failure = json.loads(self._store.get(_FAILURE))
        if failure is None:
            # Process 0 will say more, if it is there.
            way_on = "" if self.rank == 0 else "; --resume goes on with what was finished"
            return LostProcessError(f"a process of this run died or was stopped{way_on}")
        if failure["message"] is not None:
            # What one process cannot do, the run cannot do.
            kind: type[LorapError] = _KINDS[failure["kind"]]
            return kind(failure["message"])
        what = "was interrupted" if failure["interrupted"] else "failed: see its message"
        return LostProcessError(f"process {failure['rank']} of {self.size} {what}")


ALONE = Processes()
"""The only process of a run."""


def shared_out(costs: Sequence[float], size: int) -> list[int]:
    """Return which process does which job.

    The longest job comes first, and goes to the process that has least to do by then; of equals to
    the first.

    Parameters
    ----------
    costs : sequence of float
        Of the jobs.
    size : int
        Number of processes.

    Notes
    -----
    SPEC: ``algorithm.processes``.
    """
    owners, loads = [0] * len(costs), [0.0] * size
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += costs[index]
    return owners


@contextlib.contextmanager
def _silent_stdout() -> Iterator[None]:
    """Drop what gloo prints when it connects, in some versions (pytorch/gloo, issue 462)."""
    sys.stdout.flush()
    kept = os.dup(1)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@contextlib.contextmanager
def join() -> Iterator[Processes]:
    """Join the processes that torchrun has started, this one among them.

    Tensors on GPUs are exchanged by NCCL, all else by gloo. An error that ends the context ends the
    other processes too, at their next exchange; from then on they ignore SIGTERM, by which torchrun
    ends what is left of a run.

    Raises
    ------
    LorapError
        If they do not find each other.
    """
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store, rank, size = next(rendezvous("env://", timeout=MEETING))
        with _silent_stdout():
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT
            )
    except (RuntimeError, ValueError) as error:
        raise LorapError(f"the processes did not find each other: {first_line(error)}") from error
    local_rank, local_size = (int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    processes = Processes(rank, size, local_rank, local_size, store)
    try:
        yield processes
    except BaseException as error:
        if isinstance(error, Interrupted) and error.number == signal.SIGTERM:
            error.add_note("torchrun ends all processes of a run when one has failed or died")
        processes.failed(error)
        raise
    finally:
        dist.destroy_process_group()
