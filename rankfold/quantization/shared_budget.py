"""One budget over bits and ranks: what every site would lose in each width, and the plan carried out in order."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from rankfold.allocation import MULTIPLE, WidthLosses
from rankfold.calibration import Loss, Statistics, calibrate_blocks, is_reached
from rankfold.compression import Streams, finish, fit_along
from rankfold.errors import InputError
from rankfold.factorization import SiteMoments, ordered_kfac, predicted_loss, weighed
from rankfold.journal import Journal
from rankfold.modules import (
    WHOLE_MATRIX,
    WHOLE_ROW,
    CompensatedLinear,
    GroupEmbedding,
    GroupLinear,
    LowRankLinear,
    linear_at,
    matrix_of,
    set_matrix,
    use_eager_experts,
)
from rankfold.plan import DENSE, Option, Plan
from rankfold.progress import Step, no_step
from rankfold.quantization.gptq import Groups, gptq, gptq_linear, gptq_widths
from rankfold.shelf import Shelf
from rankfold.sites import Site

WIDTHS = ((2, 64), (3, 64), (4, 64), (5, 64), (6, 64), (8, 64))
"""Bits and groups that are offered."""

TRIED = 4
"""Bits up to which a matrix is rounded to see what that costs: beyond, the error falls as the square of the step."""

ALTERNATIONS = 2
"""Times that a matrix is rounded anew without what its compensation already holds."""

Allocate = Callable[[Mapping[str, WidthLosses]], Plan]
"""From the predicted losses of every site to a plan."""


@torch.no_grad()
def width_losses(
    weight: Float[Tensor, "out in"],
    moments: SiteMoments,
    widths: Sequence[tuple[int, int]] = WIDTHS,
    centred: bool = False,
) -> WidthLosses:
    """Predicted rise of the loss of a matrix in every width, alone and with the best compensation of every rank.

    Of the error `D` of a rounded matrix the best compensation of rank `r` leaves the squared singular values of
    `G^(1/2) D S^(1/2)` after the first `r`, half of whose sum is the loss that remains (docs/mathematics.md, eq. 12).

    Args:
        weight: The matrix.
        moments: Of its inputs and of the gradients at its outputs.
        widths: Bits and size of groups to try.
        centred: Whether a bias keeps the mean output.
    """
    W = weight.float()
    moments = _trusting(moments, centred)
    assert moments.inputs is not None and moments.gradients is not None, "losses need both moments"  # noqa: PT018
    S, G = moments.inputs.second, moments.gradients.second
    rounded: dict[tuple[int, int], Tensor] = {}
    for group in dict.fromkeys(group for _, group in widths):
        bits = [width for width, size in widths if size == group]
        found = gptq_widths(W, S, [width for width in bits if width <= TRIED], group, G)
        rounded |= {(width, group): levels.matrix(group) for width, levels in found.items()}
    tail = _Tails(S.to(W.device), G.to(W.device), 0.5 * moments.share)
    curves = {width: tail(W - matrix) for width, matrix in rounded.items()}
    for width, group in widths:
        if width > TRIED:
            curves[width, group] = curves[TRIED, group] * ((2**TRIED - 1) / (2**width - 1)) ** 2
    return WidthLosses(tail(W), curves)


def _trusting(moments: SiteMoments, centred: bool) -> SiteMoments:
    """Moments drawn away from their sampling error, which makes cheap what is only misjudged."""
    inputs, gradients = moments.inputs, moments.gradients
    if inputs is not None:
        inputs = inputs.centred() if centred else inputs
        inputs = inputs._replace(second=inputs.trusted)
    if gradients is not None:
        gradients = gradients._replace(second=gradients.trusted)
    return moments._replace(inputs=inputs, gradients=gradients)


class _Tails:
    """Loss that is left of an error after its best compensation of every rank."""

    def __init__(
        self, S: Float[Tensor, "in in"], G: Float[Tensor, "out out"] | Float[Tensor, " out"], scale: float
    ) -> None:
        self.S, self.G, self.scale = S.double(), G.double(), scale
        self.of_outputs = len(G) <= len(S) and G.ndim == 2
        smaller = self.G if self.of_outputs else self.S
        values, vectors = torch.linalg.eigh(smaller)
        self.root = vectors * values.clamp(min=0).sqrt()

    def __call__(self, error: Float[Tensor, "out in"]) -> Any:
        D = error.double()
        inner = D @ self.S @ D.T if self.of_outputs else D.T @ weighed(self.G, D)
        values = torch.linalg.eigvalsh(self.root.T @ inner @ self.root).clamp(min=0)
        # Sums of the smallest, so that the first is the whole and the last nothing.
        left = torch.cat([values.new_zeros(1), values.cumsum(0)]).flip(0)
        return (self.scale * left[::MULTIPLE]).cpu().numpy().astype(np.float64)


class Fitted(NamedTuple):
    """What takes a layer's place, and what it is predicted to cost as it is stored."""

    layer: nn.Module
    matrix: Float[Tensor, "out in"]
    loss: float


@torch.no_grad()
def fit(
    weight: Float[Tensor, "out in"], moments: SiteMoments, option: Option, dtype: torch.dtype, centred: bool = False
) -> Fitted:
    """A matrix in the bits and the rank of an option, without a bias.

    Args:
        weight: The matrix.
        moments: Of the inputs that it will read, and of the gradients at its outputs.
        option: Its form, ranks and bits.
        dtype: In which the layer computes.
        centred: Whether a bias keeps the mean output.
    """
    moments = _trusting(moments, centred)
    assert moments.inputs is not None, "moments of the inputs"
    S = moments.inputs.second
    G = None if moments.gradients is None else moments.gradients.second
    if option.form == "low_rank":
        up, down = _factors(weight, moments, option.ranks[0])
        return _priced(_pair(up, down, S, weight, option.factor_bits, dtype), weight, moments)
    assert option.bits is not None, "a matrix in few bits"
    settings = Groups(option.bits, option.group or 0)
    if option.form == DENSE:
        layer = gptq_linear(gptq(weight, S, settings.bits, settings.group, G), settings, None, dtype)
        return _priced(layer, weight, moments)
    best: Fitted | None = None
    held = torch.zeros_like(weight)
    for _ in range(ALTERNATIONS):
        base = gptq_linear(gptq(weight - held, S, settings.bits, settings.group, G), settings, None, dtype)
        error = weight - base.dequantized()
        up, down = _factors(error, moments, option.ranks[0])
        pair = _pair(up, down, S, error, option.factor_bits, dtype)
        made = CompensatedLinear.from_parts(base, pair.up, pair.down)
        held = _matrix(pair)
        found = _priced(made, weight, moments, base.dequantized() + held)
        if best is not None and found.loss >= best.loss:
            break
        best = found
    assert best is not None, "at least one alternation"
    return best


def _factors(weight: Tensor, moments: SiteMoments, rank: int) -> tuple[Tensor, Tensor]:
    ordered = ordered_kfac(weight, None, moments)
    return ordered.up[:, :rank].float(), ordered.down[:rank].float()


def _pair(up: Tensor, down: Tensor, S: Tensor, target: Tensor, bits: int | None, dtype: torch.dtype) -> LowRankLinear:
    """Two factors in few bits: the first rounded, the second fitted to what it has become, and rounded too."""
    if bits is None:
        return LowRankLinear.from_factors(up.to(dtype), down.to(dtype))
    # Columns of one size share a scale, which the rows of the other factor take on.
    size = up.square().mean(0).sqrt().clamp(min=1e-30)
    lower = Groups(bits, WHOLE_ROW)
    first = gptq_linear(gptq(down * size[:, None], S, bits, WHOLE_ROW), lower, None, dtype)
    D = first.dequantized().double()
    S = S.double()
    moment = D @ S @ D.T
    damped = moment + 1e-6 * moment.diagonal().mean() * torch.eye(len(D), dtype=D.dtype, device=D.device)
    fitted = torch.linalg.solve(damped, D @ S @ target.double().T).T.float()
    if not bool(torch.isfinite(fitted).all()):
        fitted = up / size
    upper = Groups(bits, WHOLE_MATRIX)
    second = gptq_linear(gptq(fitted, moment, bits, WHOLE_MATRIX), upper, None, dtype)
    layer = LowRankLinear(down.shape[1], len(up), (len(down),), bias=False, device="meta")
    layer.up, layer.down = second, first  # type: ignore[assignment]
    return layer


def _matrix(layer: Any) -> Tensor:
    """The matrix that a layer stands for, in float32."""
    if isinstance(layer, GroupLinear):
        return layer.dequantized()
    if isinstance(layer, LowRankLinear):
        return _matrix(layer.up) @ _matrix(layer.down)
    return layer.weight.float()  # type: ignore[no-any-return]


def _priced(layer: nn.Module, weight: Tensor, moments: SiteMoments, matrix: Tensor | None = None) -> Fitted:
    matrix = _matrix(layer) if matrix is None else matrix
    return Fitted(layer, matrix, predicted_loss(weight, matrix, moments))


def compress_in_bits(  # noqa: PLR0913
    model: Any,
    sites: Sequence[Site],
    batches: Sequence[Mapping[str, Tensor]],
    *,
    loss: Loss,
    allocate: Allocate,
    rounds: int = 0,
    drift: float = 0.5,
    statistics: Statistics | None = None,
    shelf: Shelf | None = None,
    journal: Journal | None = None,
    on_step: Step = no_step,
) -> Plan:
    """Share one budget over bits and ranks, in place, each layer fitted to what the compressed ones before it give.

    Args:
        model: A transformers model.
        sites: Its sites.
        batches: Calibration batches on the model's device.
        loss: What is followed back.
        allocate: Chooses among options by their predicted losses.
        rounds: Rounds after the first in which statistics are measured again, and options chosen anew.
        drift: Share of the drift that is corrected, 0 to 1.
        statistics: What `calibrate` measured of the dense model, in place of the first measuring; what is derived of
            it is kept there, so that the next budget costs less.
        shelf: Where hidden states, the moments of every site and finished layers lie; without it in memory.
        journal: What an interrupted run has measured of the dense model, and this one does.
        on_step: Called after each batch has passed a block.

    Returns:
        The plan as it was carried out, with the losses of what is stored.

    Raises:
        ValueError: If a weight, an activation or a gradient is not finite, or the budget cannot be met.
    """
    dense: dict[str, Any] = {}
    plan = None
    for number in range(rounds + 1):
        losses: dict[str, WidthLosses] = {}
        known = statistics if number == 0 else None
        kept: MutableMapping[str, Any] = {} if known is None else known.kept
        measured: Any = known
        if known is None and journal is not None and number == 0:
            measured, kept = journal.of("moments"), journal.of("losses")
        elif known is None:
            measured = Shelf() if shelf is None else shelf
            measured.clear()
        found = (
            _measured(model, sites, batches, on_step, loss, measured, shelf)
            if known is None
            else _given(model, sites, known)
        )
        for name, moments in found:
            dense.setdefault(name, linear_at(model, name))
            if is_reached(moments, gradients=True):
                W, b = matrix_of(dense[name])
                if name not in kept:
                    kept[name] = _named(name, partial(width_losses, W, moments, centred=b is not None))
                losses[name] = kept[name]
        plan = allocate(losses)
        for name, layer in dense.items():
            model.set_submodule(name, layer)
        share = drift if number == rounds else 0.0
        plan = _carried_out(
            model, sites, plan, batches, dense, measured, share, Shelf() if shelf is None else shelf, on_step
        )
    assert plan is not None, "there is at least one round"
    facts = {**plan.calibration, "rounds": rounds, "drift": drift}
    plan = finish(model, replace(plan, calibration=facts))
    store_quantizations(model)
    return plan


def _measured(
    model: Any,
    sites: Sequence[Site],
    batches: Sequence[Mapping[str, Tensor]],
    on_step: Step,
    loss: Loss,
    kept: MutableMapping[Any, SiteMoments],
    shelf: Shelf | None,
) -> Iterator[tuple[str, SiteMoments]]:
    """Moments of one site after the other, which are kept; of those that are kept already nothing is measured."""
    done = [site.name for site in sites if site.name in kept]
    rest = [site for site in sites if site.name not in kept]
    use_eager_experts(model)
    for name in done:
        yield name, kept[name]
    if not rest:
        for _ in range(2 * len({site.block for site in sites}) * len(batches)):
            on_step()
    for block in calibrate_blocks(model, rest, batches, on_step, loss, shelf) if rest else ():
        for name in list(block.moments):
            # Not to be alive while the next block is measured.
            kept[name] = block.moments.pop(name)
            yield name, kept[name]


def _given(model: Any, sites: Sequence[Site], statistics: Statistics) -> Iterator[tuple[str, SiteMoments]]:
    """Moments that were measured before."""
    missing = [site.name for site in sites if site.name not in statistics]
    if missing or not statistics.have_gradients:
        raise InputError(
            f"{missing[0] if missing else sites[0].name}: the statistics must hold moments of inputs and gradients of "
            "every site, but do not. Calibrate these sites with a loss: calibrate(model, sites, batches)."
        )
    use_eager_experts(model)
    for site in sites:
        yield site.name, statistics[site.name]


def _named(name: str, make: Callable[[], Any]) -> Any:
    """What a function gives, errors saying at which site."""
    try:
        return make()
    except ValueError as error:
        error.args = (f"{name}: {error}",)
        raise


def _carried_out(  # noqa: PLR0913, PLR0917
    model: Any,
    sites: Sequence[Site],
    plan: Plan,
    batches: Sequence[Mapping[str, Tensor]],
    dense: Mapping[str, Any],
    measured: Mapping[Any, SiteMoments],
    drift: float,
    shelf: Shelf,
    on_step: Step,
) -> Plan:
    """Put the layers of a plan in place, walking along the compressed model, and price them as they are stored."""
    option_of = {name: option for option in plan.options for name in option.sites}
    losses: dict[str, float] = {}

    def place(site: Site, streams: Streams | None) -> nn.Module:
        layer: nn.Module
        linear, option = dense[site.name], option_of[site.name]
        W, bias = matrix_of(linear)
        target, moments = W, measured[site.name]
        if not is_reached(moments, gradients=True):
            moments = SiteMoments()
        if streams is not None:
            target = W + drift * streams.correction(W, centred=bias is not None)
            moments = moments._replace(inputs=streams.drifted)
        if not option.changes:
            layer, matrix = copy.deepcopy(linear), target
            set_matrix(layer, target)
        else:
            dtype = linear.weight.dtype
            layer, matrix, losses[site.name] = _named(
                site.name, partial(fit, target, moments, option, dtype, bias is not None)
            )
        if bias is not None:
            inputs = moments.inputs
            aim = read = torch.zeros(W.shape[1], dtype=torch.float64, device=W.device)
            if inputs is not None:
                read = inputs.mean.to(aim)
                aim = read if streams is None else drift * streams.mean + (1 - drift) * streams.drifted.mean
            bias = bias + (W.double() @ aim - matrix.double() @ read).to(bias.dtype)
            _set_bias(layer, bias.to(linear.weight.dtype))
        return shelf.hold(layer.to(linear.weight.device))

    made = fit_along(model, sites, batches, dense, place, on_step=on_step) if drift else set()
    rest = [site for site in sites if site.name not in made and option_of[site.name].changes]
    for site in rest:
        model.set_submodule(site.name, place(site, None))
    options = tuple(
        replace(option, loss=sum(losses.get(name, 0.0) for name in option.sites)) for option in plan.options
    )
    return replace(plan, options=options)


def _set_bias(layer: Any, bias: Tensor) -> None:
    owner = layer if isinstance(layer, (GroupLinear, nn.Linear)) or not hasattr(layer, "up") else layer.up
    owner.bias = nn.Parameter(bias)


def store_quantizations(model: Any) -> None:
    """Write into a model's configuration which of its layers lie in few bits, so that loading makes them so."""
    stored: dict[tuple[int, int], dict[str, Any]] = {}
    for name, module in model.named_modules():
        if isinstance(module, GroupLinear) and not isinstance(module, GroupEmbedding):
            settings = Groups(module.bits, module.group)
            entry = stored.setdefault(
                (module.bits, module.group), {"scheme": "gptq", "settings": asdict(settings), "modules": {}}
            )
            entry["modules"][name] = module.structure
    if stored:
        model.config.rankfold = {**model.config.rankfold, "quantization": list(stored.values())}
