import pytest
import torch
from torch.nn import functional as F

from training.heads import DinoHead


def by_hand(head, x):
    for i in (0, 2, 4):
        x = x @ head.mlp[i].weight.T + head.mlp[i].bias
        if i < 4:
            x = 0.5 * x * (1 + torch.erf(x / 2**0.5))
    x = x / x.norm(dim=1, keepdim=True)
    w = head.prototypes if head.norm == "none" else head.prototypes / head.prototypes.norm(dim=1, keepdim=True)
    if head.norm == "trained":
        w = w * head.lengths
    return x @ w.T


@pytest.mark.parametrize("norm", ["fixed", "trained", "none"])
def test_forward_matches_the_formula(norm):
    head = DinoHead(12, 9, hidden=16, bottleneck=5, norm=norm)
    if norm == "trained":
        assert (head.lengths == 1).all()
        torch.nn.init.uniform_(head.lengths)
    x = torch.randn(7, 12)
    torch.testing.assert_close(head(x), by_hand(head, x), atol=1e-6, rtol=1e-5)


def test_logits_are_cosines_that_no_scale_of_a_prototype_changes():
    head, x = DinoHead(12, 9, hidden=16, bottleneck=5), torch.randn(100, 12) * 10
    before = head(x)
    assert before.abs().max() <= 1 + 1e-6
    with torch.no_grad():
        head.prototypes *= 7
    torch.testing.assert_close(head(x), before)


@pytest.mark.parametrize(
    ("options", "total"),
    [
        ({"width": 384}, 22_286_592),
        ({"width": 768}, 23_073_024),
        ({"width": 1024}, 23_597_312),
        ({"width": 384, "norm": "trained"}, 22_352_128),
        ({"width": 768, "norm": "trained"}, 23_138_560),
        ({"width": 1024, "norm": "trained"}, 23_662_848),
        ({"width": 1536, "n_prototypes": 131072, "bottleneck": 384, "norm": "trained"}, 58_593_664),
        ({"width": 1536, "n_prototypes": 131072, "norm": "trained"}, 41_554_176),
        ({"width": 4096, "n_prototypes": 262144, "hidden": 8192, "bottleneck": 512}, 239_092_224),
        ({"width": 4096, "n_prototypes": 98304, "hidden": 4096, "bottleneck": 384}, 72_884_608),
        ({"width": 1024, "n_prototypes": 262144, "hidden": 8192, "bottleneck": 512}, 213_926_400),
        ({"width": 1024, "n_prototypes": 98304, "hidden": 4096, "bottleneck": 384}, 60_301_696),
    ],
)
def test_published_parameter_counts(options, total):
    with torch.device("meta"):
        head = DinoHead(**{"n_prototypes": 65536, **options})
    assert sum(p.numel() for p in head.parameters()) == total


def test_initial_spread_of_logits():
    x = torch.randn(256, 64)
    assert DinoHead(64, 2048, bottleneck=256)(x).std().item() == pytest.approx(256**-0.5, rel=0.15)
    assert DinoHead(64, 2048, bottleneck=256, norm="none")(x).std().item() == pytest.approx(0.02, rel=0.15)


def test_weights_come_from_the_seed_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    a, b, c = (DinoHead(8, 4, hidden=8, bottleneck=4, seed=s) for s in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.prototypes, c.prototypes)
    assert all((layer.bias == 0).all() for layer in a.mlp if hasattr(layer, "bias"))
    assert F.normalize(a.prototypes, dim=1).shape == (4, 4)
