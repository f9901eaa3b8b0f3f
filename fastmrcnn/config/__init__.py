"""The configuration: its fields (schema, model), how it is read (file), what it cannot mean (checks)."""

from fastmrcnn.config.schema import Config

__all__ = ["Config"]
