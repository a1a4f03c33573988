"""The block around Llama 4's experts, which gives every expert every token."""

from __future__ import annotations

import torch
from torch import nn

# What accelerate puts onto a module to call its own forward through hooks.
_BOUND_TO_A_FORWARD = ("forward", "_old_forward", "_hf_hook")


class WeightedInputMoe(nn.Module):
    """Stands in for a Llama 4 block and sends each token to its own experts only.

    transformers' block runs every expert on every token, zeroed where the router did not choose it,
    and weights the experts' input rather than their output. This one computes the same sum over the
    chosen experts alone.

    Attributes:
        block: the model's own, given back by :meth:`restore`. Children and hooks are the same.
    """

    hidden_dim: int
    router: nn.Module
    shared_expert: nn.Module
    experts: nn.Module

    def __init__(self, block: nn.Module, experts: nn.Module) -> None:
        super().__init__()
        own = {k: v for k, v in vars(block).items() if k not in _BOUND_TO_A_FORWARD}
        self.__dict__.update(own, block=block, _modules={**block._modules, "experts": experts})

    def restore(self, experts: nn.Module) -> nn.Module:
        """The model's own block with ``experts``, and all else as it stands here now."""
        block: nn.Module = self.block
        block._modules = {**self._modules, "experts": experts}
        block.training = self.training
        return block

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the routed experts and the shared one.

        Args:
            hidden_states: (..., hidden_size)

        Returns:
            (num_tokens, hidden_size) and the router's logits (num_tokens, num_experts).
        """
        hidden_states = hidden_states.reshape(-1, self.hidden_dim)  # (num_tokens, hidden_size)
        scores, router_logits = self.router(hidden_states)  # (num_tokens, num_experts)
        top_k = self.router.top_k
        topk_ids = torch.topk(router_logits, top_k, dim=1).indices
        topk_weights = scores.gather(1, topk_ids)
        routed = (hidden_states[:, None] * topk_weights[..., None]).flatten(0, 1)
        output = self.experts(
            routed, topk_ids.view(-1, 1), torch.ones_like(topk_weights).view(-1, 1)
        )
        output = output.unflatten(0, (-1, top_k)).sum(1)
        return output + self.shared_expert(hidden_states), router_logits
