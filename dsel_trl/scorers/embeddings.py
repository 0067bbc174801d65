"""One vector per example: from the policy, a dataset column, a file, or a sentence-transformers model."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.cache import cached
from ..core.evaluation import evaluation_mode
from ..core.parameters import check_choice
from ..core.run import Run
from ..data.columns import check_column
from ..data.conversations import example_texts
from ..data.fingerprints import column_hash
from ..data.rows import Rows
from ..data.tokens import Sequences

POOLINGS = ("last", "mean")
SOURCE_HELP = (
    '"policy" (hidden states of the model as it is), "column:NAME" (a list column), "file:PATH.npy" (one row per '
    'example), or "model:PATH" (a sentence-transformers model)'
)


def check_source(source: str, pooling: str = "last", refresh: int | str = "never") -> None:
    """Raises `ValueError` unless `source` and `pooling` can name embeddings that `refresh` can take anew."""
    check_choice("pooling", pooling, POOLINGS)
    kind, _, rest = str(source).partition(":")
    if source != "policy" and (kind not in ("column", "file", "model") or not rest):
        raise ValueError(f"embedding={source!r} is none of {SOURCE_HELP}.")
    if kind == "file" and not Path(rest).is_file():
        raise ValueError(f"embedding={source!r}: there is no file {rest!r}.")
    if refresh != "never" and source != "policy":
        raise ValueError(f"refresh={refresh!r} measures the policy again, but embedding={source!r}.")


def check_embeddings(run: Run, source: str, rows: Rows | None = None) -> None:
    """
    Raises where a run cannot give the embeddings that `source` names, before anything is computed; of other `rows`
    than the training set, where they are given.
    """
    kind, _, rest = source.partition(":")
    if rows is not None and kind == "file":
        raise ValueError(
            f"embedding={source!r} holds vectors of the training set, but those of {rows.name!r} are needed as well: "
            "use 'policy', 'column:' (a column that both have) or 'model:'."
        )
    if run.size == 0:
        raise ValueError(f"embedding={source!r}: a stream cannot be embedded before training.")
    if kind == "column":
        check_column((rows or run.rows).dataset, rest, f"embedding={source!r}")
    if kind == "file":
        _file_rows(run, rest)
    if kind == "model":
        _sentence_transformer(rest, "cpu", load=False)
    if kind == "policy" and run.sharded:
        raise ValueError(
            "embedding='policy' needs the whole model before training, which FSDP and DeepSpeed do not have in place "
            "then: use 'file:', 'column:' or 'model:'."
        )


def embeddings(
    run: Run, source: str = "policy", pooling: str = "last", *, rows: Rows | None = None, live: bool = False
) -> np.ndarray:
    """
    Embeddings of all examples, `(N, d)` float32; kept under `output_dir/selection` by fingerprint.

    A pair is embedded by its prompt and chosen response.

    Args:
        run ([`Run`]):
            The run.
        source (`str`, *optional*, defaults to `"policy"`):
            See [`check_source`].
        pooling (`str`, *optional*, defaults to `"last"`):
            Of the policy: hidden state of the `"last"` token, or the `"mean"` over all tokens.
        rows ([`~dsel_trl.data.rows.Rows`], *optional*):
            Other rows than the training set.
        live (`bool`, *optional*, defaults to `False`):
            Measure the policy as it is now, and keep nothing on disk.

    Memory: `4 d` bytes per example (16 GB for 1,000,000 vectors of 4,096).
    """
    kind, _, rest = source.partition(":")
    own = rows or run.rows
    if kind == "column":
        return _as_matrix(own.values(rest), source, len(own))
    if kind == "file":
        return _as_matrix(_file_rows(run, rest), source, run.size)
    compute = (lambda: _sentences(run, rest, own)) if kind == "model" else (lambda: policy_states(run, pooling, own))
    if live:
        return compute()
    # A sentence model reads the texts as they are, whatever the policy is.
    parts, uses = ([source], ()) if kind == "model" else ([source, pooling], ("policy",))
    if rows is not None:
        parts = [*parts, rows.fingerprint()]
    return cached(run, "embeddings", parts, lambda: {"embeddings": compute()}, uses=uses)["embeddings"]


def contents(rows: Rows, source: str) -> str:
    """Hash of the vectors that `source` names, where neither the data's tokens nor the name tell them apart."""
    kind, _, rest = source.partition(":")
    if kind == "column":
        return column_hash(rows.dataset, rest)
    if kind == "file":
        with open(rest, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return ""


def policy_states(
    run: Run,
    pooling: str,
    rows: Rows | None = None,
    *,
    ids: np.ndarray | None = None,
    inputs: Callable[[np.ndarray], Any] | None = None,
    lengths: np.ndarray | None = None,
    layer: int = -1,
) -> np.ndarray:
    """
    Pooled hidden states of the policy as it is now, `(N, d)` float32; of the examples `ids` only, where given.

    They are those of the last layer, or of another `layer`: -2 is the output of the last decoder block but one.

    `rows` are others than the training set. `inputs` and `lengths` are those of
    [`~dsel_trl.core.data_passes.Passes.measure`], for other tokens than the example's own.
    """
    sequences = Sequences((rows or run.rows).side("chosen"))
    return run.passes.measure(
        lambda states: states,
        ids,
        inputs=inputs or sequences.collate(),
        lengths=sequences.scan()[0] if lengths is None else lengths,
        forward=_hidden_states(run, pooling, layer),
        description="Embedding",
    )


def _hidden_states(run: Run, pooling: str, layer: int = -1) -> Callable[[dict[str, Any], Tensor], Tensor]:
    """A forward through the policy's backbone only: pooled hidden states, `(B, d)`."""
    model = run.model.get_base_model() if hasattr(run.model, "get_base_model") else run.model
    backbone, arguments = model.base_model, run.arguments

    def forward(inputs: dict[str, Any], ids: Tensor) -> Tensor:
        mask = inputs["attention_mask"]
        dtype = torch.bfloat16 if arguments.bf16 else torch.float16
        autocast = torch.autocast(mask.device.type, dtype=dtype, enabled=bool(arguments.bf16 or arguments.fp16))
        with evaluation_mode(run.model), torch.no_grad(), autocast:
            output = backbone(
                input_ids=inputs["input_ids"],
                attention_mask=mask,
                use_cache=False,
                output_hidden_states=layer != -1,
            )
            states = (output[0] if layer == -1 else output.hidden_states[layer]).float()
        run.costs.ran("forwards", len(states), int(mask.sum()))
        if pooling == "mean":
            return (states * mask.unsqueeze(2)).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)
        return states[torch.arange(len(states), device=states.device), (mask.sum(dim=1) - 1).clamp(min=0)]

    return forward


def _sentences(run: Run, path: str, rows: Rows) -> np.ndarray:
    model, texts = _sentence_transformer(path, run.model.device), example_texts(rows.side("chosen"))

    def encode(batch: list[str], ids: Tensor) -> Tensor:
        return model.encode(batch, batch_size=len(batch), convert_to_tensor=True, show_progress_bar=False)

    return run.passes.measure(
        lambda vectors: vectors,
        inputs=lambda ids: [texts[i] for i in ids],
        lengths=np.array([1 + len(text) // 4 for text in texts], dtype=np.int64),
        forward=encode,
        description="Embedding",
    )


def _sentence_transformer(path: str, device: Any, load: bool = True) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(
            f"embedding='model:{path}' needs sentence-transformers: pip install \"dsel-trl[embed]\""
        ) from error
    if not load:
        return None
    try:
        # A head that a checkpoint lacks is drawn at random: not from the generator that the run goes on with.
        with torch.random.fork_rng(devices=[]):
            return SentenceTransformer(path, device=str(device), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"embedding='model:{path}' cannot be loaded by sentence-transformers: {error}") from error


def _file_rows(run: Run, path: str) -> np.ndarray:
    """Rows of the file for the examples that are left: the trainer may have dropped some of the user's."""
    rows = np.load(path, mmap_mode="r", allow_pickle=False)
    if rows.ndim == 2 and len(rows) == run.size:
        return rows
    positions = run.rows.positions
    if rows.ndim == 2 and len(rows) > positions.max(initial=-1):
        return rows[positions]
    raise ValueError(f"embedding='file:{path}' has shape {rows.shape}, but one row for each of {run.size} is needed.")


def _as_matrix(values: Any, source: str, size: int) -> np.ndarray:
    try:
        matrix = np.asarray(values[:] if not isinstance(values, np.ndarray) else values, dtype=np.float32)
    except (ValueError, TypeError) as error:
        raise ValueError(f"embedding={source!r} does not hold vectors of one length: {error}") from error
    if matrix.ndim != 2 or len(matrix) != size:
        raise ValueError(f"embedding={source!r} has shape {matrix.shape}, not ({size}, d).")
    return matrix
