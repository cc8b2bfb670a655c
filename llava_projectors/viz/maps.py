"""What each visual token was made from: how much of every patch, by attention weight or by gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from llava_projectors.projectors.base import Projector

# Enough random directions that a map does not change visibly with more.
PROBES = 8


def token_maps(projector: Projector, features: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    """How much each patch went into each token.

    Where the projector has `region_weights` (TokenPacker), these are its attention weights, the
    mean over heads. Elsewhere it is the effective receptive field: the root mean square of the
    token's derivative by the patch, estimated with `PROBES` random directions (our choice, after
    Hutchinson's estimator).

    Args:
        projector: of any type.
        features: one image, [1, H*H, L*C].
        tokens: indices of visual tokens, row by row.

    Returns:
        [len(tokens), H, H], each map with sum 1.

    Raises:
        ValueError: a token that does not exist.
    """
    count = projector(features[:1]).shape[1]
    for token in tokens:
        if not 0 <= token < count:
            raise ValueError(f"token {token} does not exist: there are {count}, 0 to {count - 1}")
    weights = getattr(projector, "region_weights", None)
    maps = weights(features)[0][list(tokens)] if weights else _receptive_fields(projector, features, tokens)
    return (maps / maps.sum((1, 2), keepdim=True)).detach()


def _receptive_fields(projector: Projector, features: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    features = features.detach().requires_grad_()
    out = projector(features)[0]
    side = math.isqrt(features.shape[1])
    generator = torch.Generator().manual_seed(0)
    fields = []
    for token in tokens:
        squares = torch.zeros(features.shape[1], device=features.device)
        for _ in range(PROBES):
            direction = torch.randn(out.shape[1], generator=generator).to(out)
            (gradient,) = torch.autograd.grad(out[token] @ direction, features, retain_graph=True)
            squares += gradient[0].float().square().sum(-1)
        fields.append((squares / PROBES).sqrt().unflatten(0, (side, side)))
    return torch.stack(fields)
