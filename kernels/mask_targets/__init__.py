from .reference import mask_targets

__all__ = ["mask_targets"]
