"""Workers of a Ray cluster share the measuring of one model: each reads a share of the text, and sums are added up."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankfold.calibration import Observer, is_reached, observed_blocks, summed_loss
from rankfold.checkpoint import load_model
from rankfold.circumstances import versions
from rankfold.compression import decomposed
from rankfold.errors import InputError
from rankfold.factorization import METHODS, Ordered, SiteMoments
from rankfold.fingerprint import fingerprint
from rankfold.modules import linear_at
from rankfold.progress import Step
from rankfold.shelf import Shelf
from rankfold.sites import Site, find_sites

RETRIES = 3
"""How often a block is factorized again when the machine that did so is lost."""

AHEAD = 2
"""Blocks of a worker that may wait for the others'."""


@dataclass(frozen=True)
class Job:
    """What a worker has to know to measure what the others measure."""

    source: str
    digest: str
    versions: dict[str, str]
    dtype: torch.dtype
    device: str
    names: tuple[str, ...]
    labels: str
    seed: int
    memory: int
    products: bool = False


def connect(address: str | None, workers: int, device: str) -> Any:
    """Ray, connected to a cluster that holds some workers.

    Args:
        address: Address of a running cluster, `auto` for the one of this machine; without it one is started here.
        workers: Workers, each with one processor or accelerator.
        device: Where they compute.

    Raises:
        ValueError: If Ray is missing, nothing answers at the address, or the cluster is too small.
    """
    try:
        import ray as ray_library

        # Ray's annotations do not fit what its documentation does.
        ray: Any = ray_library
    except ImportError as error:
        raise InputError("Workers on a cluster need Ray: pip install 'rankfold[ray]'") from error
    if not ray.is_initialized():
        try:
            ray.init(
                address=address, num_cpus=None if address else workers, log_to_driver=False, logging_level=logging.ERROR
            )
        except ConnectionError as error:
            raise InputError(f"{address}: no Ray cluster answers there. Start one with: ray start --head") from error
    kind = "GPU" if device.startswith("cuda") else "CPU"
    total = ray.cluster_resources().get(kind, 0)
    if total < workers:
        raise InputError(f"The Ray cluster has {total:g} {kind}s, but {workers} workers need one each. Start fewer.")
    return ray


def share_of_machine(device: str) -> dict[str, int]:
    """What one worker takes of a machine, in Ray's words."""
    return {"num_gpus": 1} if device.startswith("cuda") else {"num_cpus": 1}


class Workers:
    """Workers that measure one model together; each loads it from where it came from.

    The moments are sums over the text, so each worker walks through the blocks with its share of the batches; what
    they saw of a block is added up here, and factorized by whichever is free. A worker that is lost costs its part of
    the work: another one does that again, beside its own and with a model of its own.
    """

    def __init__(
        self,
        model: Any,
        batches: Sequence[Mapping[str, Tensor]],
        labels: str,
        seed: int,
        *,
        count: int,
        address: str | None,
        memory: int,
    ) -> None:
        """Connect to the cluster.

        Args:
            model: The model, unchanged since it was loaded from its folder or by its name on the hub.
            batches: Calibration batches.
            labels: Where labels come from; drawn ones are others than those of one process.
            seed: Seed of what is drawn.
            count: Workers.
            address: Address of a running cluster, `auto`, or `None` to start one here.
            memory: Bytes beyond which each worker's hidden states lie on disk.

        Raises:
            ValueError: If there are fewer batches than workers, or the cluster cannot be used.
        """
        if len(batches) < count:
            raise InputError(
                f"Each of {count} workers reads some of the batches, but there are {len(batches)}. Start fewer, or "
                "pass more or smaller batches (`sequences`, `batch_size`)."
            )
        place = next(model.parameters()).device
        self.device = place.type
        self._ray = connect(address, count, self.device)
        source = model.name_or_path
        if Path(source).exists():
            # Workers run in folders of their own.
            source = str(Path(source).resolve())
        self._model, self._memory, self._labels, self._seed = model, memory, labels, seed
        self._source, self._digest = source, fingerprint(model)
        self._shares = [[_moved(batch, "cpu") for batch in batches[start::count]] for start in range(count)]

    def factors(
        self, sites: Sequence[Site], method: str, on_step: Step, *, products: bool = False
    ) -> Iterator[tuple[str, Ordered]]:
        """The factors of every rank of each site that the text reaches, as `compress_in_rounds` works them out.

        With `products`, the moment of a matrix's wider side is measured as `calibrate_blocks` does.

        Raises:
            ValueError: If a worker reads another model or other versions, or fails.
        """
        # Beside the measuring, which holds all processors until its end.
        options = {"num_cpus": 0, "max_retries": RETRIES, "scheduling_strategy": "SPREAD"}
        work = self._ray.remote(**options)(_factorized)
        running: deque[Any] = deque()
        for seen in self._blocks(sites, on_step, products):
            layers = {name: linear_at(self._model, name) for name in seen.names}
            running.append(work.remote(method, layers, seen))
            if len(running) > len(self._shares):
                yield from self._result(running.popleft()).items()
        while running:
            yield from self._result(running.popleft()).items()

    def moments(self, sites: Sequence[Site], on_step: Step) -> Iterator[tuple[str, SiteMoments]]:
        """The moments of each site, as `calibrate` measures them.

        Raises:
            ValueError: If a worker reads another model or other versions, or fails.
        """
        for seen in self._blocks(sites, on_step):
            yield from seen.moments().items()

    def _blocks(self, sites: Sequence[Site], on_step: Step, products: bool = False) -> Iterator[Observer]:
        """What all workers saw of block after block."""
        job = Job(
            source=self._source,
            digest=self._digest,
            versions=versions(),
            dtype=next(self._model.parameters()).dtype,
            device=self.device,
            names=tuple(site.name for site in sites),
            labels=self._labels,
            seed=self._seed,
            memory=self._memory,
            products=products,
        )
        # A worker that is lost is not started again: another takes its share, since its machine may not come back.
        options = {**share_of_machine(self.device), "max_restarts": 0, "scheduling_strategy": "SPREAD"}
        reader = self._ray.remote(**options)(_Reader)
        walks = Walks(self._ray, [reader.remote() for _ in self._shares], job, self._shares)
        batches = sum(map(len, self._shares))
        try:
            while (seen := self._sum(walks)) is not None:
                for _ in range(2 * batches):
                    on_step()
                yield seen
        finally:
            walks.close()

    def _sum(self, walks: Walks) -> Observer | None:
        """What all workers saw of the next block, in the order of the shares; `None` after the last."""
        seen: Observer | None = None
        for number in range(len(self._shares)):
            part = self._told(lambda: walks.next(number))  # noqa: B023
            if seen is None:
                seen = part
            elif part is not None:
                seen.add(part)
        return seen

    def _result(self, reference: Any) -> Any:
        return self._told(lambda: self._ray.get(reference))

    def _told(self, get: Callable[[], Any]) -> Any:
        """What comes from a worker; what goes wrong there is said here."""
        try:
            return get()
        except self._ray.exceptions.RayTaskError as error:
            raise InputError(f"A worker failed: {error.cause}") from error
        except self._ray.exceptions.RayError as error:
            raise InputError(f"Workers were lost and their work could not be done again: {error}") from error


class Walks:
    """Every share's walk through the blocks, each on one of the readers; those of a lost reader go to another."""

    def __init__(self, ray: Any, readers: Sequence[Any], job: Job, shares: Sequence[list[dict[str, Tensor]]]) -> None:
        self._ray, self._readers, self._job, self._shares = ray, list(readers), job, shares
        self._taken = [0] * len(shares)
        self._of: dict[int, Any] = {}
        self._waiting: dict[int, deque[Any]] = {}
        for number, reader in enumerate(readers):
            self._begin(number, reader)

    def next(self, number: int) -> Observer | None:
        """What a share's walk saw of its next block; `None` after the last.

        Raises:
            ray.exceptions.RayError: If the reader failed, or all are lost.
        """
        lost = (self._ray.exceptions.RayActorError, self._ray.exceptions.ObjectLostError)
        while True:
            try:
                seen: Observer | None = self._ray.get(self._waiting[number][0])
            except lost:
                self._hand_on(self._of[number])
                continue
            self._waiting[number].popleft()
            self._taken[number] += 1
            self._ask(number)
            return seen

    def close(self) -> None:
        """Let the readers go."""
        for reader in self._readers:
            self._ray.kill(reader)

    def _begin(self, number: int, reader: Any) -> None:
        self._of[number], self._waiting[number] = reader, deque()
        reader.begin.remote(self._job, number, self._shares[number], self._taken[number])
        for _ in range(AHEAD):
            self._ask(number)

    def _ask(self, number: int) -> None:
        self._waiting[number].append(self._of[number].block.remote(number))

    def _hand_on(self, reader: Any) -> None:
        """Share out the walks of a lost reader; without any other the loss is told."""
        # One that cannot be reached may still run.
        self._ray.kill(reader)
        self._readers = [other for other in self._readers if other is not reader]
        if not self._readers:
            raise self._ray.exceptions.RayActorError(error_msg="all workers were lost")
        for place, number in enumerate([number for number, owner in self._of.items() if owner is reader]):
            self._begin(number, self._readers[place % len(self._readers)])


class _Reader:
    """What runs on a worker's machine: walks over one or more shares, each with a model of its own."""

    def __init__(self) -> None:
        self._walks: dict[int, Iterator[Observer]] = {}

    def begin(self, job: Job, number: int, batches: list[dict[str, Tensor]], taken: int) -> None:
        """Start a walk, past the blocks that were taken already."""
        self._walks[number] = islice(_observed(job, number, batches), taken, None)

    def block(self, number: int) -> Observer | None:
        """What a walk sees of its next block."""
        return next(self._walks[number], None)


def _observed(job: Job, number: int, batches: list[dict[str, Tensor]]) -> Iterator[Observer]:
    """What a worker does: of every block its sums over a share of the batches."""
    torch.set_num_threads(1)
    here = versions()
    if here != job.versions:
        other = next(name for name in {**here, **job.versions} if here.get(name) != job.versions.get(name))
        raise InputError(
            f"all machines must run the same versions, but {other} is {here.get(other)} here and "
            f"{job.versions.get(other)} where the work began"
        )
    model = load_model(job.source, dtype=job.dtype, device=job.device, dense=True)
    if fingerprint(model) != job.digest:
        raise InputError(
            f"{job.source}: every worker loads the model from there, but what lies there has other weights than the "
            "model that was given; save it first, where every machine finds it"
        )
    sites = find_sites(model).select(job.names)
    loss = summed_loss(model, job.labels, job.seed + number)
    moved = [_moved(batch, job.device) for batch in batches]
    shelf = Shelf(job.memory)
    for _, observer in observed_blocks(model, sites, moved, loss=loss, shelf=shelf, products=job.products):
        yield observer.to_cpu()


@torch.no_grad()
def _factorized(method: str, layers: dict[str, Any], seen: Observer) -> dict[str, Ordered]:
    """The factors of a block's sites, from what all workers saw."""
    decompose = METHODS[method].ordered
    assert decompose is not None, "asked before"
    return {
        name: decomposed(name, layers[name], known, decompose)
        for name, known in seen.moments().items()
        if is_reached(known, gradients=True)
    }


def _moved(batch: Mapping[str, Tensor], device: str) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in batch.items()}
