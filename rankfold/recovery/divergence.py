"""How far a model's predictions are from its teacher's, differentiably."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def divergence(
    logits: Float[Tensor, "*places classes"], expected: Float[Tensor, "*places classes"]
) -> Float[Tensor, ""]:
    """Mean Kullback-Leibler divergence of predictions from a teacher's, in nats, both given as logits."""
    target = expected.float().log_softmax(-1).to(logits.device)
    terms = F.kl_div(logits.float().log_softmax(-1), target, reduction="none", log_target=True)
    return terms.sum(-1).mean()
