"""What the words of a report mean."""

from collections.abc import Sequence
from html import escape

from ..ledger import WIRE_DTYPES
from ..measures import MEASURES, OF_FEATURES
from .parts_in_words import matrix
from .reported_run import Run, method_names


def glossary(runs: Sequence[Run]) -> str:
    config = runs[0].config
    names = dict.fromkeys(name for run in runs for name in run.summary.measures.names)
    of_features = [
        any(set(run.summary.measures.names) >= set(each.names) for each in OF_FEATURES.values())
        for run in runs
    ]
    rows, its_matrix = _ROW[config.similarity], matrix(method_names(runs))
    terms = {
        **({} if all(of_features) else {"class row": rows, "class matrix W": its_matrix}),
        "extractor φ": "The net that maps an image to its embedding.",
        **({} if all(of_features) else _CLASS_SETS),
        **(_FEATURES if any(of_features) else {}),
        "round": _ROUND,
        **{MEASURES[name].label: MEASURES[name].words for name in names if MEASURES[name].words},
        "sd": _DEVIATION,
        "MB, kB": _BYTES.format(WIRE_DTYPES[config.wire_dtype].itemsize),
    }
    items = "".join(f"<dt>{escape(term)}</dt><dd>{escape(meaning)}</dd>" for term, meaning in terms.items())
    return f"<h2>Glossary</h2><dl>{items}</dl>"


_CLASS_SETS = {
    "positives": "The classes in a client's own data.",
    "negatives": "Classes drawn at random from those that a client does not hold.",
    "|S_k|": "How many class rows a client has in a round: those of its positives and its negatives, or all; "
    "whether they are sent to it, drawn by it from a seed, or kept by it.",
}
_FEATURES = {
    "block": "A part of the net that takes what the one before it made. Before the first is the stem, which "
    "takes the image.",
    "features": "What a block makes of an image, as a row of numbers: by them images are compared, and "
    "classes told apart.",
}
_ROUND = (
    "Some clients train on their own images; what they share is sent to them before, and averaged by the "
    "server after."
)
_ROW = {  # by similarity
    "cosine": "The numbers that stand for one class. An image is given the class whose row points most "
    "nearly the way its embedding does.",
    "dot": "The numbers that stand for one class, and its bias. An image is given the class for which the "
    "product of row and embedding, and the bias, come to most.",
}
_DEVIATION = "Standard deviation over the seeds, that is over repetitions with different random numbers."
_BYTES = "A million and a thousand bytes. Numbers travel as {} bytes, ids as 8."
