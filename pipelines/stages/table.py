"""Every stage by the name it has in a recipe."""

from pipelines.stage import Stage
from pipelines.stages import (
    assign,
    calibrate,
    cluster,
    decontaminate,
    dedup,
    embed,
    evaluate,
    mix,
    neighbors,
    pool,
    report,
    retrieve,
    sample,
    score,
    select,
    shards,
    train,
    union,
)

STAGES: dict[str, Stage] = {
    "pool": pool.STAGE,
    "union": union.STAGE,
    "select": select.STAGE,
    "embed": embed.STAGE,
    "calibrate": calibrate.STAGE,
    "score": score.STAGE,
    "neighbors": neighbors.STAGE,
    "dedup": dedup.STAGE,
    "decontaminate": decontaminate.STAGE,
    "retrieve": retrieve.STAGE,
    "cluster": cluster.STAGE,
    "assign": assign.STAGE,
    "sample": sample.STAGE,
    "mix": mix.STAGE,
    "shards": shards.STAGE,
    "train": train.STAGE,
    "evaluate": evaluate.STAGE,
    "report": report.STAGE,
}
