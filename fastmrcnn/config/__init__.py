"""The configuration: what can be set (schema, model), how it is read (file), what cannot be meant (checks)."""

from fastmrcnn.config.schema import Config

__all__ = ["Config"]
