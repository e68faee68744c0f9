"""Stands in for the package datasets: SGLang's bench client imports it; random prompts have no use for it."""


def load_dataset(*args: object, **kwargs: object) -> object:
    raise NotImplementedError("a stand-in has no data")
