"""Dense models by name; each module holds one, which knows nothing of low rank.

`train.registry.resolve` turns a name into its `build` function. The table holds import
paths, so that listing the names imports no model. Every `build` takes what its task
builds models with (`Task.model_args`), `rngs` and the model's own options, whose
defaults stand there alone. These are models of the task `classification`: `build` takes
`image_shape` and `num_classes`, and returns a module that maps images (b, x, y, c) to
float32 logits (b, o).
"""

MODELS: dict[str, str] = {
    "convnet": "train.models.convnet:build",
    "lenet": "train.models.lenet:build",
    "mlp": "train.models.mlp:build",
    "resnet": "train.models.resnet:build",
    "vgg": "train.models.vgg:build",
    "vit": "train.models.vit:build",
}
