"""Networks, one file a family. Each takes `image_shape` and `num_classes` and returns logits."""
