"""A dropless token-choice mixture-of-experts layer on ``torch._grouped_mm``, written as users write theirs.

T = tokens, D = model width, H = hidden width of one expert, E = experts, k = experts that each token goes to.

The Flax layer (``jax_frontend/moe.py``) has the same parameters, router and math.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xmoe.torch_backend.combine import combine, permute_tokens
from xmoe.torch_backend.tensor import ScaledGroupedMMTensor, wrapped_swiglu_experts


class Router(nn.Module):
    """Scores every expert for every token, in float32."""

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        normalize_scores: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(
                f"top_k={top_k} is outside [1, num_experts={num_experts}]; a token visits that many experts"
            )
        self.top_k = top_k
        self.normalize_scores = normalize_scores
        self.weight = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [T, D] → scores [T, k] float32, experts [T, k] int64, counts [E] int32, load-balance loss [] float32.

        The loss is E · Σ_e f_e · P_e: f_e the fraction of the T·k slots that went to expert e, P_e its mean probability
        (Switch Transformer, arXiv:2101.03961, equation 4). 1 when the load is even.
        """
        (T, E), k = (x.shape[0], self.weight.shape[0]), self.top_k
        probabilities = torch.softmax(x.float() @ self.weight.float().t(), dim=-1)
        scores, experts = torch.topk(probabilities, k, dim=-1)
        if self.normalize_scores:
            scores = scores / scores.sum(-1, keepdim=True)
        slots = experts.flatten()
        counts = torch.zeros(E, dtype=torch.int32, device=x.device)
        counts.scatter_add_(0, slots, torch.ones_like(slots, dtype=torch.int32))
        loss = E * (counts / max(T * k, 1) * probabilities.sum(0) / max(T, 1)).sum()
        return scores, experts, counts, loss


class GroupedExperts(nn.Module):
    """SwiGLU experts: w2 · (silu(w1 · x) * (w3 · x)), each on its own rows.

    Weights that ``quantize_`` wrapped with one config run as one op, `xmoe.torch_backend.swiglu_experts`.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(num_experts, hidden_dim, dim, device=device, dtype=dtype))
        self.w2 = nn.Parameter(torch.empty(num_experts, dim, hidden_dim, device=device, dtype=dtype))
        self.w3 = nn.Parameter(torch.empty(num_experts, hidden_dim, dim, device=device, dtype=dtype))

    def forward(self, x: Tensor, offs: Tensor, order: Tensor | None = None) -> Tensor:
        """x [rows, D], sorted by expert, or [T, D] with the ``order`` of `permute_tokens`; offs int32 [E], the end row
        of each → [rows, D], sorted."""
        w1, w2, w3 = (w.to(x.dtype) for w in (self.w1, self.w2, self.w3))
        if isinstance(w1, ScaledGroupedMMTensor) and type(w1) is type(w2) is type(w3):
            return wrapped_swiglu_experts(x, w1, w2, w3, offs, order)
        x = x if order is None else permute_tokens(x, order)
        w1, w2, w3 = (w.transpose(-2, -1) for w in (w1, w2, w3))
        h = F.silu(torch._grouped_mm(x, w1, offs=offs)) * torch._grouped_mm(x, w3, offs=offs)
        return torch._grouped_mm(h, w2, offs=offs)


class FeedForward(nn.Module):
    """The shared expert: SwiGLU over all tokens."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False, device=device, dtype=dtype)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False, device=device, dtype=dtype)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, D] → [T, D], in the dtype of x."""
        w1, w2, w3 = (layer.weight.to(x.dtype) for layer in (self.w1, self.w2, self.w3))
        return F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2)


class MoE(nn.Module):
    """Router, experts and an optional shared expert; no token is dropped.

    Parameters: ``router.weight`` [E, D], ``experts.w1`` and ``experts.w3`` [E, H, D], ``experts.w2`` [E, D, H], and
    with `shared_hidden_dim` ``shared.w1.weight``, ``shared.w2.weight``, ``shared.w3.weight``. They may have a dtype of
    their own: the layer computes in that of its input, and routes in float32.

    Raises ValueError if `top_k` does not lie in [1, num_experts].
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        top_k: int,
        *,
        shared_hidden_dim: int | None = None,
        normalize_scores: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.router = Router(dim, num_experts, top_k, normalize_scores=normalize_scores, device=device, dtype=dtype)
        self.experts = GroupedExperts(dim, hidden_dim, num_experts, device=device, dtype=dtype)
        self.shared = FeedForward(dim, shared_hidden_dim, device=device, dtype=dtype) if shared_hidden_dim else None
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, std: float = 0.02) -> None:
        """Draws every weight from N(0, std²)."""
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=std)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., D] → (y like x, load-balance loss [] float32)."""
        tokens = x.reshape(-1, x.shape[-1])
        scores, experts, counts, loss = self.router(tokens)
        # Slots, by expert. A radix sort takes a pass a byte.
        narrow = torch.uint8 if counts.shape[0] <= 256 else torch.int32
        order = torch.argsort(experts.flatten().to(narrow), stable=True)
        routed = self.experts(tokens, counts.cumsum(0, dtype=torch.int32), order)
        y = combine(routed, scores.float(), order, x.dtype)  # in autocast softmax may be narrower
        if self.shared is not None:
            y = y + self.shared(tokens)
        return y.view(x.shape), loss
