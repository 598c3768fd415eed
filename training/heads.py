"""The projection head between tokens and their prototypes: of DINO for CLS, of iBOT for masked patches."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DinoHead(nn.Module):
    """Three linear layers, an L2-normalised bottleneck, and K prototypes (arXiv 2104.14294, appendix C).

    logits = W normalise(W3 gelu(W2 gelu(W1 x))). By default the rows of W have length 1 (weight norm whose gain is
    frozen at 1), so a logit is a cosine and stays in [-1, 1]; with ``normalised=False`` W is a plain linear layer,
    whose logits start several times smaller: small runs then stay long at a loss of ln K. No batch norm. Linear weights
    start at a truncated normal of deviation .02, biases at 0.
    """

    def __init__(
        self,
        width: int,
        n_prototypes: int,
        *,
        hidden: int = 2048,
        bottleneck: int = 256,
        normalised: bool = True,
        seed: int = 0,
    ) -> None:
        """Sizes are numbers of channels, ``n_prototypes`` is K. Same sizes and seed, same weights."""
        super().__init__()
        self.normalised = normalised
        with torch.device("meta"):  # no memory and no draws from torch's global generator
            layers = [nn.Linear(width, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, bottleneck)]
            self.mlp = nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU(), layers[2])
            self.prototypes = nn.Parameter(torch.empty(n_prototypes, bottleneck))
        self.to_empty(device=torch.get_default_device())
        if not self.prototypes.is_meta:
            self.init_weights(seed)

    def init_weights(self, seed: int) -> None:
        """Fill every parameter anew, drawn on the CPU: the same values on every device."""
        generator = torch.Generator("cpu").manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                value = torch.zeros(parameter.shape, device="cpu")
                if value.ndim > 1:
                    nn.init.trunc_normal_(value, std=0.02, generator=generator)
                parameter.copy_(value)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K) of tokens (N, width), in the dtype of the multiplication."""
        unit = F.normalize(self.mlp(x), dim=-1)
        prototypes = F.normalize(self.prototypes, dim=-1) if self.normalised else self.prototypes
        return F.linear(unit, prototypes.to(unit.dtype))
