"""Oracle adapter for perplexity bands."""

from dsel_trl.functional.perplexity import perplexity_band


def evaluate(oracle):
    for i, case in enumerate(oracle["cases"]):
        for band in ("low", "mid", "high"):
            if band in case:
                ids = perplexity_band(oracle["perplexity"], case["keep_fraction"], band)
                yield f"cases[{i}].{band}", ids, case[band]
                if "k" in case:
                    yield f"cases[{i}].k ({band})", len(ids), case["k"]
