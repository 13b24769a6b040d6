"""Megatron-Core's private parts and the differences between its versions 0.16 to 0.19; nothing else touches them."""

from __future__ import annotations

from importlib import metadata

from packaging.version import Version

MEGATRON_VERSION = Version(metadata.version("megatron-core"))
