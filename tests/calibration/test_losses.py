"""The loss whose gradients are measured is that of PyTorch, with less memory."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from rankfold.calibration import losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 50, 2000), (7, 11)])
def test_the_loss_and_its_gradient_are_those_of_pytorch(
    dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "PART", 16 * shape[-1] + 3)
    logits = torch.randn(shape).mul(3).to(dtype)
    targets = torch.randint(0, shape[-1], shape[:-1])
    targets.flatten()[::4] = losses.IGNORED
    found, expected = (logits.clone().requires_grad_() for _ in range(2))
    ours = losses._SummedCrossEntropy.apply(found, targets)
    theirs = F.cross_entropy(
        expected.float().flatten(0, -2), targets.flatten(), ignore_index=losses.IGNORED, reduction="sum"
    )
    (2 * ours).backward()
    (2 * theirs).backward()
    assert torch.allclose(ours, theirs, rtol=1e-5)
    assert found.grad is not None
    assert expected.grad is not None
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-4
    assert torch.allclose(found.grad.float(), expected.grad.float(), rtol=tolerance, atol=1e-6)
    assert not found.grad.flatten(0, -2)[::4].any()
