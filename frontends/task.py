"""What a model's outputs mean: from a Hugging Face config, or guessed from an ONNX graph."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from ..graph.errors import ModelError, NotSupported
from ..graph.model import Model, Task, TensorSpec
from .sidecars import Config, confined, optional_config, read_config, read_json

_SUPPORTED = (
    "encoders (*Model, WhisperEncoder), *ForSequenceClassification, *ForTokenClassification, "
    "*ForQuestionAnswering, *ForMaskedLM, *ForCausalLM and *LMHeadModel without a KV cache, *ForCTC, "
    "*ForImageClassification, *ForSemanticSegmentation and *ForAudioClassification"
)
_CLASSIFIERS = ("ForSequenceClassification", "ForImageClassification", "ForAudioClassification")
# One row of scores for every token or sound frame.
_PER_TOKEN = ("ForTokenClassification", "ForMaskedLM", "ForCausalLM", "LMHeadModel", "ForCTC")
# Several outputs, or maps: each is compared as it is.
_AS_IT_IS = ("ForQuestionAnswering", "ForSemanticSegmentation", "ModelWithProjection")
_ENCODERS = ("Model", "WhisperEncoder")
_CACHE_NAME = re.compile(r"(past|present)(_key|_value|[._]\d|$)|past_key_values|key_cache|value_cache")
_POOLINGS: dict[str, Literal["mean", "cls"]] = {
    "pooling_mode_cls": "cls",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean": "mean",
    "pooling_mode_mean_tokens": "mean",
}
_CLASS_OUTPUT = re.compile(r"logits?|prob(s|abilit(y|ies))?|scores?|class(es)?|softmax", re.IGNORECASE)
_EMBEDDING_OUTPUT = re.compile(r"embed|feature|pooler", re.IGNORECASE)
_CLASS_FILES = ("classes.txt", "labels.txt")
_CLASS_FILE_LIMIT_BYTES = 1 << 20
_TAIL_OPS = frozenset({"Softmax", "LogSoftmax", "Sigmoid", "Add", "Identity", "Cast"})
_TAIL_LENGTH = 4


def architecture_of(config: Config, *, where: str) -> str:
    """The class name that a config.json declares.

    Raises:
        ModelError: if it declares none.
    """
    names = config.get("architectures")
    if isinstance(names, list) and names and isinstance(names[0], str):
        return names[0]
    raise ModelError(
        "config.json does not say which architecture the weights are for",
        where=where,
        why='it has no "architectures" entry',
        remedy='add it, for example "architectures": ["BertModel"]',
    )


def task_of_config(config: Config, folder: Path) -> Task:
    """The task of a Hugging Face model from its config.json and sentence-transformers' files.

    Raises:
        NotSupported: if the architecture is none of the supported kinds.
        ModelError: if no architecture is declared, or the pooling files are malformed.
    """
    architecture = architecture_of(config, where="config.json")
    if architecture.endswith(_CLASSIFIERS):
        classes = _classes(config)
        # One real-valued output (regression, reranking) has no class to compare, but a value.
        real = len(classes) == 1 or config.get("problem_type") == "regression"
        return Task() if real else Task(kind="classification", classes=classes)
    if architecture.endswith(_PER_TOKEN):
        named = architecture.endswith("ForTokenClassification")
        return Task(kind="token-classification", classes=_classes(config) if named else ())
    if architecture.endswith(_AS_IT_IS):
        return Task()
    if architecture.endswith(_ENCODERS):
        images = "num_channels" in config or "image_size" in config
        return Task(kind="embedding", pooling="none" if images else pooling_of(folder) or "mean")
    raise NotSupported(
        f"the architecture {architecture} is not supported",
        where="config.json",
        why=f"supported are {_SUPPORTED}",
        remedy="pass module:factory, which gives the model and example inputs, or an .onnx file",
    )


def refuse_cache(model: Model) -> None:
    """Refuse a decoder whose graph carries a KV cache from step to step.

    Raises:
        NotSupported: if an input or output is such a cache.
    """
    for value in (*model.inputs, *model.outputs):
        if _CACHE_NAME.match(value.name):
            raise NotSupported(
                "decoders with a KV cache are not supported",
                where=f"input or output {value.name!r}",
                why="calibration and drift run one pass over a whole sequence; a cache is carried from "
                "step to step, and quantizing around it would be measured on no real state",
                remedy="export the model without its cache (use_cache=False)",
            )


def pooling_of(folder: Path) -> Literal["mean", "cls", "none"] | None:
    """The pooling that sentence-transformers' files declare: None without them, "none" for others.

    Raises:
        ModelError: if modules.json or the pooling config is malformed.
    """
    if not (file := _pooling_config(folder)):
        return None
    config = read_config(confined(folder, file))
    modes = [key for key, on in config.items() if key.startswith("pooling_mode_") and on is True]
    if "pooling_mode" in config:  # newer files name the mode instead of one flag for each
        modes = [f"pooling_mode_{config['pooling_mode']}"]
    return _POOLINGS.get(modes[0], "none") if len(modes) == 1 else "none"


def _pooling_config(folder: Path) -> str | None:
    """The name of the pooling config relative to `folder`, if there is one."""
    if (folder / "modules.json").is_file():
        modules = read_json(confined(folder, "modules.json"))
        entries = modules if isinstance(modules, list) else []
        for entry in entries:
            if isinstance(entry, dict) and str(entry.get("type", "")).endswith("Pooling"):
                name = f"{entry.get('path', '')}/config.json"
                return name if (confined(folder, name)).is_file() else None
        return None
    return "1_Pooling/config.json" if (folder / "1_Pooling/config.json").is_file() else None


def _classes(config: Config) -> tuple[str, ...]:
    """Class names in the order of the outputs, or () where the config does not name all of them."""
    labels = config.get("id2label")
    if not isinstance(labels, dict):
        return ()
    named = {str(index): str(name) for index, name in labels.items()}
    order = [str(index) for index in range(len(named))]
    return tuple(named[index] for index in order) if set(order) == set(named) else ()


def guess_task(model: Model, folder: Path) -> Task:
    """The task of an .onnx model from its graph and the files beside it.

    A config.json beside the file decides where it names a supported architecture. Otherwise: an
    attention mask and a [batch, sequence, hidden] output make an embedding model (mean pooling,
    or what a pooling config says); [batch, sequence, classes] called logits, a token classifier; one
    [batch, n] output that is called logits or the like, ends in a linear layer, or has a file of
    classes beside it, a classifier.

    Raises:
        ModelError: if a file beside the model is malformed.
    """
    config = optional_config(folder, "config.json")
    if (told := _told(config, folder, model)) is not None:
        return told
    ranks = {output.name: len(output.shape) for output in model.outputs if output.shape is not None}
    if any(value.name == "attention_mask" for value in model.inputs):
        deep = [name for name, rank in ranks.items() if rank == 3]
        if deep and _CLASS_OUTPUT.fullmatch(deep[0]):
            return Task(kind="token-classification")
        if deep:
            return Task(kind="embedding", pooling=pooling_of(folder) or "mean")
    if len(model.outputs) == 1 and ranks.get(model.outputs[0].name) == 2:
        return _guess_flat(model, model.outputs[0], folder)
    return Task()


def _told(config: Config, folder: Path, model: Model) -> Task | None:
    if not isinstance(config.get("architectures"), list) or not config["architectures"]:
        return None
    try:
        task = task_of_config(config, folder)
    except NotSupported:
        return None
    shapes = [output.shape for output in model.outputs if output.shape is not None]
    wanted = 2 if task.kind == "classification" else 3
    if task.kind == "embedding" and task.pooling == "none":
        return task
    return task if any(len(shape) == wanted for shape in shapes) else None


def _guess_flat(model: Model, output: TensorSpec, folder: Path) -> Task:
    classes = _class_file(folder)
    width = output.shape[1] if output.shape is not None else None
    if classes and (not isinstance(width, int) or width == len(classes)):
        return Task(kind="classification", classes=classes)
    if _EMBEDDING_OUTPUT.search(output.name) or width == 1:
        return Task()
    value = model.graph.outputs[0]
    if _CLASS_OUTPUT.search(output.name) or _ends_in_probabilities(value) or _ends_in_linear(value):
        return Task(kind="classification")
    return Task()


def _ends_in_probabilities(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.domain in ("", "ai.onnx") and node.op_type in ("Softmax", "LogSoftmax")


def _ends_in_linear(value: ir.Value) -> bool:
    """Whether a value comes from Gemm or MatMul, with at most bias, Softmax and the like after it."""
    for _ in range(_TAIL_LENGTH):
        node = value.producer()
        if node is None or node.domain not in ("", "ai.onnx"):
            return False
        if node.op_type in ("Gemm", "MatMul"):
            return True
        computed = [item for item in node.inputs if item is not None and item.producer() is not None]
        if node.op_type not in _TAIL_OPS or len(computed) != 1:
            return False
        value = computed[0]
    return False


def _class_file(folder: Path) -> tuple[str, ...]:
    for name in _CLASS_FILES:
        file = folder / name
        if not file.is_file() or confined(folder, name).stat().st_size > _CLASS_FILE_LIMIT_BYTES:
            continue
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError("the file of classes cannot be read", where=str(file), why=str(error)) from error
        return tuple(line.strip() for line in lines if line.strip())
    return ()
