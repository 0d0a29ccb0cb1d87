"""Dense models by name; each module holds one, which knows nothing of low rank.

`train.registry.resolve` turns a name into its `build` function. The table holds import
paths, so that listing the names imports no model. Every `build` takes what its task
builds models with (`Task.model_args`), `rngs` and the model's own options, whose
defaults stand there alone:

- `classification`: takes `image_shape` and `num_classes`; the model maps images
  (b, x, y, c) to logits (b, o).
- `language_model`: takes `vocab_size` and `context`; the model maps tokens (b, t) to
  logits (b, t, o).
- `translation`: takes `vocab_size`, `source_length` and `target_length`; the model maps
  source (b, s), target (b, t) and the segments of both, which tell packed sentences
  apart, to logits (b, t, o).

All logits are float32. A model that is to write text decodes token by token as well:
`decode(tokens (b, t), cache) -> (logits (b, t, o), cache)`, from a cache whose
`position` is how many tokens it holds: one of `init_cache(batch_size)` for a language
model, of `start(source, segments)` for translation.
"""

MODELS: dict[str, str] = {
    "convnet": "train.models.convnet:build",
    "encoder_decoder": "train.models.encoder_decoder:build",
    "lenet": "train.models.lenet:build",
    "mlp": "train.models.mlp:build",
    "resnet": "train.models.resnet:build",
    "transformer": "train.models.transformer:build",
    "vgg": "train.models.vgg:build",
    "vit": "train.models.vit:build",
}
