"""COCO's caption metrics by pycocoevalcap behind one call, with or without Java.

BLEU, ROUGE-L and CIDEr need no Java. METEOR does; SPICE needs Stanford CoreNLP besides. Metrics that cannot be
computed are left out of the scores and named with the reason.
"""

import contextlib
import functools
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from metrics import ptb
from metrics.names import METRICS

FEW_DISTINCT, MANY_IMAGES = 0.05, 5  # below this share, with more images, the model may not see the image
NEEDS_JAVA = ("METEOR", "SPICE")
BLEU_ORDER = 4
# Meteor 1.5, English: alpha, beta, gamma, delta, and the weights of exact, stem, synonym and paraphrase matches.
METEOR_PARAMETERS = (0.85, 0.2, 0.6, 0.75, (1.0, 0.6, 0.8, 0.6))
# The serializer inside SPICE's 2016 jar reaches into these packages; Java 8 neither reads nor needs the variable.
OPENED = ("lang", "math", "util", "util.concurrent", "net", "text")
SPICE_OPTIONS = " ".join(f"--add-opens=java.base/java.{package}=ALL-UNNAMED" for package in OPENED)


class Unavailable(Exception):
    """A metric cannot be computed on this machine; the text says what it needs."""


@dataclass
class Scores:
    """Scores of one system.

    Args:
        ids: N image ids.
        metrics: {name: value of the whole set}, pycocoevalcap's names and values; CIDEr of one image is None.
        per_image: {name: [N] values}.
        statistics: {metric of METRICS: [N, k]}; their sums over images give the metric (`from_sums`).
        tokens: N captions as tokens joined by spaces.
        unavailable: {metric: reason}.
        tokenizer: "java" or "python".
        warnings: what the reader of the scores must know.
    """

    ids: list
    metrics: dict
    per_image: dict
    statistics: dict
    tokens: list
    unavailable: dict
    tokenizer: str
    warnings: list = field(default_factory=list)

    def keep(self, name, per_image, overall=None, statistics=None):
        """Store one metric's values; without `overall` and `statistics` the metric is the mean over images."""
        self.per_image[name] = np.array(per_image, float)
        self.metrics[name] = float(self.per_image[name].mean() if overall is None else overall)
        self.statistics[name] = self.per_image[name][:, None] if statistics is None else statistics


def coco_scores(captions, references, metrics=METRICS, tokenizer="auto"):
    """Score one caption per image against its references.

    Args:
        captions: {image id: caption}, N images.
        references: {image id: [caption, ...]}; other images are ignored.
        metrics: some of METRICS; "Bleu" gives Bleu_1 to Bleu_4.
        tokenizer: "java" (Stanford's program), "python" (`metrics.ptb`), or "auto": Java if there is one.
    Returns: Scores.
    Raises: ValueError for no captions, an image without reference, an unknown metric, or Java asked for but missing.
    """
    _check(captions, references, metrics, tokenizer)
    ids = list(captions)
    flat = [reference for i in ids for reference in references[i]]
    (tokens, flat), tokenizer, warnings = _cut([[captions[i] for i in ids], flat], tokenizer)
    flat = iter(flat)
    # Keys are row numbers: SPICE sorts its keys, and ids may be numbers and names together.
    candidates = {row: [caption] for row, caption in enumerate(tokens)}
    targets = {row: [next(flat) for _ in references[i]] for row, i in enumerate(ids)}
    if not any(text for texts in targets.values() for text in texts):
        raise ValueError("no reference holds a word")
    scores = Scores(ids, {}, {}, {}, tokens, {}, tokenizer, warnings)
    for name in METRICS:
        if name in metrics:
            try:
                _require(name)
                _SCORERS[name](scores, targets, candidates)
            except Unavailable as error:
                scores.unavailable[name] = str(error)
    return scores


def _check(captions, references, metrics, tokenizer):
    """Refuse what cannot be scored; Raises: ValueError."""
    if not captions:
        raise ValueError("there are no captions to score")
    missing = [image_id for image_id in captions if not references.get(image_id)]
    if missing:
        raise ValueError(f"{len(missing)} captions have no reference, as image_id {missing[0]}")
    unknown = [name for name in metrics if name not in METRICS]
    if unknown:
        raise ValueError(f"unknown metric {unknown[0]}; there are {', '.join(METRICS)}")
    if tokenizer not in ("auto", "java", "python"):
        raise ValueError(f"tokenizer {tokenizer!r} is none of auto, java, python")
    if tokenizer == "java" and not java_available():
        raise ValueError("tokenizer java needs a Java runtime (`java` on PATH); python gives the same tokens without")


def _cut(lists, tokenizer):
    """Cut lists of texts into tokens; returns the lists of tokens, the tokenizer that was used, and warnings.

    Raises: ValueError where Java was asked for by name and fails.
    """
    warnings = []
    if tokenizer == "java" or (tokenizer == "auto" and java_available()):
        try:
            return [java_tokenize(texts) for texts in lists], "java", warnings
        except (OSError, ValueError) as error:
            if tokenizer == "java":
                raise ValueError(f"{error}; use the Python tokenizer, which gives the same tokens") from None
            warnings.append(f"{error}; the Python tokenizer, which gives the same tokens, took its place")
    return [ptb.tokenize(texts) for texts in lists], "python", warnings


@functools.cache
def java_available():
    """Tell whether `java` is on PATH and runs (macOS has a `java` that only asks for an installation)."""
    if shutil.which("java") is None:
        return False
    try:
        return subprocess.run(["java", "-version"], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _require(name):
    """Raise Unavailable where this machine lacks what a metric needs."""
    if name in NEEDS_JAVA and not java_available():
        raise Unavailable("needs a Java runtime (`java` on PATH)")
    if name == "SPICE":
        from pycocoevalcap.spice import get_stanford_models as models

        jar = Path(models.SPICEDIR, models.SPICELIB, models.JAR)
        if not all(os.path.exists(f"{jar}{end}") for end in (".jar", "-models.jar")):
            raise Unavailable(
                f"needs Stanford CoreNLP 3.6.0 in {jar.parent}; with a network, run once: python -c 'from pycocoevalcap"
                ".spice.get_stanford_models import get_stanford_models as get; get()'"
            )


def java_tokenize(captions):
    """Cut captions into tokens with pycocoevalcap's copy of Stanford's program.

    Args:
        captions: list of N texts.
    Returns: list of N texts of tokens joined by spaces, punctuation removed.
    Raises: ValueError where the program fails.
    Source: pycocoevalcap/tokenizer/ptbtokenizer.py, but the temporary file lies outside the package, the text is
        UTF-8 whatever the locale, and every kind of line break, not only "\\n", becomes a space.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "captions.txt")
        text.write_text("\n".join(ptb.LINE_BREAKS.sub(" ", c) for c in captions), encoding="utf-8", newline="\n")
        command = ["java", "-cp", jar, "edu.stanford.nlp.process.PTBTokenizer", "-encoding", "UTF-8"]
        done = subprocess.run([*command, "-preserveLines", "-lowerCase", text], capture_output=True)
    lines = done.stdout.decode("utf-8").split("\n")
    if done.returncode or not len(captions) <= len(lines) <= len(captions) + 1:
        raise ValueError(f"Stanford's tokenizer failed (exit status {done.returncode})")
    marks = set(ptbtokenizer.PUNCTUATIONS)
    return [" ".join(w for w in line.rstrip().split(" ") if w not in marks) for line in lines[: len(captions)]]


def caption_statistics(tokens, training=None):
    """Describe a system's captions.

    Args:
        tokens: list of captions, each tokens joined by spaces.
        training: set of training captions in the same form, or None.
    Returns: {quantity: number}.
    """
    lengths = [len(caption.split()) for caption in tokens]
    statistics = {
        "mean_length_in_words": float(np.mean(lengths)),
        "vocabulary_size": len({word for caption in tokens for word in caption.split()}),
        "share_of_distinct_captions": len(set(tokens)) / len(tokens),
    }
    if training is not None:
        repeated = sum(caption in training for caption in tokens)
        statistics["share_repeated_from_training"] = repeated / len(tokens)
    return statistics


def too_few_distinct(statistics, images):
    """Return a warning where a system's captions hardly differ, else None; `statistics` of `caption_statistics`."""
    share = statistics["share_of_distinct_captions"]
    if images <= MANY_IMAGES or share >= FEW_DISTINCT:
        return None
    return f"only {share:.1%} of the captions are distinct; the model may not see the image"


def _bleu(scores, targets, candidates):
    """BLEU-1 to -4; statistics: candidate length, closest reference length, n-grams, matched n-grams."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=BLEU_ORDER)
    for row, candidate in candidates.items():
        scorer += (candidate[0], targets[row])
    overall, per_image = scorer.compute_score(option="closest", verbose=0)
    rows = []
    for candidate, (lengths, _) in zip(scorer.ctest, scorer.crefs, strict=True):
        length = candidate["testlen"]
        closest = min((abs(n - length), n) for n in lengths)[1]
        rows.append([length, closest, *candidate["guess"], *candidate["correct"]])
    scores.statistics["Bleu"] = np.array(rows, float)  # [N, 10]
    for order in range(BLEU_ORDER):
        scores.metrics[f"Bleu_{order + 1}"] = float(overall[order])
        scores.per_image[f"Bleu_{order + 1}"] = np.array(per_image[order])


def _rouge(scores, targets, candidates):
    """ROUGE-L: the mean over images."""
    from pycocoevalcap.rouge.rouge import Rouge

    scores.keep("ROUGE_L", Rouge().compute_score(targets, candidates)[1])


def _cider(scores, targets, candidates):
    """CIDEr: the mean over images; words weigh by their inverse document frequency over the images."""
    from pycocoevalcap.cider.cider import Cider

    if len(targets) == 1:  # log(1 / 1) = 0 for every word: pycocoevalcap gives 0 for the best caption too
        scores.metrics["CIDEr"], scores.per_image["CIDEr"] = None, np.full(1, np.nan)
        scores.warnings.append("CIDEr is not defined on one image: words weigh by how few of the images have them")
        return
    scores.keep("CIDEr", Cider().compute_score(targets, candidates)[1])
    words = ((candidates[row][0].split(), " ".join(targets[row]).split()) for row in targets)
    if not scores.per_image["CIDEr"].any() and any(not set(own).isdisjoint(theirs) for own, theirs in words):
        scores.warnings.append(
            "CIDEr is 0 though captions share words with their references: those words are in the references of all "
            "images, and have no weight; score more images"
        )


def _meteor(scores, targets, candidates):
    """METEOR; statistics: Meteor's own 23 counts per image."""
    from pycocoevalcap.meteor.meteor import Meteor

    class Recorder(Meteor):
        def __init__(self):
            super().__init__()
            self.counts = []

        def _stat(self, hypothesis, references):
            counts = super()._stat(hypothesis, references)
            self.counts.append([float(count) for count in counts.split()])
            return counts

        def __del__(self):
            """Do nothing: the parent class would wait for its lock, which an error or Ctrl-C leaves locked."""

        def close(self):
            with contextlib.suppress(OSError):  # closing the pipe to a program that has died
                self.meteor_p.stdin.close()
            self.meteor_p.kill()
            self.meteor_p.wait()

    try:
        with contextlib.closing(Recorder()) as meteor:
            overall, per_image = meteor.compute_score(targets, candidates)
    except (OSError, ValueError) as error:
        raise Unavailable("its Java program failed or was killed; it needs 2 GB of memory") from error
    counts = np.array(meteor.counts)  # [N, 23]
    # a single chunk that covers both texts counts as none, per image and in the sum (Meteor's MeteorStats.addStats)
    counts[(counts[:, 20] == 1) & (counts[:, 21:23] == counts[:, 0:2]).all(axis=1), 20] = 0
    scores.keep("METEOR", per_image, overall, counts)


def _spice(scores, targets, candidates):
    """SPICE: the mean over images of the F-score of scene graph tuples."""
    from pycocoevalcap.spice.spice import Spice

    try:
        os.environ.setdefault("JDK_JAVA_OPTIONS", SPICE_OPTIONS)
        _, per_image = Spice().compute_score(targets, candidates)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise Unavailable(f"its Java program failed ({error}); it was written for Java 8") from error
    scores.keep("SPICE", [scene["All"]["f"] for scene in per_image])


_SCORERS = {"Bleu": _bleu, "METEOR": _meteor, "ROUGE_L": _rouge, "CIDEr": _cider, "SPICE": _spice}


def from_sums(name, sums, images):
    """Compute a metric from sums of per-image statistics.

    Args:
        name: key of Scores.statistics; except for "Bleu" and "METEOR", the metric is a mean over images.
        sums: [B, k] sums over B samples of images.
        images: images per sample.
    Returns: {metric: [B]}, four of them for "Bleu".
    Source: pycocoevalcap/bleu/bleu_scorer.py:compute_score; Denkowski and Lavie 2014, section 2, for METEOR.
    """
    if name == "Bleu":
        return _bleu_from_sums(sums)
    return {name: _meteor_from_sums(sums) if name == "METEOR" else sums[:, 0] / images}


def _bleu_from_sums(sums):
    length, closest = sums[:, 0], sums[:, 1]
    guessed, correct = sums[:, 2 : 2 + BLEU_ORDER], sums[:, 2 + BLEU_ORDER :]
    precision = np.cumprod((correct + 1e-15) / (guessed + 1e-9), axis=1)  # pycocoevalcap's constants
    ratio = (length + 1e-15) / (closest + 1e-9)
    brevity = np.exp(np.minimum(0, 1 - 1 / ratio))
    return {f"Bleu_{n + 1}": precision[:, n] ** (1 / (n + 1)) * brevity for n in range(BLEU_ORDER)}


def _meteor_from_sums(sums):
    alpha, beta, gamma, delta, weights = METEOR_PARAMETERS
    lengths, function_words = sums[:, 0:2], sums[:, 2:4]  # [B, 2]: candidate, reference
    stages = sums[:, 4:20].reshape(-1, 4, 2, 2)  # [B, stage, content or function, candidate or reference]
    matched = np.einsum("bsfc,s,f->bc", stages, weights, (delta, 1 - delta))
    total = delta * (lengths - function_words) + (1 - delta) * function_words
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = (matched / total).T
        mean = 1 / ((1 - alpha) / precision + alpha / recall)
        fragmentation = sums[:, 20] / sums[:, 21:23].mean(axis=1)
        score = mean * (1 - gamma * fragmentation**beta)
    return np.nan_to_num(score)
