"""k-NN accuracy in the loop: labelled images of the shards, seen by the teacher as it is, vote on one another.

Labels come from the shard index and are used for nothing else. The images are images that are trained on, each judged
by the others: a number to compare steps of a run by, higher than one of images never seen.
"""

import numpy as np
import torch
from torch.nn import functional as F

from curation.listing import Root
from curation.store import Location
from embedding.decode import BadImage, decode_rgb
from embedding.preprocess import Preprocess
from embedding.vit import ViT
from training.augment import normalise
from training.config import TrainConfig
from training.probes import knn_vote
from training.stream import Sample, list_shards, read_images, read_index

N_NEIGHBORS = 20  # that vote
_KEY = 8  # the last word of the key of this generator keeps it apart from all others of a run
_AT_A_TIME = 64  # images of a forward
_COMPARED = 4096  # images that are compared with all others at a time


class LabelledImages:
    """Labelled images of a shard set, in memory: 3 bytes a pixel of the size that is trained on."""

    def __init__(self, shards: Location, config: TrainConfig, root: Root | None = None) -> None:
        """Draw ``knn_images`` of them, from as few shards as hold enough. Raises ValueError without two classes.

        root: as ``training.stream.locate_tar``.
        """
        samples, labels = _draw(shards, config)
        prepare = Preprocess(size=config.image_size, keep_aspect=False, crop=None)
        images, kept = [], []
        for i in range(0, len(samples), _AT_A_TIME):
            for data, label in zip(read_images(shards, samples[i : i + _AT_A_TIME], root), labels[i:], strict=False):
                image = decode_rgb(data)
                if not isinstance(image, BadImage):
                    images.append(prepare.cropped(image))
                    kept.append(label)
        names, self.labels = np.unique(np.array(kept, dtype=str), return_inverse=True)
        if len(names) < 2:
            raise ValueError(
                f"train.knn_every needs labelled images of two classes in the shard index: got {len(names)} in "
                f"{shards}; set it to 0 to train without"
            )
        self.images = torch.from_numpy(np.stack(images))
        self.augment = config.augment

    @torch.no_grad()
    def accuracy(self, backbone: ViT, device: torch.device) -> float:
        """Share of the images whose label is that of the 20 nearest others, weighted as ``probes.knn_vote``."""
        features = []
        for i in range(0, len(self.images), _AT_A_TIME):
            part = self.images[i : i + _AT_A_TIME]
            images = normalise(part.to(device), self.augment.mean, self.augment.std)
            features.append(F.normalize(backbone(images).cls.float(), dim=-1))
        x_ND = torch.cat(features)
        voted = []
        for i in range(0, len(x_ND), _COMPARED):
            similarity = x_ND[i : i + _COMPARED] @ x_ND.T
            similarity.diagonal(offset=i).fill_(-torch.inf)  # nobody votes on itself
            top = similarity.topk(min(N_NEIGHBORS, len(x_ND) - 1))
            near = self.labels[top.indices.cpu().numpy()]
            voted.append(knn_vote(near, top.values.cpu().numpy(), int(self.labels.max()) + 1))
        return float((np.concatenate(voted) == self.labels).mean())


def _draw(shards: Location, config: TrainConfig) -> tuple[list[Sample], list[str]]:
    """Samples and their labels: shards in an order drawn by the seed, and of each as many labelled rows as are left."""
    rng = np.random.default_rng([config.seed, 0, 0, _KEY])
    samples: list[Sample] = []
    labels: list[str] = []
    for shard in rng.permutation(list_shards(shards)).tolist():
        table = read_index(shards, shard, ("key", "offset", "length", "label"))
        table = table.filter(table["label"].is_valid())
        left = config.knn_images - len(samples)
        table = table.take(np.sort(rng.permutation(len(table))[:left]))
        places = zip(*(table[name].to_pylist() for name in ("offset", "length", "key")), strict=True)
        samples += [Sample(shard, at, length, key, 0, 0, 0) for at, length, key in places]
        labels += [str(label) for label in table["label"].to_pylist()]
        if len(samples) >= config.knn_images:
            break
    return samples, labels
