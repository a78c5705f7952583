"""Reference training code of medcl_kernels: data, models, metrics, engine. Not in the wheel."""
