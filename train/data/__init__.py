"""Data sets by name that take arguments: text in windows, sentences in pairs.

`train.data.sources` turns a name into its factory, which is called as
`factory(data_dir=..., **args)` with the config's arguments and returns a
`train.data.sources.RawDataset`. The table holds import paths, so that listing the names
imports none of them. "digits" and the names of TFDS image sets are names as well.
"""

DATASETS: dict[str, str] = {
    "sentence_pairs": "train.data.pairs:sentence_pairs",
    "text_windows": "train.data.windows:text_windows",
}
