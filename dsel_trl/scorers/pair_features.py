"""The features of pairs by forwards of a model, kept on disk while they are made: a killed pass goes on."""

from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file
from tqdm.auto import tqdm

from ..core.cache import model_fingerprint
from ..core.data_passes import Passes
from ..data.files import save_arrays
from ..data.pairs import PairTokens
from ..functional.audit.token_statistics import NAMES
from .responses import ResponseReader, read_responses

# Pairs of one file: what a killed pass loses at most.
SHARD = 512


def pair_differences(chosen: np.ndarray, rejected: np.ndarray, reader: ResponseReader) -> dict[str, np.ndarray]:
    """Chosen minus rejected, of what a reader says of both: `statistics` float32, `layer_<n>` float16."""
    statistics, states = reader.split(chosen - rejected)
    # Halves of the precision are lost in what is a mean over tokens anyway; values beyond float16 are cut.
    return {"statistics": statistics} | {
        f"layer_{layer}": np.clip(values, -65504, 65504).astype(np.float16) for layer, values in states.items()
    }


def measure_pairs(reader: ResponseReader, tokens: PairTokens, folder: Path) -> dict[str, np.ndarray]:
    """
    `statistics` `(N, K)` and `layer_<n>` `(N, d)` of all pairs.

    Args:
        reader ([`~dsel_trl.scorers.responses.ResponseReader`]):
            The model.
        tokens ([`~dsel_trl.data.pairs.PairTokens`]):
            The pairs.
        folder (`Path`):
            Where finished parts are kept, under a name made of the model, its layers and the tokens.

    Memory: `4 K + 2 d` bytes per pair and layer (160 MB for 100,000 pairs, 3 layers of 576).
    """
    model = reader.model
    key = f"{model_fingerprint(model)[:12]}-{'-'.join(map(str, reader.layers)) or 'none'}-{tokens.fingerprint}"
    passes = Passes(rows=lambda: None, forward=lambda: None, rank=1)  # type: ignore[arg-type, return-value]
    size = len(tokens.responses)
    parts: list[dict[str, np.ndarray]] = []
    for start in tqdm(range(0, size, SHARD), desc="Forwards", unit_scale=SHARD, unit="pairs"):
        file, count = folder / key / f"{start // SHARD:05d}.safetensors", min(SHARD, size - start)
        found = _read(file, count)
        if found is None:
            ids = np.arange(2 * start, 2 * (start + count))
            values = read_responses(
                reader,
                tokens,
                ids,
                tokens.lengths,
                passes=passes,
                pad=tokens.pad,
                device=model.device,
                description="",
            )
            found = pair_differences(values[0::2], values[1::2], reader)
            save_arrays(file, found)
        parts.append(found)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _read(file: Path, count: int) -> dict[str, np.ndarray] | None:
    """A finished part; one that cannot be read, or is another's, is made again."""
    if not file.is_file():
        return None
    try:
        found = load_file(file)
    except SafetensorError:
        return None
    shape = found["statistics"].shape if "statistics" in found else None
    return found if shape == (count, len(NAMES)) else None
