"""Weights of Transformer-XL's own code (kimiyoung/transformer-xl) as ours.

From files that hold arrays and nothing else:

    model = model_from_official(dict(n_token=267735, n_layer=18, ...))
    params = from_official_xl(read_weights("model.safetensors"), model)

or `cached-tx convert`, for a run that can be evaluated and trained on. Checkpoints of
the PyTorch code are pickles, which can run code: none is read here. Where the model has
been built (its training script has it as `model`), PyTorch writes a file of its arrays
alone:

    arrays = {k: v.float().clone() for k, v in model.state_dict().items()}
    safetensors.torch.save_file(arrays, "model.safetensors")

Those of the TensorFlow code hold no code. TensorFlow reads one, and NumPy writes it:

    found = tf.train.load_checkpoint("model.ckpt")
    names = [n for n in found.get_variable_to_shape_map() if "/Adam" not in n]
    arrays = {n: found.get_tensor(n) for n in names if n.startswith("transformer/")}
    np.savez("model.npz", **arrays)
"""

from cached_tx.convert.official import from_official_xl, model_from_official
from cached_tx.convert.run import convert
from cached_tx.convert.weights import read_weights

__all__ = ["convert", "from_official_xl", "model_from_official", "read_weights"]
