"""Embeddings in few bits: rows are looked up as they are stored, and a tied head multiplies by the same codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn
from torch.nn import functional as F

from rankfold.modules.group_linear import GroupLinear
from rankfold.modules.module_weight import ModuleWeight


class GroupEmbedding(GroupLinear):
    """An embedding whose rows lie in groups of few bits; `product` multiplies by its matrix, for a head tied to it.

    >>> layer = GroupEmbedding(16, 64, {"bits": 3, "group": 32})
    >>> layer(torch.tensor([[1, 2, 3]])).shape, layer.product(torch.ones(2, 64)).shape
    (torch.Size([1, 3, 64]), torch.Size([2, 16]))
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        settings: Mapping[str, Any],
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """An empty embedding, to be filled by a checkpoint or from a `GroupLinear`."""
        super().__init__(embedding_dim, num_embeddings, None, False, settings, device, dtype)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx

    @classmethod
    def from_linear(cls, layer: GroupLinear, padding_idx: int | None = None) -> GroupEmbedding:
        """The rows of a layer (tokens, dimensions) without a bias."""
        settings = {"bits": layer.bits, "group": layer.group}
        made = cls(layer.out_features, layer.in_features, settings, padding_idx, layer.codes.device, layer.dtype)
        made.load_state_dict(layer.state_dict())
        return made

    @property
    def weight(self) -> Tensor:
        """The matrix, which a head may be called with as `F.linear(x, weight)`."""
        like = torch.empty(0, dtype=self.dtype, device=self.codes.device)
        shape = (self.out_features, self.in_features)
        return ModuleWeight(like, shape, self.product, lambda: self.matrix(self.dtype))

    def forward(self, ids: Integer[Tensor, "*batch"]) -> Float[Tensor, "*batch dim"]:  # type: ignore[override]
        """The rows of token ids."""
        if self.change is not None:
            return F.embedding(ids, self.matrix(self.dtype))
        return self.rows(ids).to(self.dtype)

    def product(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch tokens"]:
        """What a head tied to this embedding gives."""
        return super().forward(x)

    def rows(self, ids: Integer[Tensor, "*batch"]) -> Float[Tensor, "*batch dim"]:
        """The rows of token ids, in float32; nothing else is unpacked."""
        across = torch.arange(self.in_features, device=ids.device)
        codes = _unpacked_at(self.codes, ids[..., None] * self.in_features + across)
        scales = self.scales.view(torch.float16)[ids].float()
        groups = torch.arange(self.groups, device=ids.device)
        zeros = _unpacked_at(self.zeros, ids[..., None] * self.groups + groups).float()
        scales, zeros = (p.repeat_interleave(self.group, -1)[..., : self.in_features] for p in (scales, zeros))
        return (codes.float() - zeros) * scales

    def to_dense(self) -> nn.Embedding:  # type: ignore[override]
        """An `nn.Embedding` with the same rows."""
        dense = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        dense.weight = nn.Parameter(self.matrix(self.dtype))
        return dense

    def extra_repr(self) -> str:
        """Sizes, bits and groups."""
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}, group={self.group}"


class TiedHead(nn.Module):
    """A head that multiplies by the matrix of an embedding in few bits, which alone is stored."""

    def __init__(self, embedding: GroupEmbedding, bias: nn.Parameter | None = None) -> None:
        """The head of an embedding."""
        super().__init__()
        # Not a module of this one: its buffers would be stored twice.
        self.__dict__["embedding"] = embedding
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        """The matrix of the embedding."""
        embedding: GroupEmbedding = self.__dict__["embedding"]
        return embedding.weight

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch tokens"]:
        """The logits."""
        embedding: GroupEmbedding = self.__dict__["embedding"]
        y = embedding.product(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def put_embeddings(model: Any, embedding: nn.Module, head: nn.Module | None, *, tied: bool) -> None:
    """Put an embedding, and a head unless that is `None`, in place of the model's own, in place.

    Args:
        model: A transformers model.
        embedding: For every path at which the input embedding stands.
        head: For the output embedding.
        tied: Whether loading should tie the weights of both, as it does for stock layers.
    """
    places = [(model.get_input_embeddings(), embedding)]
    if head is not None:
        places.append((model.get_output_embeddings(), head))
    for old, new in places:
        for path in [path for path, module in model.named_modules(remove_duplicate=False) if module is old]:
            model.set_submodule(path, new)
    for config in (model.config, model.config.get_text_config()):
        if hasattr(config, "tie_word_embeddings"):
            config.tie_word_embeddings = tied
    for module in model.modules():
        # What newer versions of transformers found tied when the model was made.
        if hasattr(module, "all_tied_weights_keys"):
            module.all_tied_weights_keys = module.get_expanded_tied_weights_keys(all_submodels=True)


def stored_embeddings(model: Any) -> dict[str, Any] | None:
    """What loading needs to know of a model's embedding in few bits; `None` where it has none."""
    # Some models cannot say what their embeddings are.
    if not any(isinstance(module, GroupEmbedding) for module in model.modules()):
        return None
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return {"bits": embedding.bits, "group": embedding.group, "tied": isinstance(head, TiedHead)}


def install_embeddings(model: Any, stored: Mapping[str, Any]) -> None:
    """Put an empty embedding in few bits, and a head tied to it, in place of the stock ones."""
    old, head = model.get_input_embeddings(), model.get_output_embeddings()
    like = old.weight
    made = GroupEmbedding(old.num_embeddings, old.embedding_dim, stored, old.padding_idx, like.device, like.dtype)
    tied = TiedHead(made, head.bias) if head is not None and stored["tied"] else None
    put_embeddings(model, made, tied, tied=False)


def release_embeddings(model: Any) -> None:
    """Put a lookup, and the linear layer of a tied head, in place of an embedding in few bits, in place."""
    if stored_embeddings(model) is None:
        return
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    dense, linear = embedding.to_dense(), None
    if isinstance(head, TiedHead):
        linear = nn.Linear(head.in_features, head.out_features, head.bias is not None, device="meta")
        linear.weight = dense.weight
        linear.bias = head.bias  # type: ignore[assignment]
    put_embeddings(model, dense, linear, tied=linear is not None)


def _unpacked_at(packed: Integer[Tensor, "bits bytes"], places: Integer[Tensor, "*shape"]) -> Integer[Tensor, "*shape"]:
    """Of what `pack` gives, the numbers at some places."""
    byte, place = places >> 3, (places & 7).to(torch.uint8)
    codes = torch.zeros_like(byte, dtype=torch.uint8)
    for bit, plane in enumerate(packed):
        codes |= ((plane[byte] >> place) & 1) << bit
    return codes
