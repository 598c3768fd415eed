"""A training step on the CPU beside the same step written plainly, and what prototype losses take.

Cases: ``step``, a step of a ViT-Ti/16 on 2 crops of 224 and 8 of 96 pixels, by ``train_step`` and by plain code of the
same mathematics: a forward for each crop size, all logits at once, losses through autograd (``equal``: loss and
gradients agree). ``prototypes``, the iBOT loss of 1,024 patches against 131,072 prototypes, forward and backward, each
in a process of its own: seconds, and the most memory it took (``peak_mb`` ours, ``peer_mb`` plain).

    python tests/bench/bench_trainer.py [--rows N] [--seed S] [--json FILE]

--rows: images a step (4), and patches (1024). One thread.
"""

import os
import subprocess
import sys
import time
from typing import Any

import numpy as np
import torch
from common import arguments, interleaved, most_mb, peak_mb, report

from embedding.vit_config import ViTConfig
from training.augment import normalise
from training.config import HeadConfig, TrainConfig
from training.losses import dino_loss, ibot_loss, koleo_loss, sinkhorn_knopp
from training.prototype_loss import Targets, ibot_prototype_loss, sinkhorn_offset
from training.train_step import StepSettings, TrainState, step_masks, train_step
from training.world import World

CPU = torch.device("cpu")
K, WIDTH = 131072, 256  # prototypes, channels of a bottleneck
IMAGES, PATCHES = 4, 1024
WITHIN = 1e-4  # relative difference of loss and of gradients


def config(n_images: int) -> TrainConfig:
    """A ViT-Ti/16 with the published crops and smaller heads."""
    head = HeadConfig(prototypes=8192)
    return TrainConfig(
        vit=ViTConfig(width=192, depth=12, heads=3), head=head, ibot_head=head, batch=n_images, n_steps=10,
        warmup_steps=0, momentum=1.0, clip_norm=1e9,
    )  # fmt: skip


def plain_step(state: TrainState, crops: list[torch.Tensor], made: TrainConfig) -> float:
    """Loss and gradients of a step as one writes it first; the weights stay."""
    masks = step_masks(made, 0, CPU)
    assert masks is not None
    views = [normalise(x.flatten(0, 1)) for x in crops]
    with torch.no_grad():
        seen = state.teacher.backbone(views[0])
        t_cls = sinkhorn_knopp(state.teacher.head(seen.cls), 0.04)
        t_patch = sinkhorn_knopp(state.teacher.patch_head(seen.patches.flatten(0, 1)[masks.rows_M]), 0.04)
    tokens = [state.student.backbone(views[0], masks.hidden_CP), state.student.backbone(views[1])]
    z_cls = torch.cat([state.student.head(t.cls) for t in tokens])
    z_patch = state.student.patch_head(tokens[0].patches.flatten(0, 1)[masks.rows_M])
    n, k = made.batch, made.head.prototypes
    loss = dino_loss(z_cls.view(-1, n, k), t_cls.view(2, n, k)) + ibot_loss(z_patch, t_patch, masks.weight_M, 2 * n)
    loss = loss + made.koleo_weight * sum(koleo_loss(cls) for cls in tokens[0].cls.chunk(2))
    state.student.zero_grad(set_to_none=True)
    loss.backward()
    return float(loss.detach())


def step_case(n_images: int, seed: int) -> dict[str, Any]:
    """Both steps on the same weights and crops, in turns."""
    made, rng = config(n_images), np.random.default_rng(seed)
    crops = [torch.from_numpy(rng.integers(0, 256, (n, n_images, side, side, 3), dtype=np.uint8))
             for n, side in ((2, 224), (8, 96))]  # fmt: skip
    ours, plain = TrainState(made, CPU), TrainState(made, CPU)
    still = StepSettings(0, 0.0, 0.04, 1.0, 0.0)
    loss = train_step(ours, *crops, made, still).loss
    expected = plain_step(plain, crops, made)
    norms = [
        (float((p.grad - q.grad).norm()), float(q.grad.norm()))
        for p, q in zip(ours.student.parameters(), plain.student.parameters(), strict=True)
        if p.grad is not None and q.grad is not None
    ]
    whole = float(np.linalg.norm([norm for _, norm in norms]))
    apart = float(np.linalg.norm([difference for difference, _ in norms])) / whole
    apart = max(apart, abs(loss - expected) / expected)
    cases = {
        "ours": lambda: train_step(ours, *crops, made, still),
        "plain": lambda: plain_step(plain, crops, made),
    }
    seconds = interleaved(cases, repeats=3)
    return {
        "case": "step", "ours": n_images / seconds["ours"], "peer": n_images / seconds["plain"], "unit": "images/s",
        "peer_name": "a forward for each size, all logits, no optimizer or teacher update", "rows": n_images,
        "ratio": seconds["plain"] / seconds["ours"], "peak_mb": peak_mb(), "equal": apart <= WITHIN, "apart": apart,
    }  # fmt: skip


def prototypes(kind: str, n: int, seed: int) -> None:
    """One loss of n patches, there and back; prints seconds, memory and the value."""
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(seed)
    unit = [torch.nn.functional.normalize(torch.randn(n, WIDTH, generator=g), dim=-1) for _ in range(2)]
    weight = torch.nn.functional.normalize(torch.randn(K, WIDTH, generator=g), dim=-1)
    x, w = unit[0].requires_grad_(), weight.clone().requires_grad_()
    share = torch.full((n,), 1 / n)
    begun = time.perf_counter()
    if kind == "ours":
        offset = sinkhorn_offset(unit[1], weight, 0.04, 3, World())
        loss = ibot_prototype_loss(x, w, Targets(unit[1], weight, offset, 0.04), share, 1, 0.1).loss
    else:
        loss = ibot_loss(x @ w.T, sinkhorn_knopp(unit[1] @ weight.T, 0.04), share, 1)
    loss.backward()
    print(time.perf_counter() - begun, most_mb(os.getpid()), float(loss.detach()))


def prototypes_case(n: int, seed: int) -> dict[str, Any]:
    """Each in a process of its own."""
    found = {}
    for kind in ("ours", "plain"):
        command = [sys.executable, __file__, "--prototypes", kind, "--rows", str(n), "--seed", str(seed)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[kind] = [float(word) for word in done.stdout.split()]
    (ours, ours_mb, value), (plain, plain_mb, expected) = found["ours"], found["plain"]
    return {
        "case": "prototypes", "ours": n / ours, "peer": n / plain, "unit": "patches/s", "rows": n,
        "peer_name": "all logits at once", "ratio": plain / ours, "peak_mb": ours_mb, "peer_mb": plain_mb,
        "equal": abs(value - expected) <= WITHIN * abs(expected), "prototypes": K,
    }  # fmt: skip


def main() -> None:
    """Run both cases."""
    parser = arguments(__doc__.partition("\n")[0])
    parser.add_argument("--prototypes", choices=["ours", "plain"], help="one loss in this process, for its memory")
    args = parser.parse_args()
    if args.prototypes:
        prototypes(args.prototypes, args.rows or PATCHES, args.seed)
        return
    torch.set_num_threads(1)
    rows = [prototypes_case(args.rows or PATCHES, args.seed), step_case(args.rows or IMAGES, args.seed)]
    sys.exit(report(rows, args))


if __name__ == "__main__":
    main()
