"""Data for the reference trainers: loaders, pre-processing, cache, splits, slice datasets, phantom.

Typical use::

    cases = find_cases("acdc", root)                     # what is on disk, checked
    split = make_split(cases, labeled_num=2, seed=0)     # by subject
    volumes = prepare(cases, recipe_for("acdc"), cache_dir)
    pool = SliceDataset(split.select(volumes, "unlabeled"), labels=False)

Names are imported on first use, so `import medcl_train.data` costs neither nibabel nor torch.
Every problem with a file is a `DataError` that names the file, what is wrong and the way out.
"""

import importlib

_HOME = {
    "Case": "cases",
    "DATASETS": "cases",
    "find_cases": "cases",
    "load_native": "cases",
    "DataError": "errors",
    "shared_data_root": "locations",
    "Recipe": "recipe",
    "recipe_for": "recipe",
    "Geometry": "volume",
    "Volume": "volume",
    "save_prediction": "volume",
    "prepare": "preprocess",
    "Split": "splits",
    "label_counts": "splits",
    "make_split": "splits",
    "IGNORE_INDEX": "datasets",
    "SliceDataset": "datasets",
    "PatchDataset": "patches",
    "TwoStreamBatchSampler": "sampler",
}
_SUBMODULES = ("phantom", "augment")

__all__ = [*_HOME, *_SUBMODULES]


def __getattr__(name):
    if name in _HOME:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})
