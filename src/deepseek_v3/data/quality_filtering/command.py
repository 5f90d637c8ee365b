"""The commands `dsv3 quality train` and `dsv3 quality score`, for the models of the quality filter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from deepseek_v3.data.documents import Document
from deepseek_v3.data.formats.reading import read_documents
from deepseek_v3.data.preliminary_cleaning import PreliminaryCleaner
from deepseek_v3.data.quality_filtering.fasttext import load_fasttext
from deepseek_v3.data.quality_filtering.fasttext_format import is_fasttext
from deepseek_v3.data.quality_filtering.fasttext_training import (
    GOOD,
    TrainingOptions,
    held_out_metrics,
    train_classifier,
)
from deepseek_v3.data.quality_filtering.ngram_model import write_arpa
from deepseek_v3.data.quality_filtering.ngram_training import PERCENTILES, PerplexityLimits, train_language_model
from deepseek_v3.data.quality_filtering.perplexity_score import ArpaModel, load_language_model
from deepseek_v3.data.tokens.holdout import HoldoutPlanner, TokenBounds
from deepseek_v3.data.tokens.index import Split
from deepseek_v3.utils.command_line import integer_option, number_option, print_next_steps
from deepseek_v3.utils.errors import DataError
from deepseek_v3.utils.files import output_file_problem
from deepseek_v3.utils.redaction import redact
from deepseek_v3.utils.text import pluralize

quality_app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Train and apply the models of the quality filter."
)

_Files = list[str] | None
_DEFAULT_HOLDOUT = 0.05
_FEW_DOCUMENTS = 20  # percentiles of fewer documents are unreliable
_FIELD = typer.Option(help="Field of a record that holds the text.")


@quality_app.command("train")
def train(
    output: Annotated[Path, typer.Option(help="The model's file: .bin for a classifier, .arpa for --text.")],
    good: Annotated[_Files, typer.Option(help="Documents to keep, for a classifier; may be repeated.")] = None,
    bad: Annotated[_Files, typer.Option(help="Documents to drop, for a classifier; may be repeated.")] = None,
    text: Annotated[_Files, typer.Option(help="Good documents, for a language model; may be repeated.")] = None,
    reference: Annotated[
        _Files,
        typer.Option(help="With --text: documents whose perplexities set the limits. Default: held-out text."),
    ] = None,
    order: Annotated[int, typer.Option(min=2, max=5, help="With --text: words of the longest n-grams.")] = 3,
    epochs: Annotated[
        int,
        typer.Option(
            metavar="NUMBER",
            parser=integer_option(at_least=1),
            help="With --good: passes over the documents.",
        ),
    ] = 5,
    seed: Annotated[
        int,
        typer.Option(
            metavar="NUMBER",
            parser=integer_option(at_least=0),
            help="With --good: seed of the initial vectors and the order.",
        ),
    ] = 0,
    holdout: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            parser=number_option,
            help="Share of the text that is held out to measure the model. Default: 0.05, more if there is little.",
        ),
    ] = None,
    text_field: Annotated[str, _FIELD] = "text",
) -> None:
    """Train a fastText classifier of --good against --bad, or an n-gram language model of --text."""
    if holdout is not None and not 0 < holdout < 1:
        raise DataError(f"--holdout {holdout}: expected a share between 0 and 1, such as 0.05")
    if problem := output_file_problem(output):
        raise DataError(f"{output}: {problem}")
    try:
        if good and bad and not text and not reference:
            _train_classifier(good, bad, output, TrainingOptions(epochs=epochs, seed=seed), holdout, text_field)
        elif text and not good and not bad:
            _train_language_model(text, reference or [], output, order, holdout, text_field)
        else:
            raise DataError(
                "expected --good and --bad for a classifier, or --text (and --reference) for a language model"
            )
    except OSError as error:
        why = error.strerror or error
        raise DataError(f"{output}: cannot be written: {why}; make room, or choose another file") from None
    _say_next(output, is_classifier=bool(good))


@quality_app.command("score")
def score(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Documents to score.")],
    model: Annotated[Path, typer.Option(help="A fastText classifier or a language model.")],
    label: Annotated[str, typer.Option(help="The label of a classifier whose probability to print.")] = GOOD,
    text_field: Annotated[str, _FIELD] = "text",
) -> None:
    """Print the score of each document, a probability or a perplexity, and its id."""
    texts, ids = [], []
    for document in _documents(files, text_field):
        texts.append(document.text)
        ids.append(document.id)
    if is_fasttext(model):
        classifier = load_fasttext(model)
        scores = [f"{found:.4f}" for found in classifier.probabilities(texts)[:, classifier.index(label)].tolist()]
    else:
        scores = [f"{found:.1f}" for found in load_language_model(model).perplexities(texts).tolist()]
    for found, id_ in zip(scores, ids, strict=True):
        typer.echo(f"{found}\t{id_}")
    _say_next(model, is_classifier=is_fasttext(model), err=True)


def _say_next(model: Path, *, is_classifier: bool, err: bool = False) -> None:
    field = "classifier" if is_classifier else "language_model"
    words = ["dsv3", "preprocess", "--config", "data_config", "--set", f"quality_filtering.{field}={model}"]
    print_next_steps(words, err=err)


def _train_classifier(
    good: Sequence[str],
    bad: Sequence[str],
    output: Path,
    options: TrainingOptions,
    holdout: float | None,
    text_field: str,
) -> None:
    split = [_split(files, holdout, text_field) for files in (good, bad)]
    (good_texts, good_held), (bad_texts, bad_held) = split
    model = train_classifier(good_texts, bad_texts, options)
    model.write(output)
    typer.echo(
        f"{output}: {len(good_texts):,} good and {len(bad_texts):,} bad documents, {len(model.words):,} words, "
        f"{output.stat().st_size:,} bytes"
    )
    held = held_out_metrics(model, output, good_held, bad_held)
    typer.echo(
        f"held out: {held.documents:,} documents, precision {held.precision:.3f} and recall {held.recall:.3f} of "
        f"the good ones at a score of 0.5, area under the ROC curve {held.auc:.3f}"
    )


def _train_language_model(
    text: Sequence[str], reference: Sequence[str], output: Path, order: int, holdout: float | None, text_field: str
) -> None:
    if reference:
        texts, measured = [*_texts(text, text_field)], [*_texts(reference, text_field)]
    else:
        texts, measured = _split(text, holdout, text_field)
    model = train_language_model(texts, order)
    limits = PerplexityLimits.of(ArpaModel(model), measured)
    write_arpa(model, output)
    limits.write(output)
    numbers = ", ".join(f"{len(rows):,} {length}-grams" for length, rows in enumerate(model.log_probs, start=1))
    source = "reference" if reference else "held-out"
    typer.echo(f"{output}: {len(texts):,} documents, {numbers}")
    typer.echo(
        f"perplexity of {limits.documents:,} {source} documents: {PERCENTILES[0]} % below {limits.head:.1f} "
        f"(head), {PERCENTILES[1]} % below {limits.middle:.1f} (head and middle)"
    )
    if limits.documents < _FEW_DOCUMENTS:
        typer.echo(
            f"Percentiles of {pluralize(limits.documents, 'document')} are unreliable limits of head, middle and "
            f"tail: give {_FEW_DOCUMENTS} or more documents by --reference, or more text",
            err=True,
        )


def _documents(files: Sequence[str], text_field: str) -> Iterator[Document]:
    """The documents as `preliminary_cleaning` leaves them, because the quality filter sees them so."""
    cleaner = PreliminaryCleaner()
    for document in chain.from_iterable(read_documents(file, text_field) for file in files):
        yield Document(document.id, cleaner.clean(document.text))


def _texts(files: Sequence[str], text_field: str) -> Iterator[str]:
    return (document.text for document in _documents(files, text_field) if document.text)


def _split(files: Sequence[str], holdout: float | None, text_field: str) -> tuple[list[str], list[str]]:
    """Splits the texts into those to train on and those held out. Raises DataError for fewer than two words."""
    source = ", ".join(map(redact, files))
    texts = [*_texts(files, text_field)]
    num_words = sum(map(_num_words, texts))
    if num_words < 2:
        raise DataError(
            f"{source}: {pluralize(num_words, 'word')} in {pluralize(len(texts), 'document')}; expected at least "
            "2, one to train on and one to hold out; give files with more text"
        )
    words = TokenBounds(_num_words, _num_words)
    planner = HoldoutPlanner(source, lambda: texts, words, 1, "one word", "words", "add text")
    parts: dict[Split, list[str]] = {"train": [], "holdout": []}
    for split, part in chain.from_iterable(map(planner.choose(holdout, _DEFAULT_HOLDOUT).split, texts)):
        parts[split].append(part)
    return parts["train"], parts["holdout"]


def _num_words(text: str) -> int:
    return len(text.split())
