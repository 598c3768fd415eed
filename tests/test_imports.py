"""Imports go one way, and what only one module needs is imported in that module alone."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("curation", "embedding", "training", "pipelines")  # each may import what stands to its left
FILES = sorted(path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

CURATION = {"numpy", "pyarrow", "scipy", "numba", "boto3", "botocore", "faiss", "torch", "idna", "triton"}
EMBEDDING = CURATION | {"PIL", "transformers", "huggingface_hub", "safetensors"}
TRAINING = EMBEDDING | {"sklearn", "webdataset"}
ALLOWED = {"curation": CURATION, "embedding": EMBEDDING, "training": TRAINING}  # pipelines: everything

ONLY_IN = {  # beginnings of paths
    "numba": ("curation/loops", "training/loops"),
    "triton": "curation/nearest_triton.py",
    "boto3": "curation/s3.py",
    "botocore": "curation/s3.py",
    "ray": "pipelines/ray_executor.py",
    "pydantic": "pipelines/",
    "duckdb": "pipelines/",
    "pyspark": "pipelines/crawl/spark.py",
    "img2dataset": "pipelines/crawl/fetch_job.py",
    "idna": "curation/urls.py",
}
IN_FUNCTIONS = {
    "faiss",
    "ray",
    "boto3",
    "botocore",
    "transformers",
    "huggingface_hub",
    "webdataset",
    "pyspark",
    "img2dataset",
}
IN_FUNCTIONS_OF = {"curation": {"torch"}}
NEVER = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}  # nothing that comes with data is executed


class Import(NamedTuple):
    file: str
    line: int
    module: str  # the top-level name
    in_function: bool


def imports_of(source: str, file: str) -> list[Import]:
    """Every import, wherever it stands."""
    found: list[Import] = []

    def visit(node: ast.AST, in_function: bool) -> None:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "") if node.level == 0 else ""]
        found.extend(Import(file, node.lineno, name.partition(".")[0], in_function) for name in names)
        inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(source), False)
    return found


def broken_rule(found: Import) -> str | None:
    """The rule that an import breaks, or None."""
    folder, module = found.file.partition("/")[0], found.module
    ours = module in FOLDERS
    known = ours or module in sys.stdlib_module_names or folder not in ALLOWED or module in ALLOWED[folder]
    only_in, inside = ONLY_IN.get(module, ""), IN_FUNCTIONS | IN_FUNCTIONS_OF.get(folder, set())
    places = only_in if isinstance(only_in, str) else " and ".join(only_in)
    rules = {
        "imports are absolute": not module,
        f"{module} is never used": module in NEVER,
        f"{folder} does not import {module}": ours and FOLDERS.index(module) > FOLDERS.index(folder),
        f"{module} is used in {places} alone": not found.file.startswith(only_in),
        f"{module} is imported inside functions": module in inside and not found.in_function,
        f"{folder} does not use {module}": not known,
    }
    return next((rule for rule, is_broken in rules.items() if is_broken), None)


def catches_everything(source: str) -> list[int]:
    """Lines with a bare ``except`` or one for all exceptions."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            names = {ast.unparse(kind) if kind else "everything" for kind in kinds}
            if names & {"everything", "Exception", "BaseException"}:
                lines.append(node.lineno)
    return lines


def test_there_are_files():
    assert {file.partition("/")[0] for file in FILES} == set(FOLDERS) and len(FILES) > 40


@pytest.mark.parametrize("file", FILES)
def test_imports_keep_the_order_of_the_house(file):
    found = imports_of((ROOT / file).read_text(), file)
    broken = [f"{at.file}:{at.line}: {rule}" for at in found if (rule := broken_rule(at))]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("file", [*FILES, *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests").rglob("*.py"))])
def test_exceptions_are_named(file):
    assert catches_everything((ROOT / file).read_text()) == []


@pytest.mark.parametrize(
    "file, source, rule",
    [
        ("curation/x.py", "from embedding.vit import ViT", "curation does not import embedding"),
        ("training/x.py", "def f():\n    import pipelines.cli", "training does not import pipelines"),
        ("curation/x.py", "import PIL.Image", "curation does not use PIL"),
        ("embedding/x.py", "import sklearn", "embedding does not use sklearn"),
        ("curation/x.py", "import torch", "torch is imported inside functions"),
        ("curation/x.py", "if True:\n    import faiss", "faiss is imported inside functions"),
        ("curation/kmeans.py", "import numba", "numba is used in curation/loops and training/loops alone"),
        ("pipelines/lock.py", "def f():\n    import boto3", "boto3 is used in curation/s3.py alone"),
        ("pipelines/stage.py", "def f():\n    import ray", "ray is used in pipelines/ray_executor.py alone"),
        ("pipelines/x.py", "def f():\n    import pyspark", "pyspark is used in pipelines/crawl/spark.py alone"),
        ("training/x.py", "import pydantic", "pydantic is used in pipelines/ alone"),
        ("curation/x.py", "from .pool import PoolConfig", "imports are absolute"),
        ("pipelines/x.py", "import pickle", "pickle is never used"),
    ],
)
def test_the_rules_see_what_they_forbid(file, source, rule):
    [found] = imports_of(source, file)
    assert broken_rule(found) == rule


@pytest.mark.parametrize(
    "source", ["except:", "except Exception:", "except (OSError, Exception) as e:", "except BaseException:"]
)
def test_catching_everything_is_seen(source):
    assert catches_everything(f"try:\n    x()\n{source}\n    pass") == [3]
    assert catches_everything("try:\n    x()\nexcept (OSError, ValueError):\n    pass") == []


BLOCKED = ("ray", "faiss", "pydantic", "boto3", "botocore", "webdataset", "duckdb")
ALONE = """
    import sys

    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in {blocked}:
                raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

    sys.meta_path.insert(0, Blocked())
    for name in {modules}:
        __import__(name)

    import numpy as np
    import torch
    from curation.hierarchy import hierarchical_kmeans
    from embedding.vit_config import ViTConfig
    from training.config import HeadConfig, TrainConfig
    from training.train_step import StepSettings, TrainState, train_step

    x = np.random.default_rng(0).normal(size=(60, 4)).astype("f4")
    assert hierarchical_kmeans(x, [6, 2], np.random.default_rng(0), 1).n_clusters == (6, 2)
    head = HeadConfig(prototypes=16, hidden=16, bottleneck=16)
    config = TrainConfig(
        vit=ViTConfig(width=32, depth=1, heads=2, patch_size=8), image_size=32, local_size=16, n_local=2,
        head=head, ibot_head=head, n_steps=2, batch=2, warmup_steps=1,
    )
    crops = [torch.zeros((n, 2, s, s, 3), dtype=torch.uint8) for n, s in ((2, 32), (2, 16))]
    settings = StepSettings(0, 1e-3, 0.05, 0.9, 0.04)
    metrics = train_step(TrainState(config, torch.device("cpu")), *crops, config, settings)
    assert np.isfinite(metrics.loss), metrics
    assert not set({blocked}) & set(sys.modules)
"""
MODULES = (
    *(f"curation.{name}" for name in "neighbors kmeans hierarchy sampling components shards".split()),
    *(f"embedding.{name}" for name in "vit preprocess decode embed".split()),
    *(f"training.{name}" for name in "losses train_step loader trainer probes".split()),
)


def test_kernels_and_a_train_step_need_no_engine_and_no_cloud():
    code = textwrap.dedent(ALONE).format(blocked=BLOCKED, modules=MODULES)
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
