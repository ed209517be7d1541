"""The names of COCO's metrics, as --metrics takes them."""

METRICS = ("Bleu", "METEOR", "ROUGE_L", "CIDEr", "SPICE")  # in pycocoevalcap's order
