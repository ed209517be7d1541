"""What an epoch ends with: sample captions of a few images, and validation scores computed as in evaluate.py."""

from dataclasses import replace

import torch

from features.image_dataset import images_of
from features.store import check_encoders
from metrics.coco import caption_statistics, coco_scores, too_few_distinct
from metrics.scripts import uncut_warning
from models.decoding import generate_captions
from models.placement import is_sharded
from utils.cli import note, progress_bar
from utils.distributed import all_union
from utils.processes import share

SAMPLES = 8  # images captioned after every epoch
SAMPLE_LENGTH = 40  # tokens of such a caption
METRICS = ("Bleu", "ROUGE_L", "CIDEr")  # these need no Java


def show_samples(model, tokenizer, dataset, epoch, decoding):
    """Caption a few images of the data, show the first beside its reference, and warn where all are alike."""
    rows = list(dict.fromkeys(dataset.embedding_index[:1000].tolist()))[:SAMPLES]
    embeddings = dataset.clip_embedding[rows].float().to(next(model.clip_project.parameters()).device)
    model.eval()
    samples = replace(decoding, entry_length=min(SAMPLE_LENGTH, decoding.entry_length))
    captions = [group[0].text.strip() for group in model.caption(generate_captions, tokenizer, embeddings, samples)]
    reference = dataset.first_reference()
    note(f"epoch {epoch} sample: {captions[0]!r}{f'; reference: {reference!r}' if reference else ''}")
    if len(rows) > 1 and len(set(captions)) == 1:
        note(
            f"warning: {len(rows)} different images got the same caption; train longer, raise --lr, or check that the "
            f"embeddings differ"
        )


class Validation:
    """The images of --val_data with their references; keeps the best weights by CIDEr."""

    def __init__(self, store, trained):
        """Gather every image's row and references.

        Args:
            store: FeatureStore to score on.
            trained: FeatureStore that is trained on.
        Raises: ValueError where their encoders differ.
        """
        check_encoders(f"--val_data {store.path}", store, f"--data {trained.path}", trained.shape, trained.info)
        images = images_of(store)
        self.clip_embedding, self.rows = store.clip_embedding, {i: row for i, (row, _) in images.items()}
        self.references = {i: texts for i, (_, texts) in images.items()}
        if len(self.references) == 1:
            note(
                f"warning: --val_data {store.path} has one image, on which CIDEr is not defined; no best weights are "
                "chosen"
            )
        uncut = uncut_warning({"references": [text for texts in self.references.values() for text in texts]})
        if uncut:
            note(f"warning: --val_data {store.path}: {uncut}")

    def run(self, trainer, tokenizer, files, log):
        """Caption and score the images, log the scores, and keep the weights where CIDEr is the best so far.

        Args:
            trainer: Trainer at the end of an epoch; its `best` is set.
        """
        captions = self._caption(trainer.model.eval(), tokenizer, trainer.device, trainer.config.bs, files.decoding)
        scored = coco_scores(captions, self.references, METRICS, "python")
        statistics = caption_statistics(scored.tokens)
        log.add_scores(trainer.step, trainer.epoch, scored.metrics | statistics)
        cider = scored.metrics["CIDEr"]  # None on one image
        is_best = cider is not None and (trainer.best is None or cider > trainer.best)
        if is_best:
            files.save_best(trainer.model)
            trainer.best = cider
        shown = ", ".join(
            f"{name} {scored.metrics[name]:.3f}"
            for name in ("CIDEr", "Bleu_4", "ROUGE_L")
            if scored.metrics[name] is not None
        )
        best = "; the best so far" if is_best else "" if cider is None else f"; the best was CIDEr {trainer.best:.3f}"
        note(
            f"epoch {trainer.epoch} validation: {shown}; {statistics['share_of_distinct_captions']:.0%} of captions "
            f"distinct{best}"
        )
        warning = too_few_distinct(statistics, len(captions))
        if warning:
            note(f"warning: {warning}")

    def _caption(self, model, tokenizer, device, batch_size, decoding):
        """Return {image id: caption}, as predict.py makes them, each process captioning its share."""
        captions, ids = {}, list(self.rows)
        if not is_sharded(model):  # sharded weights need all processes on the same images
            ids = share(ids)
        with progress_bar(len(ids), "validation", "img") as bar:
            for start in range(0, len(ids), batch_size):
                batch = ids[start : start + batch_size]
                embeddings = self.clip_embedding[torch.tensor([self.rows[i] for i in batch])].float().to(device)
                groups = model.caption(generate_captions, tokenizer, embeddings, decoding)
                captions |= {i: group[0].text.strip() for i, group in zip(batch, groups, strict=True)}
                bar.update(len(batch))
        return all_union(captions)
