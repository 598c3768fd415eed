"""The projection head between tokens and their prototypes: of DINO for CLS, of iBOT for masked patches."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DinoHead(nn.Module):
    """Three linear layers, an L2-normalised bottleneck, and K prototypes (arXiv 2104.14294, appendix C).

    logits = W normalise(W3 gelu(W2 gelu(W1 x))). ``norm`` says what W is: "fixed", rows of length 1 (weight norm whose
    gain is frozen at 1), so a logit is a cosine and stays in [-1, 1]; "trained", rows with a trained length each, as
    the released DINOv2; "none", a plain linear layer as in DINOv3, whose logits start several times smaller: small runs
    then stay long at a loss of ln K. No batch norm. Linear weights start at a truncated normal of deviation .02,
    biases at 0, lengths at 1.
    """

    def __init__(
        self,
        width: int,
        n_prototypes: int,
        *,
        hidden: int = 2048,
        bottleneck: int = 256,
        norm: str = "fixed",
        seed: int = 0,
    ) -> None:
        """Sizes are numbers of channels, ``n_prototypes`` is K. Same sizes and seed, same weights."""
        super().__init__()
        self.norm = norm
        with torch.device("meta"):  # no memory and no draws from torch's global generator
            layers = [nn.Linear(width, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, bottleneck)]
            self.mlp = nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU(), layers[2])
            self.prototypes = nn.Parameter(torch.empty(n_prototypes, bottleneck))
            self.lengths = nn.Parameter(torch.empty(n_prototypes, 1)) if norm == "trained" else None
        self.to_empty(device=torch.get_default_device())
        if not self.prototypes.is_meta:
            self.init_weights(seed)

    def init_weights(self, seed: int) -> None:
        """Fill every parameter anew, drawn on the CPU: the same values on every device."""
        generator = torch.Generator("cpu").manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                value = torch.zeros(parameter.shape, device="cpu")
                if name == "lengths":
                    value.fill_(1)
                elif value.ndim > 1:
                    nn.init.trunc_normal_(value, std=0.02, generator=generator)
                parameter.copy_(value)

    def weight(self) -> Tensor:
        """The prototypes as they meet a bottleneck vector, (K, bottleneck)."""
        if self.norm == "none":
            return self.prototypes
        unit = F.normalize(self.prototypes, dim=-1)
        return unit if self.lengths is None else unit * self.lengths

    def bottleneck(self, x: Tensor) -> Tensor:
        """Vectors of length 1, (N, bottleneck), of tokens (N, width)."""
        return F.normalize(self.mlp(x), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K) of tokens (N, width), in the dtype of the multiplication."""
        unit = self.bottleneck(x)
        return F.linear(unit, self.weight().to(unit.dtype))
