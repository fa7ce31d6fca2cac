"""Data sets: uint8 images and labels in memory, one file a source, and the batches made of them."""
