"""The science of distribution-aware binarization: quantizers, layers, models, data, training, packed models.

Imports torch and `kernels`; never ray, mlflow, typer, optuna or pydantic, so that it runs under plain `torchrun`.
"""
