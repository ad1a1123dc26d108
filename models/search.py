"""Search: a weighted sum of candidate mixers, whose weights say which of them a layer should be.

Paper    inspired by Hao and Zhu 2021, J. Nonlinear Var. Anal. 5(1), 119-140, doi 10.23952/jnva.5.2021.1.08
Computes out = sum_k a_k mixer_k(x),  a = softmax((E + A E) 1 / sqrt(m)),  A = softmax(E W_q (E W_k)^T /
         sqrt(m)) by rows,  E [K m] one learned embedding for each candidate of the layer, W_q, W_k [m m]
Cost     the sum of its candidates'
Exact    no; it is a means to choose a mechanism, not one
Padding  as its candidates
Differs  the paper was not available in full and released no code: that the weights of candidates come from
         self-attention between them is its idea, the formula is ours (a learned vector in place of 1 has a
         saddle, where all weights are equal, that it cannot leave). E, W_q, W_k are tagged `architecture`:
         they are trained on validation batches, all other parameters on training batches
"""
# k candidates, m width of an embedding, b batch, l length, d d_model

from typing import Any

import torch
from torch import Tensor, nn

from models.candidates import joined, make, refuse_idle
from models.common import Mixer, Place, at_least_fp32, register

CANDIDATES = ["identity", "softmax", "linear", "local"]
NO_SETTINGS: dict[str, Any] = {}  # of its mixers, by name


def candidate_weights(embeddings: Tensor, w_q: Tensor, w_k: Tensor) -> Tensor:
    """Embeddings [k m], w_q, w_k [m m] -> weights [k], positive, with sum 1."""
    embeddings, w_q, w_k = at_least_fp32(embeddings, w_q, w_k)
    shrink = embeddings.shape[-1] ** -0.5
    scores = (embeddings @ w_q) @ (embeddings @ w_k).mT * shrink
    attended = scores.softmax(dim=-1) @ embeddings
    return ((embeddings + attended).sum(dim=-1) * shrink).softmax(dim=0)


@register("search")
class Search(Mixer):
    """Candidates side by side; `findings` says how much weight each has."""

    def __init__(
        self,
        place: Place,
        *,
        candidates: list[str] = CANDIDATES,
        settings: dict[str, Any] = NO_SETTINGS,
        embedding_width: int = 16,
        attn_dropout: float = 0.0,
    ) -> None:
        super().__init__(place, projections=False)
        if len(set(candidates)) < 2 or len(set(candidates)) < len(candidates):
            raise ValueError(f"search needs two or more different candidates, got {list(candidates)}")
        if embedding_width < 1:
            raise ValueError(f"search needs embedding_width >= 1, got {embedding_width}")
        refuse_idle("search", settings, candidates)
        backbone = {"attn_dropout": attn_dropout}
        self.candidates = nn.ModuleDict(
            {name: make("search", name, place, settings, backbone) for name in candidates}
        )
        self.traits = joined(self.candidates)
        count, width = len(candidates), embedding_width
        start = torch.randn(count, width) * width**-0.5
        self.embeddings = architecture(
            start - start.mean(dim=-1, keepdim=True)
        )  # all weigh the same at first
        self.w_q = architecture(torch.randn(width, width) * width**-0.5)
        self.w_k = architecture(torch.randn(width, width) * width**-0.5)

    def weights(self) -> Tensor:
        """The share of each candidate [k], at least float32."""
        return candidate_weights(self.embeddings, self.w_q, self.w_k)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self._mixture([mixer(x, mask) for mixer in self.candidates.values()])

    def forward_packed(self, x: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
        return self._mixture(
            [mixer.forward_packed(x, cu_seqlens, max_len) for mixer in self.candidates.values()]
        )

    def _mixture(self, outputs: list[Tensor]) -> Tensor:
        return sum(weight * out for weight, out in zip(self.weights(), outputs, strict=True))

    def findings(self) -> dict[str, float]:
        """The weight of each candidate by name, as it is now."""
        weights = self.weights().detach().tolist()
        return dict(zip(self.candidates, weights, strict=True))

    def aux_loss(self) -> Tensor | None:
        losses = [loss for mixer in self.candidates.values() if (loss := mixer.aux_loss()) is not None]
        return sum(losses[1:], losses[0]) if losses else None

    def training_update(self, step: int) -> None:
        for mixer in self.candidates.values():
            mixer.training_update(step)

    def state_size(self, length: int) -> int | None:
        sizes = [mixer.state_size(length) for mixer in self.candidates.values()]
        return None if None in sizes else sum(sizes)


def architecture(start: Tensor) -> nn.Parameter:
    """A parameter that is trained on validation batches, by an optimizer of its own."""
    parameter = nn.Parameter(start)
    parameter.architecture = True
    return parameter
