"""Whether a training can begin with the weights that ``train.init`` names, told before anything is made."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from curation.artifact import Artifact
from embedding.vit_config import ViTConfig
from pipelines.errors import UserError
from pipelines.stage import Step
from training.config import TrainConfig

if TYPE_CHECKING:
    from training.begin import Shape


def check_step(name: str, config: TrainConfig, inputs: Mapping[str, Step]) -> None:
    """Raise UserError unless the train step of a recipe that another begins with makes a backbone of its shape."""
    source = inputs.get("init")
    if source is not None and source.config is not None:
        from training.begin import Shape

        check_begin(source.name, Shape(source.config.vit), config)


def check_artifact(text: str, artifact: Artifact, config: TrainConfig) -> None:
    """The same of a finished train artifact. text: as the user names it."""
    check_begin(text, shape_of_artifact(artifact), config)


def check_model(config: TrainConfig) -> None:
    """The same of the folder or hub name in ``config.init``. Raises ValueError for one that is no ViT of ours."""
    from training.begin import shape_of

    if config.init is not None:
        check_begin(config.init, shape_of(config.init, config.image_size), config)


def shape_of_artifact(artifact: Artifact) -> "Shape":
    """The shape of the backbone of a train artifact."""
    from training.begin import Shape

    vit: dict[str, Any] = artifact.manifest["config"]["vit"]
    return Shape(ViTConfig(**vit))


def check_begin(spec: str, theirs: "Shape", config: TrainConfig) -> None:
    """Raise UserError, with the settings that would fit, unless a training can begin with a backbone."""
    from training.begin import check_shape, differences, text_of

    try:
        check_shape(spec, theirs, config.vit)
    except ValueError as e:
        wanted = theirs.fields() | {"image_size": theirs.config.image_size}
        keys = ", ".join(f"{name}: {text_of(wanted[name])}" for name in differences(theirs, config.vit))
        raise UserError(
            str(e), f"set train.vit: {{{keys}}}; openlvd train PATH --init takes its shape where --vit is not given"
        ) from e
