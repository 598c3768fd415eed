"""Every stage by the name it has in a recipe."""

from pipelines.stage import Stage
from pipelines.stages import (
    cluster,
    decontaminate,
    dedup,
    embed,
    evaluate,
    neighbors,
    pool,
    report,
    sample,
    select,
    shards,
    train,
)

STAGES: dict[str, Stage] = {
    "pool": pool.STAGE,
    "select": select.STAGE,
    "embed": embed.STAGE,
    "neighbors": neighbors.STAGE,
    "dedup": dedup.STAGE,
    "decontaminate": decontaminate.STAGE,
    "cluster": cluster.STAGE,
    "sample": sample.STAGE,
    "shards": shards.STAGE,
    "train": train.STAGE,
    "evaluate": evaluate.STAGE,
    "report": report.STAGE,
}
