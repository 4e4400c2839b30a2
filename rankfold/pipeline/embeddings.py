"""The embeddings of one compression: in the width that leaves the whole model the smallest predicted loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from rankfold.errors import InputError
from rankfold.modules import put_embeddings
from rankfold.pipeline.settings import UNTOUCHED
from rankfold.plan import Plan
from rankfold.progress import Stage
from rankfold.quantization import Width, embedding_widths, find_embeddings, put_in_bits

OPTIMISM = 2.0
"""How much more an optimized plan loses than is predicted of it (docs/log.md)."""


class EmbeddingWidths:
    """Widths of a dense model's embeddings with what each costs, of which one is put in place with every plan."""

    def __init__(self, model: Any, batches: Sequence[Mapping[str, Tensor]], bits: Sequence[int], stage: Stage) -> None:
        """What each width costs is measured here.

        Args:
            model: The model, dense but for what was compressed earlier.
            batches: Text to round by and to measure on.
            bits: Widths to choose among, `UNTOUCHED` for leaving the embeddings as they are.
            stage: Opens a stage of work.
        """
        self._model, self._batches = model, batches
        self._dense = find_embeddings(model)
        self._tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
        few = [width for width in bits if width != UNTOUCHED]
        self._widths = embedding_widths(model, batches, few, stage("measuring embeddings in few bits", len(few)))
        if UNTOUCHED in bits:
            self._widths.append(Width(UNTOUCHED, self.dense_bytes, 0.0))
        self._chosen: Width | None = None
        self._facts: dict[str, Any] = {}

    @property
    def dense_bytes(self) -> int:
        """Bytes of the embeddings as they are."""
        return self._dense.bytes

    def allocated(self, within: Callable[[int], Plan]) -> Plan:
        """The plan of the sites with the embeddings that suit it, which are put in place.

        Args:
            within: From the bytes that the embeddings save of the whole model to a plan of its sites.

        Raises:
            ValueError: If the sites have no plan whatever the embeddings save.
        """
        plans: list[tuple[float, Plan, Width]] = []
        refused: list[InputError] = []
        # Later rounds only choose the sites anew.
        for width in self._widths if self._chosen is None else [self._chosen]:
            try:
                plan = within(self.dense_bytes - width.bytes)
            except InputError as error:
                refused.append(error)
            else:
                plans.append((OPTIMISM * (plan.predicted_loss or 0.0) + width.loss, plan, width))
        if not plans:
            raise refused[0]
        _, plan, chosen = min(plans, key=lambda each: each[0])
        if self._chosen is None and chosen.bits != UNTOUCHED:
            stored = put_in_bits(self._model, chosen.bits, self._batches)
            self._facts = {"embeddings": {**stored, "divergence": float(f"{chosen.loss:.4g}")}}
        self._chosen = chosen
        return replace(plan, calibration={**plan.calibration, **self._facts})

    def restore(self) -> None:
        """Put the dense embeddings back, in place, for another try with another budget."""
        if self._facts:
            put_embeddings(self._model, self._dense.embedding, self._dense.head, tied=self._tied)
        self._chosen, self._facts = None, {}
