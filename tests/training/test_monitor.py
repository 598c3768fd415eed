import math
import re
from dataclasses import replace

import pytest
import torch

from training.config import HeadConfig, TrainConfig
from training.monitor import SETTLED, alarms, doubts
from training.train_step import StepMetrics, step_masks

LN_K = math.log(256)
HEALTHY = StepMetrics(
    loss=6.0, dino_loss=0.9 * LN_K, ibot_loss=2.0, koleo_loss=0.1, teacher_entropy=0.7 * LN_K,
    ibot_teacher_entropy=0.7 * LN_K, usage_perplexity=120.0, crop_similarity=0.8, rank=30.0, grad_norm=1.0, lr=1e-3,
    skipped=0.0,
)  # fmt: skip


@pytest.fixture
def config(tiny):
    return replace(tiny, head=HeadConfig(prototypes=256, hidden=8, bottleneck=8), n_steps=1000, warmup_steps=50)


def test_a_healthy_step_gives_no_alarm(config):
    assert alarms(SETTLED, HEALTHY, config) == {}


ALARMS = {
    "uniform": ({"dino_loss": 0.99 * LN_K, "teacher_entropy": 0.99 * LN_K}, r"5\.49 and the loss 5\.49 are near ln K"),
    "few": ({"usage_perplexity": 1.3}, "all images fall on 1.3 prototypes"),
    "blind": ({"crop_similarity": 0.9995}, r"two crops of an image have the same features \(cosine 0\.9995\)"),
    "skipped": ({"skipped": 1.0, "loss": math.nan, "dino_loss": math.nan}, "the step was left out"),
}


@pytest.mark.parametrize("kind", ALARMS)
def test_each_alarm_is_given_for_its_reason_alone(config, kind):
    fields, words = ALARMS[kind]
    found = alarms(SETTLED, HEALTHY._replace(**fields), config)
    assert list(found) == [kind]
    assert re.search(words, found[kind])


@pytest.mark.parametrize(
    "fields",
    [
        {"dino_loss": 0.99 * LN_K},  # sharp targets that the student has not learnt
        {"teacher_entropy": 0.99 * LN_K},  # a loss below ln K, whatever the entropy
        {"teacher_entropy": 0.97 * LN_K, "dino_loss": LN_K},
        {"usage_perplexity": 5.0},
        {"crop_similarity": 0.999},
        {"rank": 1.0},  # alone no sign: see the reference of RankMe
        {"rank": math.nan},
    ],
)
def test_a_part_of_a_reason_gives_no_alarm(config, fields):
    assert alarms(SETTLED, HEALTHY._replace(**fields), config) == {}


def test_nothing_is_said_of_collapse_before_it_can_be_told(config):
    bad = HEALTHY._replace(dino_loss=LN_K, teacher_entropy=LN_K, usage_perplexity=1.0, crop_similarity=1.0, skipped=1.0)
    assert list(alarms(SETTLED - 1, bad, config)) == ["skipped"]
    assert sorted(alarms(SETTLED, bad, config)) == ["blind", "few", "skipped", "uniform"]
    slow = replace(config, warmup_steps=300)  # at low rates a sound run is near ln K for long
    assert sorted(alarms(299, bad, slow)) == ["few", "skipped"]
    assert sorted(alarms(300, bad, slow)) == ["blind", "few", "skipped", "uniform"]


def test_few_prototypes_cannot_be_few_in_use(config):
    few = replace(config, head=HeadConfig(prototypes=16, hidden=8, bottleneck=8))
    assert alarms(SETTLED, HEALTHY._replace(usage_perplexity=4.0, dino_loss=1, teacher_entropy=1), few) == {}


# prototypes, entropy and loss (nats), alarm: two runs that learn nothing and one that does, of width 96 on CIFAR-10
RUNS = {
    "2.4 A": (512, 6.238, 6.238, True),
    "2.4 B": (256, 5.531, 5.545, True),
    "2.4 C, after 200 steps": (256, LN_K - 0.59, 5.40, False),
    "2.4 C, at its end": (256, 4.27, 5.10, False),
}


@pytest.mark.parametrize("name", RUNS)
def test_runs_of_the_reference(config, name):
    k, entropy, loss, stuck = RUNS[name]
    config = replace(config, head=HeadConfig(prototypes=k, hidden=8, bottleneck=8))
    found = alarms(182, HEALTHY._replace(teacher_entropy=entropy, dino_loss=loss), config)
    assert list(found) == (["uniform"] if stuck else [])


def fits(tiny, **options):
    return replace(tiny, **{"n_steps": 1000, "batch": 64, **options})


def test_a_run_without_doubts(tiny):
    assert doubts(fits(tiny), 1000) == []
    assert doubts(fits(tiny, centering="softmax"), 64_000) == []  # an epoch and no more


def test_more_prototypes_than_images(tiny):
    (found,) = doubts(fits(tiny), 63)
    assert "more prototypes (train.head.prototypes 64) than images (63)" in found
    assert "near 16 fits" in found
    assert doubts(fits(tiny), 64) == []


def test_a_run_that_ends_before_an_epoch(tiny):
    (found,) = doubts(fits(tiny), 128_000)
    assert found.startswith("the run ends after 50% of the images")


def head(k):
    return HeadConfig(prototypes=k, hidden=8, bottleneck=8)


def test_more_prototypes_than_the_targets_of_a_step_can_tell_apart(tiny):
    """A doubt from where no target can be surer than half of ln K: more prototypes than targets squared."""
    four = fits(tiny, batch=4, n_steps=10**6)  # 8 CLS targets and 32 masked patches
    (found,) = doubts(replace(four, head=head(65)), 10**5)
    assert "a step balances 8 targets over 65 prototypes (train.head.prototypes)" in found
    assert "ln(8) = 2.1 of 4.2 nats" in found
    assert doubts(replace(four, head=head(64)), 10**5) == []
    masked = doubts(replace(four, ibot_head=head(5000)), 10**5)
    assert len(masked) == 1 and "over 5,000 prototypes (train.ibot_head.prototypes)" in masked[0]
    assert doubts(replace(four, ibot_head=head(5000), ibot_weight=0.0), 10**5) == []
    assert doubts(replace(four, head=head(65), centering="softmax"), 10**5) == []
    (shared,) = doubts(replace(four, head=head(70), ibot_head=None), 10**5)
    assert "train.head.prototypes" in shared


def test_masked_patches_are_counted_group_by_group(tiny):
    one, many = (fits(tiny, batch=16, group=group, n_steps=10**6, ibot_head=head(10**6)) for group in (None, 4))
    counts = [int(doubts(config, 10**7)[0].split("balances ")[1].split()[0]) for config in (one, many)]
    for config, count in zip((one, many), counts, strict=True):
        assert count == len(step_masks(config, 0, torch.device("cpu")).rows_M)


PUBLISHED = {  # batch, prototypes of both heads, images: arXiv 2304.07193 and 2508.10104 and their code
    "DINOv2 L/16": (2048, 65536, 65536, 1_281_167),
    "DINOv2 g/14": (3072, 131072, 131072, 142_000_000),
    "DINOv3 L/16": (2048, 65536, 65536, 1_281_167),
    "DINOv3 7B": (4096, 262144, 98304, 1_689_000_000),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_and_the_defaults_give_no_doubt(name):
    batch, k, k_ibot, images = PUBLISHED[name]
    n_steps = 2 * images // batch
    config = TrainConfig(batch=batch, group=64, head=HeadConfig(prototypes=k),
                         ibot_head=HeadConfig(prototypes=k_ibot), n_steps=n_steps)  # fmt: skip
    assert doubts(config, images) == []
    assert doubts(TrainConfig(), 100_000) == []
