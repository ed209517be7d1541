"""The embedded default: a small made world, its CLIP, its GPT-2 and its report."""
