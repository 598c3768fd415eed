"""What a page is about: the steps of a run, and how much of them is shown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from curation.artifact import Artifact, pool_of
from curation.execute import Executor
from curation.store import Location

MAX_SHOWN = 48  # upper limit of the settings that ask for pictures


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What the page is called and how much it shows."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    title: str = "What happened to the images"
    labels: str = ""  # Parquet with columns source and label: classes that the pool itself does not know
    n_pairs: int = 6  # pairs of each kind: most similar, least similar, drawn at random
    n_images: int = 14  # images of a cluster
    n_clusters: int = 24  # clusters with pictures, from the largest to the smallest
    n_rejected: int = 6  # files of each reason
    n_classes: int = 30  # classes with a bar, the most frequent
    n_maps: int = 8  # images of an evaluation whose patches are shown; it has no more than 8
    seed: int = 0  # of what is drawn at random

    def __post_init__(self) -> None:
        for name in ("n_pairs", "n_images", "n_clusters", "n_rejected", "n_classes", "n_maps"):
            if not 0 <= getattr(self, name) <= MAX_SHOWN:
                raise ValueError(f"report.{name} must be in 0..{MAX_SHOWN}: got {getattr(self, name)}")


@dataclass(frozen=True)
class Run:
    """The steps that the page is about, in the order of the recipe."""

    steps: Mapping[str, Artifact]
    config: ReportConfig
    labels: Location | None  # the file of labels, if there is one
    executor: Executor
    unfinished: Mapping[str, str] = field(default_factory=dict)  # the stage of each step that the run has not finished

    @cached_property
    def _at(self) -> dict[str, Artifact]:
        return {artifact.location.uri: artifact for artifact in self.steps.values()}

    def of(self, *stages: str) -> dict[str, Artifact]:
        """The steps of some stages."""
        return {name: artifact for name, artifact in self.steps.items() if artifact.stage in stages}

    def pool(self, artifact: Artifact) -> Artifact:
        """The pool behind an artifact, with its source where it is now."""
        pool = pool_of(artifact)
        return self._at.get(pool.location.uri, pool)

    def name(self, artifact: Artifact) -> str:
        """The step that made an artifact."""
        return artifact.location.parent.name

    def reading(self, artifact: Artifact, key: str, *stages: str) -> dict[str, Artifact]:
        """The steps whose input ``key`` is ``artifact``."""
        return {
            name: step
            for name, step in self.of(*stages).items()
            if step.has_input(key) and step.manifest["inputs"][key]["digest"] == artifact.digest
        }


def step_inputs(artifact: Artifact) -> dict[str, str]:
    """The step behind each input: the last but one piece of its path, which may be absolute."""
    return {key: entry["path"].split("/")[-2] for key, entry in artifact.manifest["inputs"].items()}


def best_of(found: Sequence[Any], n: int, key: Any) -> list[Any]:
    """The first ``n`` by ``key``; the order of equals is theirs."""
    return sorted(found, key=key)[:n]
