"""Embedders: what a picture, a rate or a motion becomes before it conditions the U-Net."""
