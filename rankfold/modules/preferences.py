"""What layers keep beside, or in place of, what is stored: a choice between memory and speed."""

from __future__ import annotations

from torch import nn

from rankfold.errors import InputError
from rankfold.modules.packed_linear import pack_linears, unpack_linears
from rankfold.modules.quantized_linear import QuantizedLinear

PREFERENCES = ("balance", "memory", "speed")


def check_preference(what: str) -> None:
    """Whether layers know this preference.

    Raises:
        ValueError: If it is none of `PREFERENCES`.
    """
    if what not in PREFERENCES:
        raise InputError(f"Layers can prefer {', '.join(PREFERENCES)}, but got {what!r}.")


def prefer(model: nn.Module, what: str) -> None:
    """Choose between memory and speed for the linear layers of a model, in place; its state on disk does not change.

    Args:
        model: The model.
        what: `balance`, as layers are after loading: in few bits the matrix of a kernel, or the whole one where there
            is no kernel. `memory`: never the whole one, which without a kernel is multiplied out at every call.
            `speed`: both, since passes over many tokens multiply by the whole one, which otherwise is made anew for
            each; and plain layers in bfloat16 on a CPU hold their matrix once more, in the order of its kernels
            (`PackedLinear`).

    Raises:
        ValueError: If it is none of these.
    """
    check_preference(what)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.prefers = what
            module._forget()
    if what == "speed":
        pack_linears(model)
    else:
        unpack_linears(model)
