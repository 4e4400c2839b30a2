"""Workers of a Ray cluster share the measuring of one model: each reads a share of the text, and sums are added up."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
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
"""How often a worker's part is done again when its machine is lost."""

AHEAD = 4
"""Results of a worker that may wait for the others: two for each block."""


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

    The moments are sums over the text, so each worker walks through the blocks with its share of the batches, and what
    they saw of a block is added up, and factorized, by whichever is free. A worker that is lost costs its part of the
    work: another one does that again.
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

    def factors(self, sites: Sequence[Site], method: str, on_step: Step) -> Iterator[tuple[str, Ordered]]:
        """The factors of every rank of each site that the text reaches, as `compress_in_rounds` works them out.

        Raises:
            ValueError: If a worker reads another model or other versions, or fails.
        """
        # Beside the measuring, which holds all processors until what it found is taken.
        work = self._task(_factorized, {"num_cpus": 0})
        running: deque[Any] = deque()
        for names, parts in self._blocks(sites, on_step):
            layers = {name: linear_at(self._model, name) for name in names}
            running.append(work.remote(method, layers, *parts))
            if len(running) > len(self._shares):
                yield from self._result(running.popleft()).items()
        while running:
            yield from self._result(running.popleft()).items()

    def moments(self, sites: Sequence[Site], on_step: Step) -> Iterator[tuple[str, SiteMoments]]:
        """The moments of each site, as `calibrate` measures them.

        Raises:
            ValueError: If a worker reads another model or other versions, or fails.
        """
        for _, parts in self._blocks(sites, on_step):
            yield from _sum([self._result(part) for part in parts]).moments().items()

    def _blocks(self, sites: Sequence[Site], on_step: Step) -> Iterator[tuple[tuple[str, ...], list[Any]]]:
        """Of block after block the sites' names, and where each worker's sums lie."""
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
        )
        settings = {"num_returns": "streaming", "_generator_backpressure_num_objects": AHEAD}
        # Ray looks for a generator function, which what a runtime type checker makes of `_observed` is not.
        task = self._task(lambda *given: (yield from _observed(*given)), share_of_machine(self.device), **settings)
        streams = [task.remote(job, number, share) for number, share in enumerate(self._shares)]
        batches = sum(map(len, self._shares))
        for named in zip_longest(*streams):
            names, *_ = [self._result(name) for name in named]
            parts = [next(stream) for stream in streams]
            for _ in range(2 * batches):
                on_step()
            yield names, parts

    def _task(self, function: Callable[..., Any], needs: Mapping[str, int], **settings: Any) -> Any:
        return self._ray.remote(max_retries=RETRIES, scheduling_strategy="SPREAD", **needs, **settings)(function)

    def _result(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise InputError(f"A worker failed: {error.cause}") from error
        except self._ray.exceptions.RayError as error:
            raise InputError(f"Workers were lost and their work could not be done again: {error}") from error


def _observed(job: Job, number: int, batches: list[dict[str, Tensor]]) -> Iterator[Any]:
    """What a worker does: of every block its sites' names, then its sums over a share of the batches."""
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
    for _, observer in observed_blocks(model, sites, moved, loss=loss, shelf=Shelf(job.memory)):
        yield observer.names
        yield observer.to_cpu()


@torch.no_grad()
def _factorized(method: str, layers: dict[str, Any], *parts: Observer) -> dict[str, Ordered]:
    """The factors of a block's sites, from what all workers saw."""
    decompose = METHODS[method].ordered
    assert decompose is not None, "asked before"
    moments = _sum(parts).moments()
    return {
        name: decomposed(name, layers[name], known, decompose)
        for name, known in moments.items()
        if is_reached(known, gradients=True)
    }


def _sum(parts: Sequence[Observer]) -> Observer:
    """What several workers saw, all of which are used up."""
    first, *others = parts
    for other in others:
        first.add(other)
    return first


def _moved(batch: Mapping[str, Tensor], device: str) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in batch.items()}
