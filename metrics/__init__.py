"""Scores of captions: COCO's metrics, their uncertainty, CLIPScore, and the page that shows them."""
