"""TFDS builders of local files, without TensorFlow and without any download."""
